"""Builds a dataclass from nested dicts, and names every field that is unknown, missing or of the wrong type."""

import contextlib
import dataclasses
import difflib
import re
import reprlib
import types
import typing
from typing import Any, Literal

import yaml

from minillm_core.yaml_text import load_yaml


def build(cls: type, data: Any, prefix: str, problems: list[str]) -> Any:
    """Builds `cls` from a dict; appends to `problems` and returns None if it cannot."""
    if not isinstance(data, dict):
        problems.append(f"{prefix[:-1] or 'the file'}: expected a mapping of fields, found {_short(data)}")
        return None
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    n_before = len(problems)
    for name in data:
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known fields: {', '.join(fields)}"
            problems.append(f"{prefix}{name}: unknown field; {hint}")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _coerce(hints[name], data[name], f"{prefix}{name}", problems)
        elif field.default is dataclasses.MISSING:
            problems.append(f"{prefix}{name}: missing")
    return cls(**values) if len(problems) == n_before else None


def _coerce(hint: Any, value: Any, name: str, problems: list[str]) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, f"{name}.", problems)
    if typing.get_origin(hint) is dict:
        key_hint, value_hint = typing.get_args(hint)
        return _coerce_dict(key_hint, value_hint, value, name, problems)
    if typing.get_origin(hint) is Literal:
        hint = str
    if hint is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            problems.append(f"{name}: the number is too large for a float")
            return None
    if type(value) is hint:
        return value
    problem = f"{name}: expected {hint.__name__}, found {_short(value)} ({type(value).__name__})"
    if (advice := _advice(hint, value)) is not None:
        problem += f"; write {advice}"
    problems.append(problem)
    return None


def _coerce_dict(key_hint: Any, value_hint: Any, value: Any, name: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        problems.append(f"{name}: expected a mapping, found {_short(value)}")
        return None
    is_json = key_hint is int and all(isinstance(key, str) and key.isdecimal() for key in value)
    keys = {key: _coerce(key_hint, int(key) if is_json else key, f"a key of {name}", problems) for key in value}
    return {keys[key]: _coerce(value_hint, item, f"{name}.{key}", problems) for key, item in value.items()}


def _advice(hint: type, value: Any) -> str | None:
    """How to write a value of the wrong type, if it is clear what it was meant to be."""
    if isinstance(value, str):
        written = value.strip().lower()
        if hint is bool and written in ("true", "false"):
            return f"{written}, without quotes"
        if hint is bool and written in ("yes", "on", "no", "off"):
            return "true" if written in ("yes", "on") else "false"
        if hint is float and (special := re.fullmatch(r"([-+]?)\.?(nan|inf)(?:inity)?", written)):
            return f"{special[1]}.{special[2]}"
        with contextlib.suppress(yaml.YAMLError):
            if type(load_yaml(value)) is hint or (hint is float and type(load_yaml(value)) is int):
                return f"{value.strip()}, without quotes"
    if hint is int and isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53:
        return str(int(value))
    return None


def _short(value: Any) -> str:
    """A value as a message shows it: the beginning of a long one."""
    return reprlib.repr(value) if isinstance(value, (dict, list)) else repr(value)[:200]
