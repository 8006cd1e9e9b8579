"""`minillm benchmark`: bounds, report, JSON, the comparison with an earlier run, what is refused, and planted faults:
engines that compute a different loss, or fail."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minillm_cli.benchmark import command, scaling
from minillm_cli.benchmark.cases import Bounds, Case, decode_step, least_seconds, total, train_case
from minillm_cli.benchmark.compare import changes, fallen, require_comparable
from minillm_cli.benchmark.engines import DOES, OURS, PEERS
from minillm_cli.benchmark.measure import different_losses
from minillm_cli.benchmark.options import Options
from minillm_cli.benchmark.report import report
from minillm_cli.benchmark.results import Results, Row
from minillm_core.config import ModelConfig, RunConfig, dump_config, load_config
from minillm_core.errors import InputError
from minillm_core.model.params import count_params, training_flops_per_token
from parity_tests.commands import environment, fails
from parity_tests.conftest import ROOT

MODEL = ModelConfig(
    vocab_size=256, context_length=128, width=32, n_layers=2, n_heads=2, n_kv_heads=1, hidden=64, tie_embeddings=False
)
SMALL = ("--rounds", "1", "--seq-len", "16", "--tokens", "4", "--prompt", "8", "--decode-rows", "1", "3")
CASES = ("train, 2 x 16", "prefill, 1 x 16", "decode, 1 row, 4 after 8", "decode, 3 rows, 4 after 8")


def small_config() -> RunConfig:
    quickstart = load_config("quickstart")
    return replace(quickstart, model=MODEL, train=replace(quickstart.train, seq_len=16, batch_size=2))


@pytest.fixture
def preset(tmp_path: Path) -> str:
    (tmp_path / "small.yaml").write_text(dump_config(small_config()))
    return "small.yaml"


def some_results(config: RunConfig | None = None) -> Results:
    """Every engine at every work that it does; each engine is slower than the one before."""
    config = config or small_config()
    cases = Options(seq_len=16, tokens=4, prompt=8, decode_rows=(1, 3)).cases(config, on_gpu=False)
    about = {"device": "a CPU", "cores": 2, "dtype": "float32", "config": {"model": vars(config.model)}}
    about |= {"devices": {"llama.cpp": "an abacus"}}
    about |= {"preset": "small", "versions": {"jax": "1"}, "date": "today", "python": "3", "system": "Linux"}
    about |= {"command": "minillm benchmark", "minillm": "0", "n_params": 1, "rounds": 3}
    results = Results(about, PEERS, complete=True)
    results.see("jax", 2e11, 1e10)
    results.see("torch", 1e11, 3e10)
    for case in cases:
        for n, (engine, works) in enumerate(DOES.items(), 1):
            if case.work in works:
                seconds = [n * second for second in (1.0, 1.5, 1.1)]
                results.rows.append(Row(case, engine, seconds, 10**9, 5.5 if case.work == "train" else None))
    return results


def test_costs_of_a_round() -> None:
    """The bounds of a work, from operations and bytes that are counted by hand here."""
    config = small_config()
    train = train_case(config, "float32", 2, 16, 1, 3)
    assert total(train).flops == 3 * 2 * 16 * training_flops_per_token(MODEL, 16)
    assert total(train).bytes == 3 * count_params(MODEL) * (2 * 4 + 4 + 7 * 4)
    per_layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64  # q, k and v, o; gate, up and down
    matrices, cached = 2 * per_layer + 256 * 32, 2 * 2 * 16
    step = decode_step(MODEL, 3, 10, 2)
    assert step.bytes == 2 * (matrices + 3 * 10 * cached)
    assert step.flops == 3 * (2 * matrices + 4 * 2 * 32 * 10)
    assert least_seconds(train, Bounds(flops=total(train).flops / 7, bandwidth=1e30)) == (7, "compute")
    assert least_seconds(train, Bounds(flops=1e30, bandwidth=total(train).bytes / 9)) == (9, "memory")
    assert Case.from_json(json.loads(json.dumps(train.to_json()))) == train
    assert [Case("decode", config, "float32", 4, 8, 4).lengths(), train.tokens_per_round] == [[2, 6, 11, 16], 96]


def test_report_has_every_row() -> None:
    results = some_results()
    text, data = report(results), json.loads(results.to_json())
    assert "llama.cpp computes on an abacus" in text
    for case in CASES:
        for engine, works in DOES.items():
            assert (f"| {case} | {engine} | " in text) == (case.split(",")[0] in works), (case, engine)
    assert text.count("| times transformers |") == 3
    assert text.count("| times llama.cpp |") == 2  # not for training
    assert data == results.as_dict()
    rows = {(row["case"], row["engine"]): row for row in data["rows"]}
    assert len(rows) == len(results.rows) == 3 + 4 + 2 * 5
    jax, peer = rows[CASES[0], "jax"], rows[CASES[0], "transformers"]
    assert jax["ratios"] == {"transformers": pytest.approx(4)}
    assert jax["rate"] / peer["rate"] == pytest.approx(4)
    assert jax["share"] == pytest.approx(jax["rate"] / jax["bound"])
    bound = Bounds(2e11, 3e10)  # of each the larger one
    assert rows[CASES[2], "torch"]["bound"] == pytest.approx(4 / least_seconds(results.cases()[2], bound)[0])


def test_an_earlier_run_is_compared() -> None:
    """The same numbers pass; a row that became slower is named; a peer's speed is nobody's loss."""
    then = some_results().as_dict()
    compared = changes(then, some_results().as_dict())
    assert {c["change"] for c in compared} == {1.0}
    assert {c["engine"] for c in compared} == {*OURS}
    assert fallen(compared, 0.0) == []
    later = some_results()
    for row in later.rows:
        if (row.case.name, row.engine) == (CASES[1], "torch") or row.engine == "llama.cpp":
            row.seconds = [1.2 * seconds for seconds in row.seconds]
    compared = changes(then, later.as_dict())
    (share, ratio) = fallen(compared, 0.1)
    assert share.startswith(f"{CASES[1]}, torch: share of the bound ")
    assert share.endswith("(-17%)")
    assert ratio.startswith(f"{CASES[1]}, torch: times transformers ")
    assert fallen(compared, 0.2) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("device", "a GPU"), ("cores", 64), ("dtype", "bfloat16"), ("model", replace(MODEL, hidden=96))],
)
def test_other_machines_and_models_are_not_compared(field: str, value: Any) -> None:
    now = some_results().as_dict()
    then = {**now, field: value} if field != "model" else {**now, "config": {"model": vars(value)}}
    require_comparable(now, now, "there")
    with pytest.raises(InputError, match=rf"(?s)cannot be compared.*{field}.*there"):
        require_comparable(then, now, "there")


def test_different_losses_are_named() -> None:
    rows = some_results().of(some_results().cases()[0])
    assert different_losses(rows) == []
    for wrong in (5.501, float("nan")):
        problems = different_losses([rows[0], replace(rows[1], loss=wrong), rows[2]])
        assert len(problems) == 1
        assert f"torch ({wrong:.6f})" in problems[0]


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("unknown work.*expected: train, prefill, decode.*'trian'.*did you mean train", "--works trian"),
        ("unknown engine.*expected: jax, torch.*'tensorflow'", "--engines tensorflow"),
        ("unknown peer.*expected: transformers, llama.cpp.*'llama'", "--peers llama"),
        ("same engine is given twice", "--engines jax jax"),
        ("no engine for the work train.*expected: one or more of jax, torch", "--engines torch-compiled"),
        ("nothing to measure", "--works"),
        ("--rounds is out of range.*1 or more.*found: 0", "--rounds 0"),
        ("--decode-rows is out of range", "--decode-rows 1 -3"),
        ("--seq-len is out of range.*at most 128", "--seq-len 129"),
        ("--tolerance is out of range", "--tolerance 1.5"),
        ("--out is a file.*where: file", "--out file"),
        ("--out has other files.*report.md", "--out mine"),
        ("--against is not a file.*found: nothing.*nowhere.json", "--against nowhere.json"),
        ("--against is not a file.*found: a folder", "--against mine"),
        ("not JSON, or damaged.*where: file", "--against file"),
        ("not the results of a benchmark", "--against foreign.json"),
        ("a different version.*version 99", "--against newer.json"),
        (r"results are damaged.*device.*rows\[0\].*rows\[1\]", "--against damaged.json"),
        ("results are not complete", "--against half.json"),
    ],
)
def test_bad_options_are_refused(message: str, arguments: str, preset: str, tmp_path: Path) -> None:
    """Before anything is measured or changed."""
    good = some_results().as_dict()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/report.md").write_text("my own report")
    (tmp_path / "file").write_text("{]")
    rows = [{**good["rows"][0], "share": None}, {**good["rows"][1], "ratios": {"transformers": 0.0}}]
    files = {"foreign": {"rows": []}, "newer": {**good, "version": 99}, "half": {**good, "complete": False}}
    files["damaged"] = {**good, "rows": rows, "device": None}
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    fails(message, "benchmark", preset, *arguments.split(), cwd=tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_missing_package_is_named(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "cyllama" else name)
    message = r"package `cyllama` is not installed.*the engine llama.cpp.*\[test\]"
    fails(message, "benchmark", preset, "--peers", "llama.cpp", cwd=tmp_path)


def test_expected_slopes() -> None:
    """Where operations limit the time: attention makes it grow faster than the length, the output head makes it grow
    more slowly than depth and width. Where memory does, only the cache grows with the context."""
    assert scaling.slope([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    for on_gpu in (False, True):
        slopes, compute = [], Bounds(flops=1, bandwidth=1e30)
        *training, decoding = scaling.sweeps(small_config(), "float32", on_gpu=on_gpu)
        for sweep in training:
            times = [least_seconds(case, compute)[0] for _, case in sweep.points]
            slopes.append(scaling.slope([x for x, _ in sweep.points], times))
        length, batch, depth, width = slopes
        assert 1 < length < 1.3
        assert batch == pytest.approx(1)
        assert 0.5 < depth < 1
        assert 1.3 < width < 2
        times = [least_seconds(case, Bounds(flops=1e30, bandwidth=1))[0] for _, case in decoding.points]
        assert 0.3 < scaling.slope([x for x, _ in decoding.points], times) < 1


def test_earlier_results_are_kept_until_new_ones_are_complete(tmp_path: Path) -> None:
    results = some_results()
    command.Output(str(tmp_path / "out")).save(results)
    before = (tmp_path / "out/results.json").read_bytes()
    (tmp_path / "out/scaling.png").write_bytes(b"of the earlier run")
    again = command.Output(str(tmp_path / "out"))
    results.rows.pop()
    results.complete = False
    again.save(results)
    assert (tmp_path / "out/results.json").read_bytes() == before
    results.complete = True
    again.save(results)
    assert (tmp_path / "out/results.json").read_text() == results.to_json()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "report.md", "roofline.png"}
    assert (tmp_path / "out/roofline.png").read_bytes().startswith(b"\x89PNG")


def benchmark(*arguments: str, cwd: Path, before: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; `before` is a folder with packages that replace those of the project."""
    env = environment()
    if before is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(before), env["PYTHONPATH"]])
    full = [sys.executable, str(ROOT / "scripts/benchmark.py"), "small.yaml", *arguments]
    return subprocess.run(full, cwd=cwd, capture_output=True, text=True, env=env, timeout=300, check=False)


