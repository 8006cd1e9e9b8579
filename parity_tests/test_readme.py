"""What the README shows is what happens: its commands at a tiny size, its Python, its numbers."""

import re
import shlex
from pathlib import Path

import pytest

from minillm_core.config import load_config, preset_names
from minillm_core.model.params import count_params
from parity_tests.conftest import ROOT
from parity_tests.test_scripts import STEPS, succeeds

README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for line in re.findall(r"^python scripts/.*$", README, re.MULTILINE)]
TINY_MODEL = [
    "--model.vocab_size",
    "512",
    "--model.context_length",
    "320",
    "--model.width",
    "32",
    "--model.n_layers",
    "1",
    "--model.n_heads",
    "2",
    "--model.n_kv_heads",
    "1",
    "--model.head_dim",
    "16",
    "--model.hidden",
    "48",
    "--optim.warmup_steps",
    "1",
]


def tiny(script: str, arguments: list[str], corpus: Path) -> list[str]:
    """The README's arguments, and then those that make the model, the data and the run small."""
    arguments = [str(corpus) if argument == "FOLDER" else argument for argument in arguments]
    if script.startswith("train_") or script == "prepare_data":
        given = {argument for argument in arguments if argument.startswith("--")}
        sizes = {
            "--data.corpus": str(corpus),
            "--data.dir": "data/tiny",
            "--data.holdout_every": "5",
            "--train.steps": str(STEPS),
            "--train.batch_size": "4",
            "--train.grad_accum": "2",
            "--train.seq_len": "16",
        }
        if "--train.steps" in given:
            arguments[arguments.index("--train.steps") + 1] = str(STEPS)
        arguments += TINY_MODEL + [word for key, value in sizes.items() if key not in given for word in (key, value)]
    if script == "generate":
        arguments += ["--max-new-tokens", "20"]
    if script == "benchmark_decoding":
        arguments += ["quickstart", "--tokens", "4", "--rounds", "1", "--batches", "2"]
    if script == "benchmark":
        arguments += [*TINY_MODEL, "--data.dir", "data/tiny", "--data.corpus", str(corpus), "--data.holdout_every", "5"]
        arguments += ["--steps", "2", "--tokens", "32", "--train.seq_len", "16"]
    return arguments


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    (folder / "prompts.txt").write_text("We the People\nMy fellow citizens,\n")
    return folder


def test_the_list_is_complete() -> None:
    shown = {Path(shlex.split(command)[1]).stem for command in COMMANDS}
    assert shown == {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"backends", "transformers_engine"}


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=[pytest.mark.long] if "benchmark" in c else []) for c in COMMANDS]
)
def test_commands(command: str, home: Path, corpus: Path) -> None:
    """In the README's order, in one folder."""
    _, path, *arguments = shlex.split(command)
    script = Path(path).stem
    done = succeeds(script, *tiny(script, arguments, corpus), cwd=home)
    assert done.stdout.strip() or done.stderr.strip()


def test_python(home: Path) -> None:
    """The README's Python, on the run that its commands made."""
    block = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    code = f"import os\nos.chdir({str(home)!r})\n{block}"
    code = code.replace("max_new_tokens=50", "max_new_tokens=5")
    namespace: dict[str, object] = {}
    exec(code, namespace)
    assert namespace["logits_BTV"].shape == (1, 3, 512)


@pytest.mark.parametrize("preset", preset_names())
def test_presets_are_listed_with_their_size(preset: str) -> None:
    row = next(line for line in README.splitlines() if line.startswith("| ") and f"`{preset}`" in line)
    assert f"{count_params(load_config(preset).model):,}" in row
