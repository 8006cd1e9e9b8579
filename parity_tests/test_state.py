"""The state of a training run: moved between the frameworks, stopped and resumed, and kept from going wrong."""

import copy
import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from convert import convert

import minillm_jax
import minillm_torch
from minillm_core import loop
from minillm_core.checkpoints import CheckpointWriter, TrainingState, checkpoint_steps, read_info
from minillm_core.config import DataConfig, OptimConfig, RunConfig
from minillm_core.data import PreparedData
from minillm_core.errors import InputError, Interrupted
from minillm_core.metrics import read_metrics
from minillm_core.progress import peak_flops
from minillm_core.schedule import learning_rate
from parity_tests.conftest import TIERS, TINY, Tier, assert_close, run_config

BACKENDS: dict[str, Any] = {"jax": minillm_jax, "torch": minillm_torch}


def config_of(data: DataConfig, out_dir: Path, **train: Any) -> RunConfig:
    """A run on real text, with a schedule and clipping that both bite."""
    optim = OptimConfig(learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=5)
    settings = {"steps": 30, "log_every": 1, "eval_every": 10, "checkpoint_every": 10, "keep_last": 0} | train
    return run_config(TINY, out_dir, data=data, optim=optim, **settings)


def metrics_of(run: Path, framework: str) -> list[dict[str, Any]]:
    """The rows, without what depends on the clock."""
    rows = read_metrics(run / framework / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


def losses_of(run: Path, framework: str) -> np.ndarray:
    return np.array([row["loss"] for row in metrics_of(run, framework)])


def state_at(run: Path, framework: str, step: int) -> TrainingState:
    checkpoint = run / framework / "checkpoints" / str(step)
    return BACKENDS[framework].read_payload(checkpoint, read_info(checkpoint).config, moments=True)


def assert_same_bits(ours: TrainingState, theirs: TrainingState) -> None:
    for group in ("weights", "exp_avg", "exp_avg_sq"):
        a, b = getattr(ours, group), getattr(theirs, group)
        assert a.keys() == b.keys()
        assert len(a) > 0
        for name in a:
            assert a[name].dtype == b[name].dtype
            assert a[name].tobytes() == b[name].tobytes(), f"{group} {name}"


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Sends this process a real signal while it makes the batch of a step."""
    make_batch = PreparedData.batch

    def batch(self: PreparedData, n: int, *arguments: Any) -> np.ndarray:
        if n == step:
            os.kill(os.getpid(), number)
        return make_batch(self, n, *arguments)

    monkeypatch.setattr(PreparedData, "batch", batch)


def train_until(config: RunConfig, backend: Any, step: int) -> None:
    """Trains, and is stopped once `step` steps are done."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step - 1)
        with pytest.raises(Interrupted):
            loop.train(config, backend)


def moved_run(config: Callable[[Path], RunConfig], folder: Path, frameworks: list[str], every: int) -> np.ndarray:
    """Losses of a run that is trained in one framework after another, `every` steps in each, and converted between."""
    for n, framework in enumerate(frameworks):
        run = config(folder / str(n))
        if n > 0:
            step = n * every
            before = frameworks[n - 1]
            convert(before, framework, f"{folder}/{n - 1}/{before}/checkpoints/{step}", str(folder / str(n)))
        if n == len(frameworks) - 1:
            loop.train(run, BACKENDS[framework])
        else:
            train_until(run, BACKENDS[framework], (n + 1) * every)
    return losses_of(folder / str(n), frameworks[-1])


@pytest.fixture(scope="module", params=[*TIERS, "bfloat16"])
def whole_runs(
    request: pytest.FixtureRequest, data_config: DataConfig, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunConfig]:
    """An undisturbed run of both frameworks in each precision."""
    config = config_of(data_config, tmp_path_factory.mktemp(f"whole-{request.param}"), compute_dtype=request.param)
    with jax.enable_x64(request.param == "float64"):
        for backend in BACKENDS.values():
            loop.train(config, backend)
        yield config


@pytest.mark.parametrize("order", [["torch", "jax", "torch"], ["jax", "torch", "jax"]], ids="-".join)
def test_a_moved_run_is_the_same_run(order: list[str], whole_runs: RunConfig, tmp_path: Path) -> None:
    """Trained in turn in each framework, with a conversion between, a run gives what it gives in either alone.

    In bfloat16, the final losses differ by less than those of two seeds.
    """
    dtype, whole = whole_runs.train.compute_dtype, Path(whole_runs.train.out_dir)

    def config(out_dir: Path) -> RunConfig:
        return replace(whole_runs, train=replace(whole_runs.train, out_dir=str(out_dir)))

    moved = moved_run(config, tmp_path, order, every=10)
    if dtype == "bfloat16":
        other_seed = replace(whole_runs.train, out_dir=str(tmp_path / "other"), seed=4)
        loop.train(replace(whole_runs, train=other_seed), minillm_torch)
        noise = abs(np.mean(losses_of(tmp_path / "other", "torch")[-10:] - losses_of(whole, "torch")[-10:]))
        for framework in BACKENDS:
            assert abs(np.mean(moved[-10:] - losses_of(whole, framework)[-10:])) <= noise
        return
    for framework in BACKENDS:
        assert_close("losses", moved, losses_of(whole, framework), TIERS[dtype].run_loss)
        if dtype == "float64":
            ours, theirs = state_at(tmp_path / "2", order[-1], 30), state_at(whole, framework, 30)
            for group in ("weights", "exp_avg", "exp_avg_sq"):
                for name, array in getattr(theirs, group).items():
                    assert_close(f"{group} {name}", getattr(ours, group)[name], array, 1e-10)


@pytest.mark.long
def test_a_thousand_steps_moved_three_times(float64: Tier, data_config: DataConfig, tmp_path: Path) -> None:
    """float64, every loss within 1e-9 of a run in either framework alone."""

    def config(out_dir: Path) -> RunConfig:
        return config_of(
            data_config, out_dir, compute_dtype="float64", steps=1000, eval_every=100, checkpoint_every=100
        )

    moved = moved_run(config, tmp_path / "moved", ["torch", "jax", "torch", "jax"], every=250)
    assert moved[-1] < moved[0] - 1, "nothing was learnt, so little was compared"
    for framework, backend in BACKENDS.items():
        loop.train(config(tmp_path / "whole"), backend)
        error = np.abs(moved - losses_of(tmp_path / "whole", framework)).max()
        print(f"\n{framework}: largest difference of a loss {error:.1e}")
        assert error <= 1e-9


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_same_curve(grad_accum: int, tier: Tier, data_config: DataConfig, tmp_path: Path) -> None:
    """A hundred steps on text, evaluated on the way: every logged number."""
    config = config_of(
        data_config,
        tmp_path,
        steps=100,
        eval_every=50,
        checkpoint_every=100,
        grad_accum=grad_accum,
        compute_dtype=tier.name,
    )
    for backend in BACKENDS.values():
        loop.train(config, backend)
    ours, theirs = (metrics_of(tmp_path, framework) for framework in BACKENDS)
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.5, "nothing was learnt, so little was compared"
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert (a["step"], a["split"]) == (b["step"], b["split"])
        for name in a.keys() - {"step", "split"}:
            bound = tier.run_loss * (10 if name in ("grad_norm", "perplexity") else 1)
            assert abs(a[name] - b[name]) <= bound * max(1, abs(b[name])), f"step {a['step']} {name}"


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize("stops", [[1], [7, 20]], ids=str)
def test_resumes_to_the_same_bits(
    framework: str, stops: list[int], data_config: DataConfig, tmp_path: Path, undisturbed: Path
) -> None:
    """Stopped by a signal at any step, several times over: the same bits and the same log as without."""
    backend, config = BACKENDS[framework], config_of(data_config, tmp_path, log_every=3, grad_accum=2)
    for step in stops:
        train_until(config, backend, step)
        assert checkpoint_steps(tmp_path / framework / "checkpoints")[-1] == step
    loop.train(config, backend)
    assert_same_bits(state_at(tmp_path, framework, 30), state_at(undisturbed, framework, 30))
    assert metrics_of(tmp_path, framework) == metrics_of(undisturbed, framework)


@pytest.fixture(scope="module")
def undisturbed(data_config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    for backend in BACKENDS.values():
        loop.train(config_of(data_config, folder, log_every=3, grad_accum=2), backend)
    return folder


@pytest.mark.parametrize("framework", BACKENDS)
def test_stopped_while_evaluating(framework: str, data_config: DataConfig, tmp_path: Path, undisturbed: Path) -> None:
    """The step before is saved at once, and the evaluation made up for when the run is resumed."""
    backend, config = BACKENDS[framework], config_of(data_config, tmp_path, log_every=3, grad_accum=2)
    windows = PreparedData.windows

    def interrupting(self: PreparedData, *arguments: Any) -> Iterator[Any]:
        for n, window in enumerate(windows(self, *arguments)):
            if n == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield window

    for step in (10, 20, 30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PreparedData, "windows", interrupting)
            with pytest.raises(Interrupted):
                loop.train(config, backend)
        assert checkpoint_steps(tmp_path / framework / "checkpoints")[-1] == step
        last = metrics_of(tmp_path, framework)[-1]
        assert (last["step"], last["split"]) == (step, "train")
        if step < 30:
            train_until(config, backend, step + 1)
    loop.train(config, backend)
    assert_same_bits(state_at(tmp_path, framework, 30), state_at(undisturbed, framework, 30))
    assert metrics_of(tmp_path, framework) == metrics_of(undisturbed, framework)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, set[int]], None]:
    """Makes the loss, and so every gradient, `value` in the steps (from 0) given: on the device, in both frameworks."""

    def apply(value: float, steps: set[int]) -> None:
        poisoned = TINY.vocab_size - 1  # a token that marks the batch
        make_batch = PreparedData.batch

        def batch(self: PreparedData, n: int, *arguments: Any) -> np.ndarray:
            tokens = make_batch(self, n, *arguments)
            tokens[tokens == poisoned] = 0
            if n in steps:
                tokens[-1, 3] = poisoned
            return tokens

        monkeypatch.setattr(PreparedData, "batch", batch)
        for package, where in ((minillm_jax, jnp.where), (minillm_torch, torch.where)):
            mean_loss = package.train.mean_loss

            def bad_mean_loss(model: Any, tokens: Any, mean_loss: Any = mean_loss, where: Any = where) -> Any:
                return mean_loss(model, tokens) * where((tokens == poisoned).any(), value, 1.0)

            monkeypatch.setattr(package.train, "mean_loss", bad_mean_loss)

    return apply


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("grad_accum", [1, 2])
def test_a_bad_update_is_not_made(
    framework: str, value: float, grad_accum: int, data_config: DataConfig, tmp_path: Path, poison: Any
) -> None:
    """Parameters, moments and Adam's count stay, to the bit."""
    poison(value, {1})
    backend, config = BACKENDS[framework], config_of(data_config, tmp_path, grad_accum=grad_accum)
    data, step = PreparedData(data_config.dir, TINY.vocab_size), backend.make_train_step(config)
    state = backend.init_state(config)
    before = None
    for n in range(3):
        state, metrics = step(state, data.batch(n, 4, 32, 3), 1e-3)
        copies = copy.deepcopy(backend.export_state(config, state))
        if n == 1:
            assert not np.isfinite(float(metrics["loss"]))
            assert_same_bits(copies, before)
        elif n == 2:
            assert np.isfinite(float(metrics["loss"]))
            assert copies.weights["model.norm.weight"].tobytes() != before.weights["model.norm.weight"].tobytes()
        assert int(metrics["updates"]) == (1, 1, 2)[n]
        before = copies


