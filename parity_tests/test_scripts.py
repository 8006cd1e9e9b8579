"""The commands with real files, and the messages when something is wrong. Most run in this process; the processes of a
user are in the extended tests (here, test_docs.py, test_package.py)."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from minillm_core.config import DataConfig, OptimConfig, run_config_from_dict, to_dict
from minillm_core.errors import InputError
from minillm_core.interop import convert
from minillm_core.training import loop
from minillm_core.training.checkpoints import TrainingState, checkpoint_steps, read_info, verify_checkpoint
from minillm_core.training.metrics import losses_by_step, read_metrics
from parity_tests.commands import environment, fails, sampled, script_here, succeeds, succeeds_here
from parity_tests.conftest import (
    BACKENDS,
    PLOT_LOSS,
    ROOT,
    TINY,
    assert_same_bits,
    random_tokens,
    run_config,
    to_numpy,
    to_torch,
)

pytestmark = pytest.mark.extended

STEPS = 6


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A folder with tiny.yaml and a run that train_jax.py and train_torch.py trained from raw text."""
    folder = tmp_path_factory.mktemp("home")
    config = run_config(
        TINY,
        "runs/tiny",
        data=DataConfig(corpus=str(corpus), dir="data/tiny", holdout_every=5),
        optim=OptimConfig(learning_rate=3e-3, min_learning_rate=3e-4, warmup_steps=2),
        steps=STEPS,
        log_every=2,
        eval_every=4,
        checkpoint_every=3,
    )
    (folder / "tiny.yaml").write_text(yaml.safe_dump(to_dict(config)))
    for framework in BACKENDS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "plot_loss", PLOT_LOSS)
            done = succeeds_here(f"train_{framework}", "tiny.yaml", cwd=folder)
        assert ("prepared" if framework == "jax" else "found prepared data") in done.stderr
        assert sorted(corpus.iterdir())[4].read_text(encoding="utf-8").lstrip().startswith(sampled(done)), "held out"
        assert "python scripts/generate.py runs/tiny" in done.stderr
        assert re.search(r"step +6/6  loss .* token/s  0:00:00 left", done.stderr)
        assert "bits per byte" in done.stderr
    return folder


def test_both_write_the_same_files(home: Path) -> None:
    run = home / "runs" / "tiny"
    assert {path.name for path in run.glob("[!.]*")} == {"config.yaml", "run.json", "tokenizer.model", "jax", "torch"}
    for framework in BACKENDS:
        folder = run / framework
        assert {path.name for path in folder.iterdir()} == {"checkpoints", "metrics.jsonl", "loss.png"}
        assert checkpoint_steps(folder / "checkpoints") == [3, 6]
        assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
        for step in (3, 6):
            verify_checkpoint(folder / "checkpoints" / str(step))
        shared = {"checkpoint.json", "tokenizer.model", "manifest.json"}
        assert shared < {path.name for path in (folder / "checkpoints" / "6").iterdir()}


