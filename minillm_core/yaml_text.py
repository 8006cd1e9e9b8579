"""YAML as a person reads it: the core schema of YAML 1.2, with underscores in numbers (`1_000`) and merge keys (`<<`),
and without tags. A key given twice is an error.

PyYAML itself reads YAML 1.1: there `010` is 8, `1e-3` is a text, `off` is false, `2024-01-01` is a date, and a key that
is given twice has its last value.
"""

import re
from typing import Any

import yaml

_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^(?:[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_RESOLVERS = (
    ("null", _NULL, ["~", "n", "N", ""]),
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", re.compile(r"^<<$"), ["<"]),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own name and form)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if getattr(event, "tag", None) is not None:
            problem = f"the tag `{event.tag}` in line {event.start_mark.line + 1} is not supported"
            raise yaml.constructor.ConstructorError(None, None, problem)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        first: dict[str, Any] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and first.setdefault(key.value, key) is not key:
                lines = [mark.line + 1 for mark in (first[key.value].start_mark, key.start_mark)]
                problem = f"the key `{key.value}` is given twice, in lines {lines[0]} and {lines[1]}"
                raise yaml.constructor.ConstructorError(None, None, problem)
        return node

    def construct_int(self, node: Any) -> int:
        text = self.construct_scalar(node).replace("_", "")
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


class _Dumper(yaml.SafeDumper):
    """Puts texts in quotes that this schema or YAML 1.1 would not read as texts."""

    yaml_implicit_resolvers = {key: [*value] for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()}  # noqa: RUF012


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)


def load_yaml(text: str) -> Any:
    """The content of a YAML document. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, _Loader)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise yaml.YAMLError(f"a value cannot be read: {error}") from error


def dump_yaml(data: dict[str, Any]) -> str:
    """A YAML document, with the keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
