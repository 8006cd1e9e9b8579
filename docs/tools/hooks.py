"""Hooks of mkdocs: source code next to its explanation, and formulas as MathML.

A line that has only links of the form `[minillm_jax/layers.py::RMSNorm](../../minillm_jax/layers.py)` is replaced by
the source code of these objects, side by side. Where the page is read as plain Markdown, the links lead to the files.
"""

import ast
import html
import re
import textwrap
from pathlib import Path
from typing import Any

from latex2mathml import converter

ROOT = Path(__file__).parents[2]
LINK = r"\[([\w/]+\.py)::([\w.]+)\]\([^)]*\)"
INCLUDE = re.compile(rf"^{LINK}(?: \| {LINK})*$", re.MULTILINE)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def source_of(path: str, name: str) -> str:
    """The source code of a class, function, method (`Class.method`) or constant of a file.

    Raises:
        LookupError: the file defines no such name.
    """
    text = (ROOT / path).read_text()
    body: list[ast.stmt] = ast.parse(text).body
    node: ast.stmt | None = None
    for part in name.split("."):
        node = next((statement for statement in body if part in _names(statement)), None)
        if node is None:
            raise LookupError(f"{path} defines no {name}")
        body = getattr(node, "body", [])
    assert node is not None
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    return textwrap.dedent("\n".join(text.splitlines()[first - 1 : node.end_lineno]))


def _names(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def with_sources(markdown: str) -> str:
    """A page with every line of source links replaced by the code."""

    def code(line: re.Match[str]) -> str:
        links = re.findall(LINK, line[0])
        blocks = [f'```python title="{path}"\n{source_of(path, name)}\n```' for path, name in links]
        return "\n\n".join(['<div class="grid source" markdown>', *blocks, "</div>"])

    return INCLUDE.sub(code, markdown)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri == "contributing.md":  # its links start at the top of the repository
        return (ROOT / "CONTRIBUTING.md").read_text().replace("](docs/", "](")
    return with_sources(markdown)


def on_page_content(content: str, **_: Any) -> str:
    """The page's HTML, with its formulas as MathML, which browsers show without a script."""

    def mathml(found: re.Match[str]) -> str:
        return converter.convert(html.unescape(found[2]), display="block" if found[1] == "div" else "inline")

    return FORMULA.sub(mathml, content)