def test_same_curve(home: Path) -> None:
    rows = {name: read_metrics(home / "runs" / "tiny" / name / "metrics.jsonl") for name in BACKENDS}
    keys = [(row["step"], row["split"]) for row in rows["jax"]]
    assert keys == [(1, "train"), (2, "train"), (4, "train"), (4, "val"), (6, "train"), (6, "val")]
    for ours, theirs in zip(rows["jax"], rows["torch"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"split", "tokens_per_second"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (name, ours, theirs)
    assert rows["jax"][-1]["loss"] < rows["jax"][0]["loss"]


def test_compare_runs(home: Path, tmp_path: Path) -> None:
    done = script_here("compare_runs", "runs/tiny", "--out", str(tmp_path / "curves.png"), cwd=home)
    (train, val) = done.stdout.splitlines()
    assert train.startswith("train: 4 common steps, largest difference ")
    assert val.startswith("val: 2 common steps, largest difference ")
    losses = [losses_by_step(read_metrics(home / f"runs/tiny/{name}/metrics.jsonl"), "train") for name in BACKENDS]
    apart = {step: abs(loss - losses[1][step]) for step, loss in losses[0].items()}
    step = max(apart, key=lambda step: apart[step])
    assert train.endswith(f" difference {apart[step]:.3g} at step {step}")
    assert apart[step] <= 1e-4
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    shutil.copytree(home / "runs/tiny/jax", tmp_path / "copy")
    done = script_here(
        "compare_runs", "runs/tiny/jax", str(tmp_path / "copy"), "--out", str(tmp_path / "c.png"), cwd=home
    )
    assert "largest difference 0 at" in done.stdout
    assert done.stderr.startswith("6 rows are identical")  # and no warning from the plot
    assert done.stderr.endswith(f"converted checkpoint\ndrew {tmp_path / 'c.png'}\n")


@pytest.mark.extended
@pytest.mark.parametrize("framework", BACKENDS)
def test_finished_run_is_not_repeated(home: Path, framework: str) -> None:
    before = (home / "runs/tiny" / framework / "metrics.jsonl").read_bytes()
    done = succeeds(f"train_{framework}", "tiny.yaml", cwd=home)
    assert "found prepared data in data/tiny" in done.stderr
    assert "found the finished run" in done.stderr
    assert "6 of 6 steps done" in done.stderr
    sampled(done)
    assert (home / "runs/tiny" / framework / "metrics.jsonl").read_bytes() == before


def payload(checkpoint: Path, framework: str) -> TrainingState:
    return BACKENDS[framework].read_payload(checkpoint, read_info(checkpoint).config)


@pytest.mark.parametrize(("source", "target"), [("torch", "jax"), ("jax", "torch")])
def test_convert_round_trip(home: Path, source: str, target: str, tmp_path: Path) -> None:
    """There and back, weights and both moments are the same bits, and the converted model gives the same logits."""
    there, back = str(tmp_path / "there"), str(tmp_path / "back")
    done = succeeds_here("convert", f"{source}->{target}", "runs/tiny", there, cwd=home)
    assert "train" not in done.stderr  # the run is finished
    assert f"next: python scripts/generate.py {there} --backend {target}\n" in done.stderr
    converted = Path(done.stdout.strip())
    assert converted == Path(there) / target / "checkpoints" / str(STEPS)
    verify_checkpoint(converted)
    original = home / "runs/tiny" / source / "checkpoints" / str(STEPS)
    assert_same_bits(payload(original, source), payload(converted, target))
    assert_same_bits(payload(original, source), payload(convert(f"{target}-to-{source}", there, back).result, source))
    info, copy = read_info(original), read_info(converted)
    assert (copy.step, copy.config, copy.data_hashes, copy.converted_from) == (
        info.step,
        info.config,
        info.data_hashes,
        source,
    )
    tokens = random_tokens(TINY, 2, 300)
    models = {source: BACKENDS[source].load(original), target: BACKENDS[target].load(there)}
    logits = [to_numpy(models["jax"](jax.numpy.asarray(tokens))[0]), to_numpy(models["torch"](to_torch(tokens))[0])]
    assert np.abs(logits[0] - logits[1]).max() <= 5e-5


@pytest.mark.extended
def test_convert_without_paths_and_quotes(home: Path, tmp_path: Path) -> None:
    """`convert.py torch->jax` on the default run: the shell redirects stdout to `jax`, and nothing is overwritten."""
    folder = tmp_path / "runs" / "quickstart"
    shutil.copytree(home / "runs/tiny", folder)
    shutil.rmtree(folder / "jax")
    command = f"{sys.executable} {ROOT}/scripts/convert.py torch->jax"
    for again in (False, True):
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, capture_output=True, text=True, env=environment(), check=False
        )
        assert done.returncode == 0, done.stderr
        assert "quote it" in done.stderr
        assert "removed the empty file `jax`" in done.stderr
        assert ("already converted" in done.stderr) == again
        assert done.stderr.endswith("runs/quickstart/jax/checkpoints/6\n"), "no result on stderr"
        assert not (tmp_path / "jax").exists()
    (tmp_path / "jax").write_text("notes")
    os.utime(tmp_path / "jax", (1e9, 1e9))
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, text=True, env=environment(), check=True
    )
    assert "your file `jax` existed before" in done.stderr
    assert (tmp_path / "jax").read_text() == ""
    assert_same_bits(payload(folder / "torch/checkpoints/6", "torch"), payload(folder / "jax/checkpoints/6", "jax"))


