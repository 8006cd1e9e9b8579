"""The Python examples of a page, with the output that the page shows: `python docs/tools/examples.py PAGE...` runs them
and writes what they print into the page.

A ```python block may be followed by a ```text block with its output. The blocks of a page share their names.
"""

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<output>.*?)```\n)?", re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def run_blocks(page: str) -> Iterator[tuple[re.Match[str], str]]:
    """Runs the Python blocks of a page, in order. Yields each one, and what it printed."""
    names: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCK.finditer(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block["code"], "example", "exec"), names)
        yield block, printed.getvalue()


def same_output(expected: str, found: str) -> bool:
    """Whether two outputs are equal, but for two units of the last digit of a decimal number: a different processor
    rounds differently. Integers must be equal, and decimal numbers must have the same number of digits."""
    if NUMBER.split(expected) != NUMBER.split(found):
        return False
    pairs = zip(map(Decimal, NUMBER.findall(expected)), map(Decimal, NUMBER.findall(found)), strict=True)
    return all(_close(x, y) for x, y in pairs)


def _close(x: Decimal, y: Decimal) -> bool:
    unit, other = (number.as_tuple().exponent for number in (x, y))
    if not isinstance(unit, int) or unit != other:
        return False
    return abs(x - y) <= (2 * Decimal(10) ** unit if unit < 0 else 0)


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        page, at, parts = path.read_text(), 0, []
        for block, printed in run_blocks(page):
            if block["output"] is not None:
                parts += [page[at : block.start("output")], printed]
                at = block.end("output")
        path.write_text("".join([*parts, page[at:]]))


if __name__ == "__main__":
    main()
