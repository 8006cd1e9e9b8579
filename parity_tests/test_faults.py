"""Real processes: killed, interrupted by signals, with damaged files, on a full disk, two in one run directory.

A short form belongs to the extended tests; `pytest parity_tests -m faults` kills each framework's training 40 times.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from minillm_core.config import DataConfig, OptimConfig, RunConfig, to_dict
from minillm_core.errors import InputError
from minillm_core.training.checkpoints import checkpoint_steps, verify_checkpoint
from minillm_core.training.metrics import read_metrics
from minillm_core.training.train import train
from parity_tests.conftest import BACKENDS, ROOT, TINY, assert_same_bits, metrics_of, run_config, state_at

FRAMEWORKS = ("jax", "torch")
SHORT = pytest.mark.extended


def start(framework: str, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`python scripts/train_<framework>.py run.yaml`, as a user starts it."""
    command = [sys.executable, str(ROOT / f"scripts/train_{framework}.py"), "run.yaml", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"PYTHONPATH": str(ROOT)}  # without the shared cache, every process compiles by itself
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(framework: str, folder: Path, *arguments: str, status: int = 0) -> str:
    """Run training to its end; return its stderr."""
    process = start(framework, folder, *arguments)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == status, said
    assert "Traceback" not in said
    return said


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    """Poll every millisecond until the condition holds or the process ends."""
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def new_home(folder: Path, data: DataConfig, **train: Any) -> Path:
    """A folder with run.yaml and prepared data."""
    folder.mkdir(exist_ok=True)
    optim = OptimConfig(learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=2)
    settings = {"steps": 5000, "log_every": 5, "eval_every": 100, "eval_batches": 4, "checkpoint_every": 10} | train
    config = run_config(TINY, "run", data=data, optim=optim, **settings)
    (folder / "run.yaml").write_text(yaml.safe_dump(to_dict(config)))
    return folder


def checkpoints(home: Path, framework: str) -> Path:
    return home / "run" / framework / "checkpoints"


def assert_same_run(ours: Path, theirs: Path, framework: str, step: int) -> None:
    """The same final bits and the same log, with no step missing or repeated."""
    assert_same_bits(state_at(ours / "run", framework, step), state_at(theirs / "run", framework, step))
    assert metrics_of(ours / "run", framework) == metrics_of(theirs / "run", framework)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.faults
def test_killed_at_random_moments(framework: str, data_config: DataConfig, tmp_path: Path) -> None:
    """SIGKILL: half of the kills aim at a save, the others hit at any time after the start of the process."""
    kills = 40
    steps = 60 + 15 * kills
    undisturbed = new_home(tmp_path / "undisturbed", data_config, steps=steps)
    finish(framework, undisturbed)
    home, rng = new_home(tmp_path / "home", data_config, steps=steps), np.random.default_rng(kills)
    folder, in_saves = checkpoints(home, framework), 0
    for n in range(kills):
        process = start(framework, home)
        if n % 2 == 0:
            committed = checkpoint_steps(folder)[-1:]
            wait_for(lambda: checkpoint_steps(folder)[-1:] != committed, process)  # noqa: B023
            wait_for(lambda: list(folder.glob(".*.partial")), process)
            time.sleep(10 ** rng.uniform(-4, -1.5))
        else:
            time.sleep(rng.uniform(0, 4))
        process.kill()
        said = process.communicate()[1]
        if process.returncode == 0:  # a fast machine finished the run
            break
        assert process.returncode == -signal.SIGKILL, said
        in_saves += bool(list(folder.glob(".*.partial")))
        for step in checkpoint_steps(folder):
            verify_checkpoint(folder / str(step))
    last = checkpoint_steps(folder)[-1:]
    print(f"\n{framework}: killed {n + 1} times, {in_saves} of them inside a save, up to step {last} of {steps}")
    said = finish(framework, home)
    if kills >= 40:
        assert n + 1 == kills
        assert in_saves >= kills // 8
    assert "resuming from" in said or "found the finished run" in said
    assert not list(folder.glob(".*"))
    assert_same_run(home, undisturbed, framework, steps)


