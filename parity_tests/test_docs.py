"""The README and the documentation are true: their commands (at a tiny size), Python, numbers and named tests."""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from minillm_core.config import load_config, preset_names
from minillm_core.decoding.prompts import read_prompts
from minillm_core.interop.gguf import open_gguf
from minillm_core.interop.hf import open_hf
from minillm_core.model.params import count_params, param_table
from minillm_core.text.tokenizer_json import load_tokenizer
from minillm_core.training.checkpoints import verify_checkpoint
from minillm_core.training.metrics import read_metrics
from parity_tests.commands import environment, sampled, succeeds
from parity_tests.conftest import BACKENDS, ROOT
from parity_tests.server import serving
from parity_tests.test_scripts import STEPS

Done = subprocess.CompletedProcess[str]
PAGES = {"README.md": (ROOT / "README.md").read_text()}
PAGES |= {str(path.relative_to(ROOT / "docs")): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}
TINY_MODEL = shlex.split(
    "--model.vocab_size 512 --model.context_length 320 --model.width 32 --model.n_layers 1 --model.n_heads 2 "
    "--model.n_kv_heads 1 --model.head_dim 16 --model.hidden 48 --optim.warmup_steps 1"
)

ONLY_SCRIPTS = {"benchmark_data", "benchmark_serving"}
"""They are no commands of `minillm`."""


def commands_of(page: str) -> list[str]:
    """The commands of a page, without comments."""
    lines = re.findall(r"^python scripts/.*$", PAGES[page], re.MULTILINE)
    return [shlex.join(shlex.split(line, comments=True)) for line in lines]


def tiny(script: str, arguments: list[str], corpus: Path) -> list[str]:
    """The arguments of a command, plus those that make the model, the data and the run small."""
    arguments = [str(corpus) if argument == "FOLDER" else argument for argument in arguments]
    if script in ("train_jax", "train_torch") or (script == "prepare_data" and "--out" not in arguments):
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
    if script == "benchmark_serving":
        arguments += ["--rounds", "1", "--seconds", "2", "--streams", "4", "--max-tokens", "16", "--max-batch", "2"]
    if script == "benchmark_data":
        arguments += ["--rounds", "1"]
    if script == "benchmark":
        arguments = ["quickstart", *arguments, "--rounds", "1", "--seq-len", "32"]
        arguments += ["--tokens", "4", "--decode-rows", "2"]
    return arguments


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    (folder / "prompts.txt").write_text("We the People\nMy fellow citizens,\n")
    return folder


def test_command_list_is_complete() -> None:
    """docs/commands.md has every script, and everything that the README shows."""
    commands = commands_of("commands.md")
    assert {Path(shlex.split(command)[1]).stem for command in commands} == {
        path.stem for path in (ROOT / "scripts").glob("*.py")
    }
    assert set(commands_of("README.md")) <= {*commands}


def check_train(run: Path, framework: str, done: Done) -> None:
    verify_checkpoint(run / framework / "checkpoints" / str(STEPS))
    BACKENDS[framework].load(run / framework)
    assert re.search(rf"step +{STEPS}/{STEPS}  loss [\d.]+ ", done.stderr)
    assert [row["split"] for row in read_metrics(run / framework / "metrics.jsonl")][-1] == "val"
    sampled(done)


def check_convert(direction: str, result: Path) -> None:
    """The path on stdout is a checkpoint of the format, with all tensors and a tokenizer."""
    target = direction.split("->")[1]
    if target in BACKENDS:
        verify_checkpoint(result)
        assert BACKENDS[target].load(result).config.vocab_size == load_tokenizer(result, 512).vocab_size
    else:
        opened = {"hf": open_hf, "gguf": open_gguf}[target](result)
        assert {name for name, _ in opened.tensors()} == param_table(opened.config).keys()


def check_generate(home: Path, options: dict[str, str], done: Done) -> None:
    if "--prompt" in options:
        assert done.stdout.startswith(options["--prompt"])
        assert len(done.stdout.strip()) > len(options["--prompt"])
    else:
        rows = [json.loads(line) for line in (home / options["--output"]).read_text().splitlines()]
        assert [row["prompt"] for row in rows] == read_prompts(home / options["--prompts"])[0]
        assert {len(row["completions"]) for row in rows} == {int(options["--n"])}