def test_convert_keeps_an_existing_run(home: Path) -> None:
    """The run was trained in both frameworks, so the converted checkpoint goes to a directory next to it."""
    before = (home / "runs/tiny/jax/checkpoints/6/manifest.json").read_bytes()
    done = succeeds_here("convert", "torch->jax", "runs/tiny", cwd=home)
    assert done.stdout.strip() == "runs/tiny-from-torch/jax/checkpoints/6"
    assert (home / "runs/tiny/jax/checkpoints/6/manifest.json").read_bytes() == before
    fails("holds a different checkpoint of this step", "convert", "torch->jax", "runs/tiny", "runs/tiny", cwd=home)


def test_an_export_has_the_loss_curve(home: Path, tmp_path: Path) -> None:
    folder = convert("torch->hf", home / "runs/tiny", tmp_path / "out").result
    assert (folder / "loss.png").read_bytes() == (home / "runs/tiny/torch/loss.png").read_bytes()
    assert "(loss.png)" in (folder / "README.md").read_text()


def test_generated_text_is_the_same(home: Path) -> None:
    convert("torch->jax", home / "runs/tiny", home / "runs/same")
    options = ("--prompt", "We the people", "--max-new-tokens", "40", "--seed", "5", "--top-k", "50", "--top-p", "0.9")
    texts = [
        succeeds_here("generate", path, "--backend", framework, *options, cwd=home).stdout
        for framework, path in (("torch", "runs/tiny"), ("jax", "runs/same"))
    ]
    assert texts[0] == texts[1]
    assert texts[0].startswith("We the people")
    assert len(texts[0]) > 30


@pytest.mark.parametrize("framework", BACKENDS)
def test_evaluate_repeats_the_final_evaluation(home: Path, framework: str) -> None:
    done = succeeds_here("evaluate", "runs/tiny", "--backend", framework, cwd=home)
    values = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()}
    last = read_metrics(home / "runs/tiny" / framework / "metrics.jsonl")[-1]
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert values[name] == pytest.approx(last[name], rel=1e-5)
    options = ("--backend", framework, "--split", "train", "--seq-len", "16")
    train = script_here("evaluate", "runs/tiny", *options, cwd=home)
    assert train.returncode == 0, train.stderr
    assert train.stdout != done.stdout


