"""The exceptions that end a command without a traceback: bad input (exit status 2) and a request to stop."""

import signal
from collections.abc import Sequence


class InputError(ValueError):
    """Bad input: what was expected, what was found, where, and what to do about it.

    Several problems found together are raised together, one per line.
    """

    def __init__(
        self,
        problem: str,
        *,
        expected: object = None,
        found: object = None,
        where: object = None,
        hint: str | None = None,
        command: Sequence[str] = (),
    ):
        """
        Args:
            hint: what to do.
            command: the `minillm` subcommand, with its arguments, that does this; the command line prints it.
        """
        lines = [problem]
        for label, value in (("expected", expected), ("found", found), ("where", where), ("what to do", hint)):
            if value is not None:
                lines.append(f"  {label}: {value}")
        super().__init__("\n".join(lines))
        self.command = tuple(command)


def missing_package(
    error: ModuleNotFoundError, extra: str | None = None, *, where: object = None, otherwise: str = ""
) -> InputError:
    """The InputError for a package that is not installed.

    Args:
        extra: the extra of this project that installs it; None if the project itself does.
        otherwise: a way to do without it.
    """
    checkout = f"-e '.[{extra}]'" if extra else "-e ."
    hint = f"pip install {error.name}; in a checkout of this project: pip install -c constraints.txt {checkout}"
    problem = f"the package `{error.name}` is not installed"
    return InputError(problem, where=where, hint=f"{hint}; {otherwise}" if otherwise else hint)


def listed(problem: str, items: Sequence[str], limit: int = 20) -> str:
    """A problem and its items, one per line; at most the first `limit` items."""
    more = [f"... and {len(items) - limit} more"] if len(items) > limit else []
    return f"{problem}:\n  " + "\n  ".join([*items[:limit], *more])


class Interrupted(Exception):  # noqa: N818 (not an error)
    """SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C asked the run to stop. The run saves its state before it ends."""

    def __init__(self, number: signal.Signals):
        super().__init__(number.name)
        self.signal = number
