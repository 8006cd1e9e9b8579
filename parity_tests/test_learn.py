"""The pages of docs/learn are true: their examples print what they show, their source lines and figures are current."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from parity_tests.conftest import ROOT

pytestmark = pytest.mark.extended

LEARN = ROOT / "docs" / "learn"
PAGES = {path.name: path.read_text() for path in sorted(LEARN.glob("*.md"))}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


sys.path.append(str(ROOT / "docs" / "tools"))  # scripts, not a package
import examples  # noqa: E402
import figures  # noqa: E402
import hooks  # noqa: E402


@pytest.fixture
def settings() -> Iterator[None]:
    """An example may switch JAX to 64 bits."""
    was_64_bit = jax.config.read("jax_enable_x64")
    yield
    jax.config.update("jax_enable_x64", was_64_bit)


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text])
def test_examples_print_what_the_page_shows(page: str, settings: None) -> None:
    n_shown = 0
    for block, printed in examples.run_blocks(PAGES[page]):
        if block["output"] is None:
            assert not printed, block["code"]
        else:
            assert examples.same_output(block["output"], printed), f"{block['code']}\nprints\n{printed}"
            n_shown += 1
    assert n_shown


def test_a_changed_output_is_noticed() -> None:
    assert examples.same_output("error 0.0100 of 12\n", "error 0.0101 of 12\n")
    assert not examples.same_output("error 0.0100 of 12\n", "error 0.0110 of 12\n")
    assert not examples.same_output("error 0.0100 of 12\n", "error 0.0100 in 12\n")
    assert not examples.same_output("0\n", "0 0\n")


@pytest.mark.parametrize("page", PAGES)
def test_source_is_included(page: str) -> None:
    """Every link to an object of a source file is replaced by its code; both frameworks stand side by side."""
    links = re.findall(hooks.LINK, PAGES[page])
    text = hooks.with_sources(PAGES[page])
    assert not re.findall(hooks.LINK, text), "a line with such a link has nothing else"
    for path, name in links:
        assert (ROOT / path).is_file()
        assert f"{name.split('.')[-1]}" in hooks.source_of(path, name)
        if path.startswith("minillm_jax/"):
            assert any(other.startswith("minillm_torch/") for other, _ in links), f"{name} only in JAX"


def test_source_of_a_missing_name() -> None:
    assert hooks.source_of("minillm_jax/layers.py", "RMSNorm.__call__").startswith("def __call__(self, x_BTD")
    assert hooks.source_of("minillm_core/training/checkpoints.py", "FRAMEWORKS").startswith("FRAMEWORKS = ")
    with pytest.raises(LookupError, match="defines no Nothing"):
        hooks.source_of("minillm_jax/layers.py", "Nothing")


def test_figures_are_current() -> None:
    """Drawn again, every figure has the same shapes and words; coordinates may differ in the last digits."""
    drawings = figures.FIGURES
    assert {f"{name}.svg" for name in drawings} == {path.name for path in (LEARN / "images").iterdir()}
    for name, draw in drawings.items():
        old, new = (LEARN / "images" / f"{name}.svg").read_text(), draw() + "\n"
        assert NUMBER.split(old) == NUMBER.split(new), f"{name}: run docs/tools/figures.py"
        pairs = zip(map(float, NUMBER.findall(old)), map(float, NUMBER.findall(new)), strict=True)
        assert all(abs(x - y) <= 0.02 for x, y in pairs), f"{name}: run docs/tools/figures.py"


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page: str) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", PAGES[page]):
        assert Path(LEARN / target).exists(), target


def test_every_page_has_its_parts() -> None:
    """A page of a module has shapes, code of both frameworks, an example, a figure, what breaks, and its test."""
    for page, text in PAGES.items():
        if page in ("index.md", "porting.md"):
            continue
        for part in ("## The shapes", "## The code", "## See it", "## What breaks if it is wrong", ".svg)", "`test_"):
            assert part in text, f"{page} lacks {part}"
        assert f"]({page})" in PAGES["index.md"], f"index.md does not lead to {page}"
