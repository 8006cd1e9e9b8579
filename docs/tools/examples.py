"""The Python examples of a page, with the output that the page shows: `python docs/tools/examples.py PAGE...` runs them
and writes what they print into the page.

A ```python block may be followed by a ```text block with its output. The blocks of a page share their names.
"""

import contextlib
import io
import re
import sys
from collections.abc import Iterator
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


def same_output(expected: str, found: str, rel: float = 0.05) -> bool:
    """Whether two outputs are equal, but for the last digits of their numbers: another processor rounds differently."""
    if NUMBER.split(expected) != NUMBER.split(found):
        return False
    pairs = zip(map(float, NUMBER.findall(expected)), map(float, NUMBER.findall(found)), strict=True)
    return all(abs(x - y) <= rel * abs(x) for x, y in pairs)


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
