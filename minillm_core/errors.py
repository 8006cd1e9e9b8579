"""The one exception a user's mistake raises; scripts print it without a traceback and exit with 2."""


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