def check_result(script: str, arguments: list[str], home: Path, done: Done) -> None:
    """What a command must have printed and written."""
    options = {word: value for word, value in pairwise([*arguments, ""]) if word.startswith("--")}
    out = done.stdout
    match "tokenizer" if script == "train_tokenizer" else script.split("_")[0]:
        case "inspect":
            assert "all files are intact" in out
        case "tokenizer":
            assert out == "my.model: 1000 pieces\n"
        case "train":
            check_train(home / options.get("--train.out_dir", "runs/quickstart"), script.split("_")[1], done)
        case "compare":
            assert float(re.findall(r"^train: \d+ common steps, largest difference (\S+)", out, re.M)[0]) <= 1e-4
            assert (home / "curves.png").read_bytes().startswith(b"\x89PNG")
        case "plot":
            assert (home / out.strip()).read_bytes().startswith(b"\x89PNG")
        case "publish":
            check_convert("jax->hf", home / out.strip())
            last = read_metrics(home / "runs/quickstart/jax/metrics.jsonl")[-1]
            card = (home / out.strip() / "README.md").read_text()
            value = float(re.findall(r"^\| bits per byte \| (\S+) \|$", card, re.M)[0])
            assert value == pytest.approx(last["bits_per_byte"], rel=1e-5)
        case "convert":
            check_convert(arguments[0], home / out.strip())
        case "parity":
            assert "\nEQUAL within" in out
        case "chat":
            assert out.endswith("\n")
            assert len(out) > 1
        case "generate":
            check_generate(home, options, done)
        case "evaluate":
            last = read_metrics(home / "runs/quickstart" / options["--backend"] / "metrics.jsonl")[-1]
            values = {line.split()[0]: float(line.split()[1]) for line in out.splitlines()}
            assert values["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-5)
        case "prepare":
            found = re.findall(r"^(\S+), (train|val): (\d+) tokens of \d+ bytes$", out, re.M)
            assert [split for _, split, _ in found] == ["train", "val"]
            for folder, split, n_tokens in found:
                assert (home / folder / f"{split}-00000.bin").stat().st_size == 2 * int(n_tokens)
        case "plan":
            assert "agree with: jax, torch" in out
            for preset in preset_names():
                assert re.search(rf"^{preset} +{count_params(load_config(preset).model):,} ", out, re.M), preset
        case "benchmark":
            expected = {
                "": "| jax | ",
                "_data": "| minillm | ",
                "_serving": " 0 differ ",
            }
            assert expected[script.removeprefix("benchmark")] in out
        case _:
            pytest.fail(f"no check of {script}")


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(c, marks=pytest.mark.long if "benchmark" in c else pytest.mark.extended)
        for c in commands_of("commands.md")
    ],
)
def test_commands(command: str, home: Path, corpus: Path) -> None:
    """The commands run in the order of docs/commands.md, in one folder."""
    _, path, *arguments = shlex.split(command)
    script = Path(path).stem
    arguments = tiny(script, arguments, corpus)
    if script == "benchmark_data" and not (home / "my.model").exists():  # in a tier of its own
        succeeds("train_tokenizer", str(corpus), "--out", "my.model", "--vocab-size", "1000", cwd=home)
    if script == "benchmark_serving" and not (home / "runs/quickstart/jax").exists():
        succeeds("train_jax", *tiny("train_jax", ["--train.out_dir", "runs/quickstart"], corpus), cwd=home)
    if script == "serve":  # it runs until it is stopped
        with serving(home / arguments[0], *arguments[1:]) as server:
            assert "playground" in server.client.get("/").text
        return
    stdin = ""
    if script == "chat":  # the imported model has no chat format of its own
        stdin, (path,) = "Hello\n/exit\n", (home / arguments[0]).glob("*/checkpoints/*")
        (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    done = succeeds(script, *arguments, cwd=home, stdin=stdin)
    check_result(script, arguments, home, done)


@pytest.mark.extended
@pytest.mark.parametrize("script", sorted({path.stem for path in (ROOT / "scripts").glob("*.py")} - ONLY_SCRIPTS))
def test_options_exist(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """If a page shows an option of a script, the option is in the help of the script."""
    module = {"train_jax": "train", "train_torch": "train", "prepare_data": "prepare"}.get(script, script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        importlib.import_module(f"minillm_cli.{module}").main()
    known = {*re.findall(r"--[\w.-]+", capsys.readouterr().out.replace("_", "-"))}
    for page in PAGES:
        for command in commands_of(page):
            _, path, *arguments = shlex.split(command)
            if Path(path).stem == script:
                options = [word.replace("_", "-") for word in arguments if word.startswith("--")]
                assert not [option for option in options if option not in known], f"{page}: {command}"


@pytest.mark.extended
def test_python(home: Path, tmp_path: Path) -> None:
    """The Python of the pages, on the run that the commands made, in one process."""
    for name, target in {
        "runs/quickstart": "runs/quickstart",
        "DOWNLOADED": "exported",
        "exported": "exported",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(home / target)
    (tmp_path / "data").symlink_to(home / "data")
    # The others are in test_learn.py and test_serve_docs.py.
    pages = [text for page, text in PAGES.items() if not page.startswith("learn/") and page != "serving.md"]
    blocks = [block for text in pages for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    complete = [block for block in blocks if "import " in block]  # the other one is a function of a class of the doctor
    assert len(complete) == len(blocks) - 1 >= 8
    code = "\n".join([*complete, "assert logits_BTV.shape == (1, 3, 512)", "assert report.equal"])
    code = code.replace("max_new_tokens=50", "max_new_tokens=5")
    code = code.replace('load_config("quickstart")', 'load_config("runs/quickstart/config.yaml")')  # the tiny run
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=environment(), timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("preset", preset_names())
def test_presets_are_listed_with_their_size(preset: str) -> None:
    lines = PAGES["performance.md"].splitlines()
    row = next(line for line in lines if line.startswith("| ") and f"`{preset}`" in line)
    assert f"{count_params(load_config(preset).model):,}" in row


@pytest.mark.parametrize("page", PAGES)
def test_named_tests_exist(page: str) -> None:
    """Every test that a page names exists."""
    missing = []
    for file, name in re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", PAGES[page]):
        path = ROOT / "parity_tests" / file
        tests = (
            [node.name for node in ast.parse(path.read_text()).body if hasattr(node, "name")] if path.is_file() else []
        )
        if not tests or (name and name not in tests):
            missing.append(f"{file}::{name}")
    assert not missing


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if re.search(r"^\|.*\| test \|$", text, re.M)])
def test_every_promise_names_its_test(page: str) -> None:
    """In each table whose last column is `test`, every row names a test."""
    in_table = False
    n_rows = 0
    for line in PAGES[page].splitlines():
        if re.match(r"^\|.*\| test \|$", line):
            in_table = True
        elif not line.startswith("|"):
            in_table = False
        elif in_table and not re.fullmatch(r"[|\- :]+", line):
            n_rows += 1
            assert re.search(r"`test_\w+\.py", line), line
    assert n_rows


def test_the_readme_is_a_landing_page() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150