@pytest.mark.parametrize("framework", BACKENDS)
def test_a_bad_gradient_of_a_good_loss(framework: str, data_config: DataConfig, tmp_path: Path) -> None:
    """After one step of a rate far too high, the loss is finite and the gradient's norm is not."""
    backend, config = BACKENDS[framework], config_of(data_config, tmp_path)
    data, step = PreparedData(data_config.dir, TINY.vocab_size), backend.make_train_step(config)
    state, _ = step(backend.init_state(config), data.batch(0, 4, 32, 3), 1e8)
    before = copy.deepcopy(backend.export_state(config, state))
    state, metrics = step(state, data.batch(1, 4, 32, 3), 1e8)
    assert np.isfinite(float(metrics["loss"]))
    assert not np.isfinite(float(metrics["grad_norm"]))
    assert int(metrics["updates"]) == 1
    assert_same_bits(backend.export_state(config, state), before)


@pytest.mark.parametrize("framework", BACKENDS)
def test_a_bad_loss_of_a_good_gradient(
    framework: str, data_config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Infinity added to the loss does not reach the gradient; the update is not made all the same."""
    backend, config = BACKENDS[framework], config_of(data_config, tmp_path)
    mean_loss = backend.train.mean_loss
    monkeypatch.setattr(backend.train, "mean_loss", lambda *arguments: mean_loss(*arguments) + np.inf)
    data, step = PreparedData(data_config.dir, TINY.vocab_size), backend.make_train_step(config)
    state = backend.init_state(config)
    before = copy.deepcopy(backend.export_state(config, state))
    state, metrics = step(state, data.batch(0, 4, 32, 3), 1e-3)
    assert float(metrics["loss"]) == np.inf
    assert np.isfinite(float(metrics["grad_norm"]))
    assert int(metrics["updates"]) == 0
    assert_same_bits(backend.export_state(config, state), before)


@pytest.mark.parametrize("framework", BACKENDS)
def test_a_bad_step_stops_the_run(framework: str, data_config: DataConfig, tmp_path: Path, poison: Any) -> None:
    """Between two log ticks: named with its numbers, and the checkpoint after it is not written."""
    config = config_of(data_config, tmp_path, log_every=10, checkpoint_every=3)
    poison(np.nan, {3})
    message = r"(?s)step 4: .*not finite.*loss nan, gradient norm nan, learning rate 6\.667e-04.*nonfinite skip"
    with pytest.raises(InputError, match=message):
        loop.train(config, BACKENDS[framework])
    assert checkpoint_steps(tmp_path / framework / "checkpoints") == [3]
    skipping = replace(config, train=replace(config.train, nonfinite="skip"))  # what the message offers
    loop.train(skipping, BACKENDS[framework])
    assert read_info(tmp_path / framework / "checkpoints/30").updates == 29


def test_skipped_updates_are_counted(float64: Tier, data_config: DataConfig, tmp_path: Path, poison: Any) -> None:
    """The same in both frameworks, resumed and converted: Adam's count is not the step."""
    poison(np.inf, {2, 3, 11})

    def config(out_dir: Path) -> RunConfig:
        return config_of(data_config, out_dir, compute_dtype="float64", nonfinite="skip")

    moved = moved_run(config, tmp_path / "moved", ["torch", "jax", "torch"], every=10)
    for framework, backend in BACKENDS.items():
        loop.train(config(tmp_path / "whole"), backend)
        rows = [row for row in metrics_of(tmp_path / "whole", framework) if row["split"] == "train"]
        assert [row["step"] for row in rows if row["loss"] is None] == [3, 4, 12]
        assert [row["step"] - row["updates"] for row in rows][::4] == [0, 2, 2, 3, 3, 3, 3, 3]
        assert read_info(tmp_path / "whole" / framework / "checkpoints/30").updates == 27
        whole = losses_of(tmp_path / "whole", framework)
        finite = np.array([loss is not None for loss in whole])
        assert finite.sum() == len(whole) - 3
        assert (np.array([loss is not None for loss in moved]) == finite).all()
        assert_close("losses", moved[finite].astype(float), whole[finite].astype(float), float64.run_loss)


@pytest.mark.parametrize("framework", BACKENDS)
def test_training_goes_on_while_a_checkpoint_is_written(
    framework: str, data_config: DataConfig, tmp_path: Path
) -> None:
    """The first save is held up until five more steps are done: a loop that waited for it would never end."""
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
    loop.train(config_of(data_config, tmp_path), slow)
    assert checkpoint_steps(tmp_path / framework / "checkpoints") == [10, 20, 30]


@pytest.mark.parametrize(
    ("keep_last", "kept", "seen"),
    [
        (2, [6, 12, 14], [[], [2], [2, 4], [4, 6], [6, 8], [6, 8, 10], [6, 10, 12]]),
        (1, [6, 14], [[], [2], [2, 4], [4, 6], [6, 8], [6, 10], [6, 12]]),
        (0, [2, 4, 6, 8, 10, 12, 14], None),
    ],
)
def test_the_last_and_the_best_are_kept(
    keep_last: int,
    kept: list[int],
    seen: list[list[int]] | None,
    data_config: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Held-out losses with their lowest at step 6, that of the last step aside: it outlives the last ones."""
    held_out = iter([3.0, 2.0, 1.0, 2.5, 2.5, 2.5, 0.5])
    monkeypatch.setattr(loop, "evaluate", lambda *_: next(held_out))
    config = config_of(data_config, tmp_path, steps=14, eval_every=2, checkpoint_every=2, keep_last=keep_last)
    before_saves: list[list[int]] = []

    def start_payload(*arguments: Any, **keywords: Any) -> Any:
        before_saves.append(checkpoint_steps(tmp_path / "torch/checkpoints"))
        finish = minillm_torch.start_payload(*arguments, **keywords)

        def slowly() -> None:  # the next step and its evaluation come first
            time.sleep(0.05)
            finish()

        return slowly

    loop.train(config, SimpleNamespace(**(vars(minillm_torch) | {"start_payload": start_payload})))
    assert checkpoint_steps(tmp_path / "torch/checkpoints") == kept
    assert seen is None or before_saves == seen
    assert not list((tmp_path / "torch/checkpoints").glob(".*"))


def test_a_damaged_checkpoint_is_not_counted(data_config: DataConfig, tmp_path: Path) -> None:
    """It takes no good one's place among the last, wherever it lies."""
    config = config_of(data_config, tmp_path, steps=20, checkpoint_every=5, eval_every=20, keep_last=2)
    train_until(config, minillm_torch, 12)
    folder = tmp_path / "torch/checkpoints"
    (folder / "12/model.safetensors").write_bytes(b"damaged")
    train_until(config, minillm_torch, 16)
    assert checkpoint_steps(folder) == [12, 15, 16]
    (folder / "16/model.safetensors").write_bytes(b"damaged")
    (folder / "15/model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"(?s)every checkpoint of the run is damaged.*12.*do: restore"):
        loop.train(config, minillm_torch)


def test_a_commit_is_on_the_disk_before_it_has_its_name(
    data_config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log, then every file and folder of the checkpoint, then its rename, then the folder that holds the name."""
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def watched_fsync(descriptor: int) -> None:
        events.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def watched_rename(self: Path, target: Path) -> Path:
        events.append(("rename", str(self)))
        return rename(self, target)

    config = config_of(data_config, tmp_path, steps=6, checkpoint_every=6)
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    loop.train(config, minillm_jax)
    folder = tmp_path / "jax/checkpoints"
    partial = str(folder / ".6.partial")
    renamed = events.index(("rename", partial))
    inside = {str(path).replace(str(folder / "6"), partial) for path in [folder / "6", *(folder / "6").rglob("*")]}
    assert {path for kind, path in events[:renamed] if path.startswith(partial)} >= inside
    log = events.index(("flush", str(tmp_path / "jax/metrics.jsonl")))
    assert log < min(events.index(("flush", path)) for path in inside)
    assert ("flush", str(folder)) in events[renamed:]


@pytest.mark.parametrize("framework", BACKENDS)
def test_a_held_out_loss_that_is_not_finite(
    framework: str, data_config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stops, and can be resumed as the message says; no row is written twice."""
    config = config_of(data_config, tmp_path, steps=20)
    finite = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *_: np.inf)
    for _ in range(2):
        with pytest.raises(InputError, match="step 10: the held-out loss is not finite"):
            loop.train(config, BACKENDS[framework])
    skipping = replace(config, train=replace(config.train, nonfinite="skip"))
    train_until(skipping, BACKENDS[framework], 15)
    monkeypatch.setattr(loop, "evaluate", finite)
    loop.train(skipping, BACKENDS[framework])
    rows = [(row["step"], row["loss"] is None) for row in metrics_of(tmp_path, framework) if row["split"] == "val"]
    assert rows == [(10, True), (20, False)]


def test_skipping_comes_to_an_end(data_config: DataConfig, tmp_path: Path, poison: Any) -> None:
    poison(np.nan, set(range(4, 30)))
    config = config_of(data_config, tmp_path, nonfinite="skip", checkpoint_every=4)
    with pytest.raises(InputError, match=r"step 24: .*not made, nor the 19 before it"):
        loop.train(config, minillm_torch)


@pytest.mark.parametrize("moment", ["saving", "finished"])
def test_a_signal_after_the_last_step(moment: str, data_config: DataConfig, tmp_path: Path) -> None:
    """It is not forgotten: nothing else is begun."""
    config = config_of(data_config, tmp_path, steps=6)
    if moment == "finished":
        loop.train(config, minillm_torch)

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
        loop.train(config, backend)
    assert checkpoint_steps(tmp_path / "torch/checkpoints") == [6]


def test_garbage_at_the_end_of_the_log(data_config: DataConfig, tmp_path: Path, undisturbed: Path) -> None:
    """As a power cut may leave it; but a bad line among those that the run goes on from is an error."""
    config = config_of(data_config, tmp_path, log_every=3, grad_accum=2)
    train_until(config, minillm_torch, 14)
    log = tmp_path / "torch/metrics.jsonl"
    good = log.read_bytes()
    log.write_bytes(good + b'{"step": 15, "sp\n\x00\xff\x00\n\n\x00')
    loop.train(config, minillm_torch)
    assert metrics_of(tmp_path, "torch") == metrics_of(undisturbed, "torch")
    log.write_bytes(b"\x00\n" + good)
    with pytest.raises(InputError, match=r"not a line of metrics.*\n.*\n.*metrics.jsonl:1"):
        read_metrics(log)


def test_converting_an_older_step_keeps_the_log(data_config: DataConfig, tmp_path: Path) -> None:
    loop.train(config_of(data_config, tmp_path, steps=20), minillm_torch)
    for step, last in ((10, 10), (20, 20)):
        convert("torch", "jax", str(tmp_path / f"torch/checkpoints/{step}"), str(tmp_path))
        assert metrics_of(tmp_path, "jax")[-1]["step"] == last
    convert("torch", "jax", str(tmp_path / "torch/checkpoints/10"), str(tmp_path))
    assert metrics_of(tmp_path, "jax")[-1]["step"] == 20
    (tmp_path / "jax/checkpoints/20").rename(tmp_path / "20")
    train_until(config_of(data_config, tmp_path, steps=20), minillm_jax, 11)
    with pytest.raises(InputError, match="the destination was trained itself"):
        convert("torch", "jax", str(tmp_path / "torch/checkpoints/20"), str(tmp_path))
    (tmp_path / "20").rename(tmp_path / "jax/checkpoints/20")
    (tmp_path / "jax/checkpoints/20/tokenizer.model").write_bytes(b"")
    with pytest.raises(InputError, match="damaged checkpoint"):
        convert("torch", "jax", str(tmp_path / "torch/checkpoints/20"), str(tmp_path))


def test_an_auto_dtype_stays_that_of_the_run(data_config: DataConfig, tmp_path: Path) -> None:
    """A run that began in bfloat16 (as on a GPU) goes on in bfloat16 where `auto` would mean float32."""
    begun = config_of(data_config, tmp_path, steps=6, compute_dtype="bfloat16", checkpoint_every=3)
    train_until(begun, minillm_torch, 3)
    auto = replace(begun, train=replace(begun.train, compute_dtype="auto"))
    loop.train(auto, minillm_torch)
    assert read_info(tmp_path / "torch/checkpoints/6").config.train.compute_dtype == "bfloat16"
    other = replace(begun, train=replace(begun.train, compute_dtype="float32"))
    with pytest.raises(InputError, match="compute_dtype: 'float32', was 'bfloat16'"):
        loop.train(other, minillm_torch)
    path = tmp_path / "config.yaml"  # of a version that stored `auto`
    path.write_text(path.read_text().replace("compute_dtype: bfloat16", "compute_dtype: auto"))
    loop.train(other, minillm_torch)


def test_trackers_hold_what_the_log_holds(
    data_config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard's file, after a stop and a resume: every row once. Weights & Biases, offline: a run is written."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_SILENT", "true")
    config = config_of(data_config, tmp_path, steps=8, eval_every=4, tensorboard=True, wandb="offline")
    train_until(config, minillm_torch, 5)
    loop.train(config, minillm_torch)
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


def test_weights_alone_can_be_trained_on(
    data_config: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint without optimizer state converts, and is trained on as the messages say: Adam starts anew."""
    config = config_of(data_config, tmp_path / "a", steps=6, checkpoint_every=4, log_every=1)
    train_until(config, minillm_torch, 3)
    state, info = state_at(tmp_path / "a", "torch", 3), read_info(tmp_path / "a/torch/checkpoints/3")
    bare = TrainingState(state.weights, {}, {})
    with CheckpointWriter(tmp_path / "bare/torch/checkpoints") as writer:
        tokenizer = tmp_path / "a/tokenizer.model"
        writer.save(info, tokenizer, lambda folder: lambda: minillm_torch.write_payload(folder, config, bare))
    capsys.readouterr()
    convert("torch", "jax", str(tmp_path / "bare/torch/checkpoints/3"), str(tmp_path / "b"))
    assert "training on from here would restart Adam's moments" in capsys.readouterr().err
    moved = replace(config, train=replace(config.train, out_dir=str(tmp_path / "b")))
    loop.train(moved, minillm_jax)
    assert "Adam's moments start again at zero" in capsys.readouterr().err
    assert read_info(tmp_path / "b/jax/checkpoints/4").updates == 1
    first = state_at(tmp_path / "b", "jax", 4)
    rate = learning_rate(config.optim, 3, 6)
    for name, weight in state.weights.items():
        grad = first.exp_avg[name].astype(np.float64) / (1 - config.optim.beta1)
        decay = config.optim.weight_decay if weight.ndim > 1 else 0.0
        expected = weight * (1 - rate * decay) - rate * grad / (np.abs(grad) + config.optim.eps)
        assert_close(name, first.weights[name], expected, 1e-6)


def test_a_failed_save_gets_one_more_chance(data_config: DataConfig, tmp_path: Path) -> None:
    """The disk was full when step 4 was saved; when a signal comes, there is room again, and nothing is lost."""
    failures = iter([True])

    def start_payload(*arguments: Any, **keywords: Any) -> Any:
        if next(failures, False):
            raise OSError(errno.ENOSPC, "No space left on device")
        return minillm_torch.start_payload(*arguments, **keywords)

    def start_late(*arguments: Any, **keywords: Any) -> Any:
        return lambda: start_payload(*arguments, **keywords)()

    config = config_of(data_config, tmp_path, checkpoint_every=4)
    train_until(config, SimpleNamespace(**(vars(minillm_torch) | {"start_payload": start_late})), 7)
    assert checkpoint_steps(tmp_path / "torch/checkpoints") == [7]


def test_another_runs_checkpoint_is_refused(data_config: DataConfig, tmp_path: Path) -> None:
    """Copied into the folder of a run with another configuration."""
    for name, seed in (("a", 3), ("b", 4)):
        loop.train(config_of(data_config, tmp_path / name, steps=6, seed=seed), minillm_torch)
    shutil.rmtree(tmp_path / "b/torch/checkpoints/6")
    shutil.copytree(tmp_path / "a/torch/checkpoints/6", tmp_path / "b/torch/checkpoints/6")
    with pytest.raises(InputError, match=r"(?s)another configuration.*train.seed: 4, was 3.*b/torch/checkpoints/6"):
        loop.train(config_of(data_config, tmp_path / "b", steps=6, seed=4), minillm_torch)


def test_files_beside_a_checkpoint_do_no_harm(data_config: DataConfig, tmp_path: Path) -> None:
    config = config_of(data_config, tmp_path, steps=6)
    checkpoint = loop.train(config, minillm_torch)
    (checkpoint / ".DS_Store").write_bytes(b"")
    assert loop.train(config, minillm_torch) == checkpoint


def test_the_log_of_lost_checkpoints_is_kept(data_config: DataConfig, tmp_path: Path) -> None:
    config = config_of(data_config, tmp_path, steps=6)
    loop.train(config, minillm_torch)
    log = tmp_path / "torch/metrics.jsonl"
    content = log.read_bytes()
    shutil.rmtree(tmp_path / "torch/checkpoints")
    loop.train(config, minillm_torch)
    assert log.with_name("metrics.jsonl.old").read_bytes() == content


def test_speed_is_that_of_the_steps(data_config: DataConfig, tmp_path: Path) -> None:
    """Evaluations, saves and when a step happens to be read do not show in it."""
    config = config_of(data_config, tmp_path, steps=40, eval_every=5, checkpoint_every=7)
    loop.train(config, minillm_torch)
    rows = read_metrics(tmp_path / "torch/metrics.jsonl")
    speeds = np.array([row["tokens_per_second"] for row in rows if row["split"] == "train"])[1:]
    assert speeds.max() <= 5 * np.median(speeds)
