"""Checks of the fields of a configuration."""

from typing import Any

from minillm_core.errors import InputError
from minillm_core.files import user_path


def require(condition: bool, problem: str, **details: Any) -> None:
    """Raises InputError if the condition is false."""
    if not condition:
        raise InputError(problem, **details)


def require_positive(section: str, config: Any, *fields: str) -> None:
    """Raises InputError if a field is not above 0."""
    for field in fields:
        value = getattr(config, field)
        require(value > 0, f"{section}.{field} is out of range", expected="a number above 0", found=value)


def expand_home(config: Any, *fields: str) -> None:
    """Replaces `~` at the beginning of a path; raises InputError if a field cannot be a path."""
    for field in fields:
        path = user_path(getattr(config, field))
        if getattr(config, field).startswith("~"):
            object.__setattr__(config, field, str(path))


def require_weights(name: str, weights: dict[str, float] | None) -> None:
    """Raises InputError if weights are negative, not finite or all 0."""
    values = [] if weights is None else [*weights.values()]
    require(
        weights is None or (all(0 <= x < float("inf") for x in values) and sum(values) > 0),
        f"the weights of {name} are out of range",
        expected="numbers of 0 or more, not all 0",
        found=values,
    )