@pytest.mark.extended
def test_every_engine_and_peer(preset: str, tmp_path: Path) -> None:
    """A real run: all rows, positive bounds and rates, equal losses; then the same file and an edited one as earlier
    results. (torch-compiled, which takes a minute to compile, has its own test.)"""
    done = benchmark(*SMALL, "--peers", *PEERS, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "out/report.md").read_text() + "\n"
    data = json.loads((tmp_path / "out/results.json").read_text())
    expected = {(c, e) for c in CASES for e, works in DOES.items() if c.split(",")[0] in works}
    assert {(row["case"], row["engine"]) for row in data["rows"]} == {x for x in expected if x[1] != "torch-compiled"}
    assert data["complete"]
    assert data["failed"] == data["problems"] == []
    assert data["bounds"].keys() == {"jax", "torch"}
    assert all(rate > 1e8 for bound in data["bounds"].values() for rate in bound.values())
    for row in data["rows"]:
        assert row["rate"] > 0
        assert 0 < row["share"] < 2
        assert 10**7 < row["peak_bytes"] < 4 * 10**9
        assert (row["loss"] is not None) == (row["work"] == "train")
    losses = [row["loss"] for row in data["rows"] if row["work"] == "train"]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)

    against = (*SMALL, "--works", "prefill", "--engines", "torch", "--tolerance", "0.99", "--against", "then.json")
    shutil.copy(tmp_path / "out/results.json", tmp_path / "then.json")
    done = benchmark(*against, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"| {CASES[1]} | torch | share of the bound | " in done.stdout
    for row in data["rows"]:
        row["share"] *= 1e4
    (tmp_path / "then.json").write_text(json.dumps(data))
    done = benchmark(*against, cwd=tmp_path)
    assert done.returncode == 2
    assert "1 of 1 numbers fell by more than 99%" in done.stderr
    assert f"{CASES[1]}, torch: share of the bound " in done.stderr


@pytest.mark.extended
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("    return loss / 1.01, weight\n", "train, 2 x 16: the losses of jax .* and torch .* differ by more than"),
        ("    raise RuntimeError('planted')\n", "train, 2 x 16: torch failed"),
        ("    import os; os._exit(9)\n", "train, 2 x 16: torch failed"),
    ],
)
def test_a_planted_fault_is_seen(fault: str, message: str, preset: str, tmp_path: Path) -> None:
    """The report is still written, with the rows of the other engine."""
    shutil.copytree(ROOT / "minillm_torch", tmp_path / "planted/minillm_torch")
    with (tmp_path / "planted/minillm_torch/train.py").open("a") as file:
        file.write("\n\n_right = loss_sums\n\n\ndef loss_sums(*inputs, **options):\n")
        file.write("    loss, weight = _right(*inputs, **options)\n" + fault)
    done = benchmark(*SMALL, "--works", "train", "--out", "out", cwd=tmp_path, before=tmp_path / "planted")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search(message, done.stderr), done.stderr
    text = (tmp_path / "out/report.md").read_text()
    assert "## Problems" in text
    assert "| train, 2 x 16 | jax | " in text
    assert ("| train, 2 x 16 | torch | " in text) == ("loss" in fault)