def short_run(home: Path, data: DataConfig) -> RunConfig:
    optim = OptimConfig(learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=2)
    settings = {"steps": 12, "checkpoint_every": 4, "eval_every": 6, "log_every": 1}
    return run_config(TINY, home / "run", data=data, optim=optim, **settings)


@pytest.fixture(scope="module")
def finished(data_config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short finished run in each framework."""
    home = tmp_path_factory.mktemp("finished")
    for framework in FRAMEWORKS:
        train(short_run(home, data_config), BACKENDS[framework])
    return home


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def damages(framework: str) -> list[Any]:
    """Every kind of damage to every file of a checkpoint; by default only the first case runs."""
    payload = ["orbax/weights/*"] if framework == "jax" else ["model.safetensors", "optimizer.safetensors"]
    cases = [(flip, payload[0]), (truncate, payload[0]), (Path.unlink, payload[0]), (Path.unlink, "manifest.json")]
    every_file = [
        (damage, name)
        for damage in (flip, truncate, Path.unlink)
        for name in ("checkpoint.json", "manifest.json", "tokenizer.model", *payload)
        if (damage, name) not in cases
    ]
    cases += every_file
    return [pytest.param(*case, marks=pytest.mark.faults if n else SHORT) for n, case in enumerate(cases)]


@pytest.mark.parametrize(
    ("framework", "damage", "pattern"),
    [
        pytest.param(framework, *getattr(case, "values", case), marks=getattr(case, "marks", ()))
        for framework in FRAMEWORKS
        for case in damages(framework)
    ],
)
def test_damaged_checkpoint_is_skipped(
    framework: str,
    damage: Callable[[Path], None],
    pattern: str,
    finished: Path,
    data_config: DataConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is named and stays in place until its step is reached again; the run ends with the same bits and log."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    newest = checkpoints(tmp_path, framework) / "12"
    victim = max((path for path in newest.glob(pattern) if path.is_file()), key=lambda path: path.stat().st_size)
    damage(victim)
    left = {path: path.read_bytes() for path in newest.rglob("*") if path.is_file()}
    train(short_run(tmp_path, data_config), BACKENDS[framework])
    said = caplog.text
    named = "" if (damage, pattern) == (flip, "manifest.json") else victim.name  # a changed hash may blame any file
    assert re.search(f"(?s)skipping a damaged checkpoint.*: damaged checkpoint.*{named}.*where: {newest}", said)
    assert f"resuming from {newest.with_name('8')}" in said
    moved = newest.with_suffix(".damaged")
    assert {moved / path.relative_to(newest): content for path, content in left.items()} == {
        path: path.read_bytes() for path in moved.rglob("*") if path.is_file()
    }
    assert_same_run(tmp_path, finished, framework, 12)


@SHORT
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_all_checkpoints_damaged_is_refused(
    framework: str, finished: Path, data_config: DataConfig, tmp_path: Path
) -> None:
    """Training is refused; it does not start again from step 0 by itself."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for step in (4, 8, 12):
        flip(checkpoints(tmp_path, framework) / str(step) / "checkpoint.json")
    with pytest.raises(InputError, match=r"(?s)every checkpoint of the run is damaged.*/12.*/8.*/4"):
        train(short_run(tmp_path, data_config), BACKENDS[framework])


@SHORT
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_saves_and_stops(
    framework: str, number: signal.Signals, data_config: DataConfig, tmp_path: Path
) -> None:
    """The current step is saved, nothing is lost, and the exit status tells which signal it was."""
    home = new_home(tmp_path, data_config, checkpoint_every=5000)
    process = start(framework, home)
    log = home / "run" / framework / "metrics.jsonl"
    wait_for(lambda: log.exists() and len(log.read_text().split("\n")) > 4, process)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number, said
    (step,) = checkpoint_steps(checkpoints(home, framework))
    assert step >= read_metrics(log)[-1]["step"]
    assert f"stopped at step {step} of 5000: saved run/{framework}/checkpoints/{step}; run the same command" in said


@SHORT
def test_ctrl_c_with_piped_output(data_config: DataConfig, tmp_path: Path) -> None:
    """`python scripts/train_torch.py run.yaml 2>&1 | tee log`: Ctrl-C in a terminal reaches both processes."""
    home = new_home(tmp_path, data_config, checkpoint_every=5000)
    command = f'"{sys.executable}" "{ROOT}/scripts/train_torch.py" run.yaml 2>&1 | tee log'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        ["bash", "-c", f"trap : INT; {command}; exit ${{PIPESTATUS[0]}}"],
        cwd=home,
        env=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    log = home / "run/torch/metrics.jsonl"
    wait_for(lambda: log.exists() and len(log.read_text().split("\n")) > 4, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    (step,) = checkpoint_steps(checkpoints(home, "torch"))
    assert step >= read_metrics(log)[-1]["step"]


@SHORT
def test_second_process_is_refused(data_config: DataConfig, tmp_path: Path) -> None:
    """In either framework. The first process continues; when it has ended, even by SIGKILL, the directory is free."""
    home = new_home(tmp_path, data_config)
    first = start("torch", home)
    log = home / "run/torch/metrics.jsonl"
    wait_for(log.exists, first)
    for framework in FRAMEWORKS:
        said = finish(framework, home, status=2)
        assert re.search(rf"(?s)another process.*process {first.pid}: .*train_torch\.py.*where: run\n", said), said
    assert first.poll() is None
    first.kill()
    first.communicate()
    rows = len(log.read_text().split("\n"))
    again = start("torch", home)
    wait_for(lambda: len(log.read_text().split("\n")) > rows, again)
    again.terminate()
    said = again.communicate(timeout=60)[1]
    assert again.returncode == 128 + signal.SIGTERM, said


@SHORT
def test_killed_while_preparing_data(corpus: Path, tmp_path: Path) -> None:
    """The leftovers are not taken for prepared data, block nothing, and are removed; a second process waits."""
    data = DataConfig(corpus=str(corpus), dir="data/tiny", holdout_every=5)
    home = new_home(tmp_path, data, steps=2)
    partial = home / "data/.tiny.partial"
    process = start("torch", home)
    wait_for(lambda: partial.exists() and any(partial.iterdir()), process)
    process.kill()
    process.communicate()
    assert partial.exists()
    assert not (home / "data/tiny").exists()
    both = [start("torch", home, "--train.out_dir", f"run{n}") for n in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(text.startswith("prepared") for text in said) == [False, True]
    assert not partial.exists()


def small_disk(folder: Path, kilobytes: int) -> list[str]:
    """A command prefix that mounts a small disk at `folder`. Skips the test if this system does not allow it."""
    prefix = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size={kilobytes}k tmpfs {folder}"
    if not shutil.which("unshare") or subprocess.run([*prefix, mount], capture_output=True, check=False).returncode:
        pytest.skip("a full disk is not tested here: this system does not let a process mount a small one (a tmpfs)")
    return [*prefix, f'{mount} && cd {folder} && "$0" "$@"']


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    "kilobytes",
    [pytest.param(n, marks=pytest.mark.faults if n > 6000 else SHORT) for n in range(6000, 7300, 250)],
)
def test_full_disk(framework: str, kilobytes: int, data_config: DataConfig, tmp_path: Path) -> None:
    """Full before or during a save: training stops with a message, and all earlier checkpoints are complete."""
    disk = tmp_path / "disk"
    prefix = small_disk(new_home(disk, data_config), kilobytes)
    settings = new_home(tmp_path / "config", data_config, steps=60, checkpoint_every=4, keep_last=0) / "run.yaml"
    script = f"""
        "{sys.executable}" "{ROOT}/scripts/train_{framework}.py" "{settings}"; echo "status $?" >&2
        df --output=pcent . >&2; ls -A run/{framework}/checkpoints >&2
        "{sys.executable}" - <<'end'
from pathlib import Path
from minillm_core.training.checkpoints import checkpoint_steps, verify_checkpoint
folder = Path("run/{framework}/checkpoints")
for step in checkpoint_steps(folder):
    verify_checkpoint(folder / str(step))
    print("whole:", step)
end"""
    done = subprocess.run(
        [*prefix, "sh", "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert "status 2" in done.stderr, done.stderr
    assert re.search(r"(?s)the disk is full.*where: run/.*free some space", done.stderr), done.stderr
    assert len(done.stdout.splitlines()) >= 2, done.stderr
