"""Stopped and resumed runs: the same bits, the same log; which checkpoints are kept, and when they are written."""

import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import minillm_jax
import minillm_torch
from minillm_core.config import DataConfig, RunConfig
from minillm_core.data.prepared import PreparedData
from minillm_core.data.split_loss import SplitLoss
from minillm_core.errors import InputError, Interrupted
from minillm_core.model.params import count_params
from minillm_core.training import loop, speed
from minillm_core.training.checkpoints import CheckpointWriter, checkpoint_steps, verify_checkpoint
from minillm_core.training.metrics import read_metrics
from minillm_core.training.speed import peak_flops
from minillm_core.training.train import train
from parity_tests.conftest import (
    BACKENDS,
    TINY,
    assert_same_bits,
    metrics_of,
    run_config,
    state_at,
    text_run,
    train_until,
)


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize("stops", [[1], [7, 20]], ids=str)
def test_resume_is_bit_exact(
    framework: str, stops: list[int], data_config: DataConfig, tmp_path: Path, undisturbed: Path
) -> None:
    """Stopped by signals at any steps: the same bits and the same log as without a stop."""
    backend, config = BACKENDS[framework], text_run(data_config, tmp_path, log_every=3, grad_accum=2)
    for step in stops:
        train_until(config, backend, step)
        assert checkpoint_steps(tmp_path / framework / "checkpoints")[-1] == step
    train(config, backend)
    assert_same_bits(state_at(tmp_path, framework, 30), state_at(undisturbed, framework, 30))
    assert metrics_of(tmp_path, framework) == metrics_of(undisturbed, framework)