@pytest.mark.long
def test_scaling(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five sweeps of four points, measured and expected, as a table, a picture and JSON; the works are optional."""
    tiny = scaling.Sizes(width=64, head_dim=16, layers=4, vocab=64, tokens=16, rows=4, context=32, decode_rows=2)
    monkeypatch.setattr(scaling, "SIZES", {False: tiny})
    monkeypatch.setattr(scaling, "NEW_TOKENS", 4)
    monkeypatch.chdir(tmp_path)
    command.benchmark(Options(preset, works=(), scaling=True, out="out"))
    data = json.loads((tmp_path / "out/results.json").read_text())
    assert [sweep["x"] for sweep in data["scaling"]["sweeps"]] == [
        [4, 8, 16, 32],
        [1, 2, 4, 8],
        [1, 2, 4, 8],
        [16, 32, 64, 128],
        [8, 16, 32, 64],
    ]
    for sweep in data["scaling"]["sweeps"]:
        assert sweep["engines"].keys() == {"jax", "torch"}
        assert all(len(times["seconds"]) == 4 for times in (sweep["expected"], *sweep["engines"].values()))
        assert f"| {sweep['name']}, " in (tmp_path / "out/report.md").read_text()
    assert (tmp_path / "out/scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_gpu_script(preset: str, tmp_path: Path) -> None:
    """benchmarks/gpu.sh passes options on, and reports that no GPU test ran here."""
    full = [str(ROOT / "benchmarks/gpu.sh"), str(tmp_path / "gpu"), str(tmp_path / preset), *SMALL, "--works", "train"]
    done = subprocess.run(full, capture_output=True, text=True, env=environment(), timeout=500, check=False)
    assert done.returncode == 1
    text = (tmp_path / "gpu/report.md").read_text()
    assert "| train, 2 x 16 | torch | " in text
    assert "exit status 0, but no test ran" in text
    assert json.loads((tmp_path / "gpu/results.json").read_text())["complete"]
    assert (tmp_path / "gpu/roofline.png").is_file()


@pytest.mark.long
def test_compiled_decoding(preset: str, tmp_path: Path) -> None:
    done = benchmark(*SMALL, "--works", "decode", "--engines", "torch", "torch-compiled", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"| {CASES[3]} | torch-compiled | " in done.stdout
