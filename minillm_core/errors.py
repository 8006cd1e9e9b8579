"""The exceptions that scripts end with, without a traceback: a user's mistake (exit code 2), a request to stop."""

import signal
from collections.abc import Sequence


class InputError(ValueError):
    """Bad input: what was expected, what was found, where, and what to do about it.

    Several problems found together are raised together, one a line.
    """

    def __init__(
        self,
        problem: str,
        *,
        expected: object = None,
        found: object = None,
        where: object = None,
        do: str | None = None,
    ):
        lines = [problem]
        for label, value in (("expected", expected), ("found", found), ("where", where), ("what to do", do)):
            if value is not None:
                lines.append(f"  {label}: {value}")
        super().__init__("\n".join(lines))


def listed(problem: str, items: Sequence[str], limit: int = 20) -> str:
    """A problem and what it consists of, one a line, the first of them if there are many."""
    more = [f"... and {len(items) - limit} more"] if len(items) > limit else []
    return f"{problem}:\n  " + "\n  ".join([*items[:limit], *more])


class Interrupted(Exception):  # noqa: N818 (not an error)
    """SIGTERM or Ctrl-C asked the run to stop, and it did so in good order."""

    def __init__(self, number: signal.Signals):
        super().__init__(number.name)
        self.signal = number