@pytest.fixture(scope="module")
def undisturbed(data_config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    for backend in BACKENDS.values():
        train(text_run(data_config, folder, log_every=3, grad_accum=2), backend)
    return folder


@pytest.mark.parametrize("framework", BACKENDS)
def test_stopped_while_evaluating(framework: str, data_config: DataConfig, tmp_path: Path, undisturbed: Path) -> None:
    """The step is saved at once, without its evaluation; the resumed run then makes the evaluation."""
    backend, config = BACKENDS[framework], text_run(data_config, tmp_path, log_every=3, grad_accum=2)
    eval_batches = PreparedData.eval_batches

    def interrupting(self: PreparedData, *arguments: Any) -> Iterator[Any]:
        for n, window in enumerate(eval_batches(self, *arguments)):
            if n == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield window

    for step in (10, 20, 30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PreparedData, "eval_batches", interrupting)
            with pytest.raises(Interrupted):
                train(config, backend)
        assert checkpoint_steps(tmp_path / framework / "checkpoints")[-1] == step
        last = metrics_of(tmp_path, framework)[-1]
        assert (last["step"], last["split"]) == (step, "train")
        if step < 30:
            train_until(config, backend, step + 1)
    train(config, backend)
    assert_same_bits(state_at(tmp_path, framework, 30), state_at(undisturbed, framework, 30))
    assert metrics_of(tmp_path, framework) == metrics_of(undisturbed, framework)


@pytest.mark.parametrize("framework", BACKENDS)
def test_training_continues_during_a_save(framework: str, data_config: DataConfig, tmp_path: Path) -> None:
    """The first save waits until five more steps are done: a loop that waited for the save would fail."""
    five_more = threading.Event()
    backend = BACKENDS[framework]

    def start_payload(folder: Path, config: RunConfig, state: Any) -> Callable[[], None]:
        finish = backend.start_payload(folder, config, state)

        def held_up() -> None:
            assert five_more.wait(60), "the train loop waits for the save"
            finish()

        return held_up

    def make_train_step(config: RunConfig) -> Any:
        step, done = backend.make_train_step(config), 0

        def counting(*arguments: Any) -> Any:
            nonlocal done
            done += 1
            if done == 15:
                five_more.set()
            return step(*arguments)

        return counting

    slow = SimpleNamespace(**(vars(backend) | {"start_payload": start_payload, "make_train_step": make_train_step}))
    train(text_run(data_config, tmp_path), slow)
    assert checkpoint_steps(tmp_path / framework / "checkpoints") == [10, 20, 30]


@pytest.mark.parametrize(
    ("keep_last", "kept", "seen"),
    [
        (2, [6, 12, 14], [[], [2], [2, 4], [4, 6], [6, 8], [6, 8, 10], [6, 10, 12]]),
        (1, [6, 14], [[], [2], [2, 4], [4, 6], [6, 8], [6, 10], [6, 12]]),
        (0, [2, 4, 6, 8, 10, 12, 14], None),
    ],
)
def test_last_and_best_checkpoints_are_kept(
    keep_last: int,
    kept: list[int],
    seen: list[list[int]] | None,
    data_config: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Step 6 has the lowest held-out loss before the last step, so it is kept in addition to the last checkpoints."""
    held_out = iter([3.0, 2.0, 1.0, 2.5, 2.5, 2.5, 0.5])
    monkeypatch.setattr(loop, "evaluate", lambda *_: SplitLoss(next(held_out), {}))
    config = text_run(data_config, tmp_path, steps=14, eval_every=2, checkpoint_every=2, keep_last=keep_last)
    before_saves: list[list[int]] = []

    def start_payload(*arguments: Any, **keywords: Any) -> Any:
        before_saves.append(checkpoint_steps(tmp_path / "torch/checkpoints"))
        finish = minillm_torch.start_payload(*arguments, **keywords)

        def slowly() -> None:
            if len(before_saves) == 3:  # step 6 is evaluated, and the next save begun, before this one is committed
                time.sleep(2)
            finish()

        return slowly

    train(config, SimpleNamespace(**(vars(minillm_torch) | {"start_payload": start_payload})))
    assert checkpoint_steps(tmp_path / "torch/checkpoints") == kept
    assert seen is None or before_saves == seen
    assert not list((tmp_path / "torch/checkpoints").glob(".*"))


def test_damaged_checkpoint_is_not_counted(data_config: DataConfig, tmp_path: Path) -> None:
    """It does not count for `keep_last`, wherever it is, so it displaces no good checkpoint."""
    config = text_run(data_config, tmp_path, steps=20, checkpoint_every=5, eval_every=20, keep_last=2)
    train_until(config, minillm_torch, 12)
    folder = tmp_path / "torch/checkpoints"
    (folder / "12/model.safetensors").write_bytes(b"damaged")
    train_until(config, minillm_torch, 16)
    assert checkpoint_steps(folder) == [12, 15, 16]
    (folder / "16/model.safetensors").write_bytes(b"damaged")
    (folder / "15/model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"(?s)every checkpoint of the run is damaged.*12.*do: restore"):
        train(config, minillm_torch)


def test_a_step_that_is_saved_again_counts(data_config: DataConfig, tmp_path: Path) -> None:
    """Step 10 is damaged and saved again, so `keep_last` removes it later. Step 12 is damaged and stays."""
    settings: dict[str, Any] = {"steps": 20, "checkpoint_every": 5, "eval_every": 20}
    train_until(text_run(data_config, tmp_path, **settings), minillm_torch, 12)
    folder = tmp_path / "torch/checkpoints"
    for step in (10, 12):
        (folder / f"{step}/model.safetensors").write_bytes(b"damaged")
    train(text_run(data_config, tmp_path, **settings, keep_last=2), minillm_torch)
    assert checkpoint_steps(folder) == [12, 15, 20]


def test_checkpoint_is_flushed_before_rename(
    data_config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order: flush the log, flush all files and folders of the checkpoint, rename it, flush the parent folder."""
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def watched_fsync(descriptor: int) -> None:
        events.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def watched_rename(self: Path, target: Path) -> Path:
        events.append(("rename", str(self)))
        return rename(self, target)

    config = text_run(data_config, tmp_path, steps=6, checkpoint_every=6)
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    train(config, minillm_jax)
    folder = tmp_path / "jax/checkpoints"
    partial = str(folder / ".6.partial")
    renamed = events.index(("rename", partial))
    inside = {str(path).replace(str(folder / "6"), partial) for path in [folder / "6", *(folder / "6").rglob("*")]}
    assert {path for kind, path in events[:renamed] if path.startswith(partial)} >= inside
    log = events.index(("flush", str(tmp_path / "jax/metrics.jsonl")))
    assert log < min(events.index(("flush", path)) for path in inside)
    assert ("flush", str(folder)) in events[renamed:]


@pytest.mark.parametrize("moment", ["saving", "finished"])
def test_signal_after_the_last_step(moment: str, data_config: DataConfig, tmp_path: Path) -> None:
    """A signal during the last save, or when the run has finished, still stops the process before anything else."""
    config = text_run(data_config, tmp_path, steps=6)
    if moment == "finished":
        train(config, minillm_torch)

    def read_payload(*arguments: Any, **keywords: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return minillm_torch.read_payload(*arguments, **keywords)

    def start_payload(*arguments: Any, **keywords: Any) -> Any:
        finish = minillm_torch.start_payload(*arguments, **keywords)

        def interrupted() -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            finish()

        return interrupted

    backend = SimpleNamespace(**(vars(minillm_torch) | {"read_payload": read_payload, "start_payload": start_payload}))
    with pytest.raises(Interrupted):
        train(config, backend)
    assert checkpoint_steps(tmp_path / "torch/checkpoints") == [6]


def test_garbage_at_the_end_of_the_log(data_config: DataConfig, tmp_path: Path, undisturbed: Path) -> None:
    """As a power cut may leave it: the garbage is dropped. A bad line before the resumed step is an error."""
    config = text_run(data_config, tmp_path, log_every=3, grad_accum=2)
    train_until(config, minillm_torch, 14)
    log = tmp_path / "torch/metrics.jsonl"
    good = log.read_bytes()
    log.write_bytes(good + b'{"step": 15, "sp\n\x00\xff\x00\n\n\x00')
    train(config, minillm_torch)
    assert metrics_of(tmp_path, "torch") == metrics_of(undisturbed, "torch")
    log.write_bytes(b"\x00\n" + good)
    with pytest.raises(InputError, match=r"not a metrics row.*\n.*\n.*metrics.jsonl:1"):
        read_metrics(log)


def test_trackers_match_the_log(data_config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a stop and a resume, TensorBoard's file has every row once. Weights & Biases writes an offline run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_SILENT", "true")
    config = text_run(data_config, tmp_path, steps=8, eval_every=4, tensorboard=True, wandb="offline")
    train_until(config, minillm_torch, 5)
    train(config, minillm_torch)
    events = EventAccumulator(str(tmp_path / "torch/tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    rows = metrics_of(tmp_path, "torch")
    for split, count in (("train", 8), ("val", 2)):
        logged = {event.step: float(event.tensor_proto.float_val[0]) for event in events.Tensors(f"{split}/loss")}
        expected = {row["step"]: row["loss"] for row in rows if row["split"] == split}
        assert len(events.Tensors(f"{split}/loss")) == count
        assert logged == pytest.approx(expected, rel=1e-6)
    assert list((tmp_path / "torch/wandb").glob("offline-run-*/*.wandb"))


def test_peak_flops() -> None:
    assert peak_flops("jax 0.10.1 on NVIDIA H200", "bfloat16") == 989e12
    assert peak_flops("torch 2.13.0 on NVIDIA H100 PCIe", "float32") == 51e12
    assert peak_flops("jax 0.10.1 on NVIDIA H200", "float64") is None
    assert peak_flops("jax 0.10.1 on cpu", "float32") is None


def test_mfu() -> None:
    """The share of the peak that a step's operations are: three times those of the framework's own forward pass."""
    config = run_config(TINY, compute_dtype="bfloat16")
    c = config.train
    measured = speed.Speed(config, "torch on NVIDIA A100", 0)
    measured.last_time = 10.0
    values = measured.tick(4, 10.0 + 4e-5, 1.0, 1.0, 1e-3)
    flops = 3 * minillm_torch.count_forward_flops(TINY, c.batch_size, c.seq_len)
    assert values["tokens_per_second"] == pytest.approx(c.batch_size * c.seq_len / 1e-5, rel=1e-6)
    assert values["mfu"] == pytest.approx(flops / 1e-5 / 312e12, abs=1e-4)
    assert values["mfu"] > 0.01


@pytest.mark.parametrize("n_failures", [1, 2])
def test_failed_save_is_retried(n_failures: int, data_config: DataConfig, tmp_path: Path) -> None:
    """The disk is full when step 4 is saved. When a signal comes, there is space again, and nothing is lost. If the
    save of step 8 fails too, the run stops when it would save step 12."""
    failures = iter([True] * n_failures)

    def start_late(folder: Path, *arguments: Any, **keywords: Any) -> Any:
        def start() -> None:
            if next(failures, False):
                raise OSError(errno.ENOSPC, "No space left on device")
            minillm_torch.start_payload(folder, *arguments, **keywords)()

        return start

    config = text_run(data_config, tmp_path, checkpoint_every=4)
    backend = SimpleNamespace(**(vars(minillm_torch) | {"start_payload": start_late}))
    if n_failures == 1:
        train_until(config, backend, 7)
        assert checkpoint_steps(tmp_path / "torch/checkpoints") == [7]
        return
    with pytest.raises(InputError, match="the disk is full"):
        train(config, backend)
    assert metrics_of(tmp_path, "torch")[-1]["step"] == 12
    assert checkpoint_steps(tmp_path / "torch/checkpoints") == []


@pytest.mark.parametrize("missing", [0, 1])
def test_a_full_disk_is_foreseen(
    missing: int, data_config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save needs room for the weights and both moments; it fails before anything is written if there is less."""
    needed = 3 * 4 * count_params(TINY)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - missing))
    started: list[Path] = []

    def start_payload(folder: Path, config: RunConfig, state: Any) -> Any:
        started.append(folder)
        return minillm_torch.start_payload(folder, config, state)

    config = text_run(data_config, tmp_path, steps=6)
    backend = SimpleNamespace(**(vars(minillm_torch) | {"start_payload": start_payload}))
    if not missing:
        assert started == [train(config, backend).with_name(".6.partial")]
        return
    with pytest.raises(InputError, match="the disk is full: the checkpoint was not saved"):
        train(config, backend)
    assert (started, list((tmp_path / "torch/checkpoints").iterdir())) == ([], [])


def test_a_manifest_must_cover_the_description(data_config: DataConfig, tmp_path: Path) -> None:
    """An empty manifest, with which every file would be ignored, is damage."""
    checkpoint = train(text_run(data_config, tmp_path, steps=6), minillm_torch)
    (checkpoint / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match=r"no entry for checkpoint\.json"):
        verify_checkpoint(checkpoint)


def test_leftovers_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".3.partial/orbax").mkdir(parents=True)
    with CheckpointWriter(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_unknown_files_in_a_checkpoint_are_ignored(data_config: DataConfig, tmp_path: Path) -> None:
    config = text_run(data_config, tmp_path, steps=6)
    checkpoint = train(config, minillm_torch)
    (checkpoint / ".DS_Store").write_bytes(b"")
    assert train(config, minillm_torch) == checkpoint


def test_log_is_kept_when_checkpoints_are_lost(data_config: DataConfig, tmp_path: Path) -> None:
    config = text_run(data_config, tmp_path, steps=6)
    train(config, minillm_torch)
    log = tmp_path / "torch/metrics.jsonl"
    content = log.read_bytes()
    shutil.rmtree(tmp_path / "torch/checkpoints")
    train(config, minillm_torch)
    assert log.with_name("metrics.jsonl.old").read_bytes() == content


def test_speed_excludes_evaluation_and_plots(
    data_config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a fake clock, a step takes 1 s, an evaluation or a plot 100 s: the logged speed counts only the steps."""
    now = 0.0

    def taking(seconds: float, function: Any) -> Any:
        def slow(*arguments: Any) -> Any:
            nonlocal now
            now += seconds
            return function(*arguments)

        return slow

    clock = SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(speed, "time", clock)
    monkeypatch.setattr(loop, "learning_rate", taking(1, loop.learning_rate))
    monkeypatch.setattr(loop, "evaluate", taking(100, loop.evaluate))
    monkeypatch.setattr(loop, "plot_loss", taking(100, loop.plot_loss))
    train(text_run(data_config, tmp_path, steps=20, eval_every=5, checkpoint_every=7), minillm_torch)
    rows = read_metrics(tmp_path / "torch/metrics.jsonl")
    assert {row["tokens_per_second"] for row in rows if row["split"] == "train"} == {4 * 32}