def test_prepare_data_reuses_existing_data(home: Path) -> None:
    done = script_here("prepare_data", "tiny.yaml", cwd=home)
    assert done.returncode == 0, done.stderr
    assert "found" in done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_plan(home: Path) -> None:
    done = succeeds_here("plan", "mini-llm-50m", cwd=home)  # every preset: test_docs.py, test_params.py
    assert "50,049,408" in done.stdout
    assert "agree with: jax, torch" in done.stdout


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"no such configuration: quickstrat.*quickstart", ["train_jax", "quickstrat"]),
        (r"train\.step", ["train_jax", "tiny.yaml", "--train.step", "3"]),
        (
            r"belongs to a different configuration.*optim\.weight_decay: 0\.2, was 0\.1",
            ["train_torch", "tiny.yaml", "--optim.weight_decay", "0.2"],
        ),
        (r"not empty and not a run directory.*data", ["train_jax", "tiny.yaml", "--train.out_dir", "data"]),
        (
            r"vocabulary size.*expected: 600.*found: 512",
            ["train_torch", "tiny.yaml", "--model.vocab-size", "600", "--train.out_dir", "runs/new"],
        ),
        (  # before any data is prepared
            r"different configuration.*model\.vocab_size: 600, was 512",
            ["train_torch", "tiny.yaml", "--model.vocab-size", "600", "--data.dir", "data/new"],
        ),
        (r"no jax checkpoint.*train first", ["generate", "runs/nothing"]),
        (r"a torch checkpoint where.*convert\.py 'torch->jax'", ["generate", "runs/tiny/torch/checkpoints/6"]),
        (r"longer than the context.*at most 320", ["generate", "runs/tiny", "--prompt", "word " * 900]),
        (r"temperature is out of range.*-1", ["generate", "runs/tiny", "--temperature", "-1"]),
        (r"unknown conversion.*'torch->hx'", ["convert", "torch->hx"]),
        (r"no torch checkpoint.*where: runs/quickstart", ["convert", "torch->jax"]),
        (r"to jax does not round.*bfloat16", ["convert", "hf->jax", "x", "y", "--dtype", "bfloat16"]),
        (r"the output is a folder.*where: runs", ["parity", "runs/tiny", "runs/tiny", "--html", "runs"]),
        (r"not a folder of prepared data.*choose a different", ["evaluate", "runs/tiny", "--data-dir", "runs"]),
        (r"not a folder of prepared data.*check the path", ["evaluate", "runs/tiny", "--data-dir", "none"]),
        (r"no such file or folder.*where: none\.gguf", ["convert", "hf->jax", "none.gguf", "runs/new"]),
        (r"of the steps: 3, 6\n.*name one of these", ["generate", "runs/tiny/jax/checkpoints/4"]),
        (r"no such configuration: quickstrat.*did you mean quickstart\?", ["plan", "tiny.yaml", "quickstrat"]),
        (r"did you mean --prompt 'My fellow citizens'", ["generate", "My fellow citizens"]),
        (r"no metrics found.*where: data/jax", ["compare_runs", "data"]),
        (r"both folders are the same", ["compare_runs", "runs/tiny/jax", "runs/tiny/jax"]),
    ],
)
def test_bad_arguments(home: Path, message: str, arguments: list[str]) -> None:
    fails(message, *arguments, cwd=home)
    assert not (home / "data/new").exists()


