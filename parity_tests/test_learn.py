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
    assert examples.same_output("error 0.0100 of 12, 1.5e-07\n", "error 0.0102 of 12, 1.4e-07\n")
    for shown, printed in [
        ("error 0.0100 of 12", "error 0.0103 of 12"),
        ("error 0.0100 of 12", "error 0.0100 in 12"),
        ("0", "0 0"),
        ("50,049,408", "50,049,409"),
        ("[1500, 629]", "[1501, 629]"),
        ("[1.0, 256.0, 1000.0]", "[0.9994000196456909, 257.0, 1001.0]"),
        ("-9.005375", "-9.005371"),
        ("1.5e-07", "1.5e-08"),
    ]:
        assert not examples.same_output(shown, printed), (shown, printed)


@pytest.mark.parametrize("page", PAGES)
def test_source_is_included(page: str) -> None:
    """Every link to an object of a source file is replaced by its code. In each line, the same object of the other
    framework stands beside one of a framework."""
    links = re.findall(hooks.LINK, PAGES[page])
    for line in hooks.INCLUDE.finditer(PAGES[page]):
        beside: dict[str, list[tuple[str, str]]] = {"minillm_jax": [], "minillm_torch": [], "minillm_core": []}
        for path, name in re.findall(hooks.LINK, line[0]):
            package, _, file = path.partition("/")
            name = name.replace("__call__", "forward").replace("jit_train_step", "make_train_step")
            beside.setdefault(package, []).append((file, name))
        if "precision_of" not in line[0]:  # TF32 is switched off in different ways
            assert beside["minillm_jax"] == beside["minillm_torch"], line[0]
    text = hooks.with_sources(PAGES[page])
    assert not re.findall(hooks.LINK, text), "a line with such a link has nothing else"
    for path, name in links:
        assert (ROOT / path).is_file()
        assert hooks.source_of(path, name) in text


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