@pytest.mark.parametrize("framework", BACKENDS)
def test_damaged_checkpoints_are_named(home: Path, framework: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(home / "runs/tiny", run)
    checkpoint = run / framework / "checkpoints" / "6"
    victim = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    name = victim.relative_to(checkpoint).as_posix()
    with pytest.raises(InputError, match=f"(?s)damaged checkpoint.*content changed: {name}"):
        BACKENDS[framework].load(checkpoint)
    for target in ("jax" if framework == "torch" else "torch", "hf", "gguf"):
        with pytest.raises(InputError, match=f"(?s)damaged checkpoint.*content changed: {name}"):
            convert(f"{framework}->{target}", checkpoint, tmp_path / target)
        assert not (tmp_path / target).exists()
    victim.write_bytes(content[:-1])
    with pytest.raises(InputError, match=f"size: {name}"):
        BACKENDS[framework].load(checkpoint)
    victim.unlink()
    with pytest.raises(InputError, match=f"missing: {name}"):
        BACKENDS[framework].load(checkpoint)


@pytest.mark.parametrize("framework", BACKENDS)
def test_checkpoint_with_mismatched_shapes(home: Path, framework: str, tmp_path: Path) -> None:
    """One message names every mismatched tensor."""
    config = read_info(home / "runs/tiny" / framework / "checkpoints/6").config
    wrong = to_dict(config)
    wrong["model"] |= {"hidden": 80, "n_layers": 3}
    with pytest.raises(InputError) as error:
        BACKENDS[framework].read_payload(
            home / "runs/tiny" / framework / "checkpoints/6", run_config_from_dict(wrong, "test")
        )
    assert "15 tensor(s) do not fit" in str(error.value)
    assert "model.layers.1.mlp.down_proj.weight: expected (48, 80), found (48, 96)" in str(error.value)
    assert "missing: model.layers.2.self_attn.q_proj.weight" in str(error.value)


def test_newer_run_is_refused(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "runs/tiny/run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"format_version": 2, "version": "9.9"}))
    saved = path.with_name("config.yaml").read_text()
    path.with_name("config.yaml").write_text(saved + "new_section: {}\n")  # which this version cannot read
    message = r"written by a different version.*format 1.*format 2, written by version 9\.9"
    fails(message, "train_torch", "tiny.yaml", cwd=tmp_path)
    path.with_name("config.yaml").write_text(saved)
    hashes = record["data_hashes"] | {"tokenizer": "0" * 64, "val": "1" * 64}
    path.write_text(json.dumps(record | {"data_hashes": hashes}))
    message = r"uses a different tokenizer and a different held-out text.*expected: tokenizer 0000"
    fails(message, "train_jax", "tiny.yaml", cwd=tmp_path)
    path.write_text("{}")
    fails(r"damaged file of the run.*run\.json", "train_jax", "tiny.yaml", cwd=tmp_path)


def test_changed_data_is_refused(home: Path, tmp_path: Path) -> None:
    """One token of the prepared data was changed."""
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "data/tiny/train-00000.bin"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    fails(r"changed after it was prepared.*train-00000\.bin", "train_torch", "tiny.yaml", cwd=tmp_path)


def test_formats_of_other_versions(home: Path, tmp_path: Path) -> None:
    """A version before `updates` applied every update. A newer format is refused."""
    checkpoint = tmp_path / "6"
    shutil.copytree(home / "runs/tiny/torch/checkpoints/6", checkpoint)
    data = json.loads((checkpoint / "checkpoint.json").read_text())
    older = {key: value for key, value in data.items() if key != "updates"}
    (checkpoint / "checkpoint.json").write_text(json.dumps(older))
    assert read_info(checkpoint).updates == 6
    (checkpoint / "checkpoint.json").write_text(json.dumps(data | {"format_version": 99, "version": "9.9"}))
    with pytest.raises(InputError, match=r"(?s)different format version.*found: 99, written by version 9\.9"):
        read_info(checkpoint)


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize("dtype", ["int8", "foo"])
def test_unknown_dtype_is_refused(home: Path, framework: str, dtype: str) -> None:
    with pytest.raises(InputError, match=r"(?s)unknown dtype.*float32, bfloat16, float64.*found: '" + dtype):
        BACKENDS[framework].load(home / "runs/tiny", dtype=dtype)


def test_nothing_to_convert(home: Path, tmp_path: Path) -> None:
    """The advice is not to convert in the opposite direction first."""
    shutil.copytree(home / "runs/tiny/jax", tmp_path / "run/jax")
    with pytest.raises(InputError, match=r"(?s)only jax checkpoints.*train in torch first") as raised:
        convert("torch->jax", tmp_path / "run")
    assert raised.value.command == ()


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_load_with_given_dtype(home: Path, framework: str, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        model = BACKENDS[framework].load(home / "runs/tiny", dtype=dtype)
        tokens = random_tokens(TINY, 1, 20)
        logits, _ = model(jax.numpy.asarray(tokens) if framework == "jax" else to_torch(tokens))
    assert str(logits.dtype).removeprefix("torch.") == dtype
    assert model.config == TINY


@pytest.mark.extended
@pytest.mark.parametrize("command", [["train_torch"], ["generate", "--backend", "torch"]], ids=["train", "generate"])
def test_without_torch(command: list[str], home: Path, tmp_path: Path) -> None:
    """If only JAX is installed, asking for torch gives a message that says what to install."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    path = str(ROOT / "scripts" / f"{command[0]}.py")
    done = subprocess.run(
        [sys.executable, path, *command[1:]],
        cwd=home,
        capture_output=True,
        text=True,
        env=environment() | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "the package `torch` is not installed" in done.stderr
    assert "pip install" in done.stderr
