"""Losses and gradients that are not finite: no update is applied, and the run stops or skips the step."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import minillm_jax
import minillm_torch
from minillm_core.config import DataConfig, RunConfig
from minillm_core.data.batches import Batch
from minillm_core.data.prepared import PreparedData
from minillm_core.data.split_loss import SplitLoss
from minillm_core.data.training_data import TrainingData
from minillm_core.errors import InputError
from minillm_core.training import loop
from minillm_core.training.checkpoints import checkpoint_steps, read_info
from minillm_core.training.train import train
from parity_tests.conftest import (
    BACKENDS,
    TINY,
    Tier,
    assert_close,
    assert_same_bits,
    losses_of,
    metrics_of,
    text_run,
    train_until,
)
from parity_tests.test_state import moved_run

pytestmark = pytest.mark.extended


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, set[int]], None]:
    """Multiplies the loss, and so every gradient, by `value` in the given steps (from 0), in both frameworks."""

    def apply(value: float, steps: set[int]) -> None:
        poisoned = TINY.vocab_size - 1  # a token that marks the batch
        make_batch = TrainingData.batch

        def batch(self: TrainingData, n: int, *arguments: Any) -> Batch:
            batch = make_batch(self, n, *arguments)
            batch.tokens_BT[batch.tokens_BT == poisoned] = 0
            if n in steps:
                batch.tokens_BT[-1, 3] = poisoned
            return batch

        monkeypatch.setattr(TrainingData, "batch", batch)
        for package, where in ((minillm_jax, jnp.where), (minillm_torch, torch.where)):
            loss_sums = package.train.loss_sums

            def bad_loss_sums(
                model: Any, batch: Any, *, remat: bool, loss_sums: Any = loss_sums, where: Any = where
            ) -> Any:
                loss, weight = loss_sums(model, batch, remat=remat)
                return loss * where((batch.tokens_BT == poisoned).any(), value, 1.0), weight

            monkeypatch.setattr(package.train, "loss_sums", bad_loss_sums)

    return apply


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("grad_accum", [1, 2])
def test_nonfinite_update_is_not_applied(
    framework: str, value: float, grad_accum: int, data_config: DataConfig, tmp_path: Path, poison: Any
) -> None:
    """Parameters, moments and Adam's count do not change by a single bit."""
    poison(value, {1})
    backend, config = BACKENDS[framework], text_run(data_config, tmp_path, grad_accum=grad_accum)
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
def test_nonfinite_gradient_with_finite_loss(framework: str, data_config: DataConfig, tmp_path: Path) -> None:
    """After one step with a far too high learning rate, the loss is finite and the gradient norm is not."""
    backend, config = BACKENDS[framework], text_run(data_config, tmp_path)
    data, step = PreparedData(data_config.dir, TINY.vocab_size), backend.make_train_step(config)
    state, _ = step(backend.init_state(config), data.batch(0, 4, 32, 3), 1e8)
    before = copy.deepcopy(backend.export_state(config, state))
    state, metrics = step(state, data.batch(1, 4, 32, 3), 1e8)
    assert np.isfinite(float(metrics["loss"]))
    assert not np.isfinite(float(metrics["grad_norm"]))
    assert int(metrics["updates"]) == 1
    assert_same_bits(backend.export_state(config, state), before)


@pytest.mark.parametrize("framework", BACKENDS)
def test_nonfinite_loss_with_finite_gradient(
    framework: str, data_config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Infinity added to the loss does not reach the gradient, but the update is still not applied."""
    backend, config = BACKENDS[framework], text_run(data_config, tmp_path)
    loss_sums = backend.train.loss_sums

    def infinite(*arguments: Any, **options: Any) -> Any:
        loss, weight = loss_sums(*arguments, **options)
        return loss + np.inf, weight

    monkeypatch.setattr(backend.train, "loss_sums", infinite)
    data, step = PreparedData(data_config.dir, TINY.vocab_size), backend.make_train_step(config)
    state = backend.init_state(config)
    before = copy.deepcopy(backend.export_state(config, state))
    state, metrics = step(state, data.batch(0, 4, 32, 3), 1e-3)
    assert float(metrics["loss"]) == np.inf
    assert np.isfinite(float(metrics["grad_norm"]))
    assert int(metrics["updates"]) == 0
    assert_same_bits(backend.export_state(config, state), before)


@pytest.mark.parametrize("framework", BACKENDS)
def test_nonfinite_step_stops_the_run(framework: str, data_config: DataConfig, tmp_path: Path, poison: Any) -> None:
    """Between two logged steps: the message gives the step and its numbers, and no further checkpoint is written."""
    config = text_run(data_config, tmp_path, log_every=10, checkpoint_every=3)
    poison(np.nan, {3})
    message = r"(?s)step 4: .*not finite.*loss nan, gradient norm nan, learning rate 6\.667e-04.*nonfinite skip"
    with pytest.raises(InputError, match=message):
        train(config, BACKENDS[framework])
    assert checkpoint_steps(tmp_path / framework / "checkpoints") == [3]
    skipping = replace(config, train=replace(config.train, nonfinite="skip"))  # what the message offers
    train(skipping, BACKENDS[framework])
    assert read_info(tmp_path / framework / "checkpoints/30").updates == 29


def test_skipped_updates_are_counted(float64: Tier, data_config: DataConfig, tmp_path: Path, poison: Any) -> None:
    """The same in both frameworks, also after a resume and a conversion; Adam's count then differs from the step."""
    poison(np.inf, {2, 3, 11})

    def config(out_dir: Path) -> RunConfig:
        return text_run(data_config, out_dir, compute_dtype="float64", nonfinite="skip")

    moved = moved_run(config, tmp_path / "moved", ["torch", "jax", "torch"], every=10)
    for framework, backend in BACKENDS.items():
        train(config(tmp_path / "whole"), backend)
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
def test_nonfinite_held_out_loss_stops_the_run(
    framework: str, data_config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stops, and can be resumed as the message says; no row is written twice."""
    config = text_run(data_config, tmp_path, steps=20)
    finite = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *_: SplitLoss(np.inf, {}))
    for _ in range(2):
        with pytest.raises(InputError, match="step 10: the held-out loss is not finite"):
            train(config, BACKENDS[framework])
    skipping = replace(config, train=replace(config.train, nonfinite="skip"))
    train_until(skipping, BACKENDS[framework], 15)
    monkeypatch.setattr(loop, "evaluate", finite)
    train(skipping, BACKENDS[framework])
    rows = [(row["step"], row["loss"] is None) for row in metrics_of(tmp_path, framework) if row["split"] == "val"]
    assert rows == [(10, True), (20, False)]


def test_skipped_updates_are_counted_in_a_row(data_config: DataConfig, tmp_path: Path, poison: Any) -> None:
    """27 skipped updates with a good one between them do not stop the run."""
    poison(np.nan, {*range(2, 15), *range(16, 30)})
    config = text_run(data_config, tmp_path, nonfinite="skip", eval_every=30)
    assert read_info(train(config, minillm_torch)).updates == 3


def test_too_many_skipped_updates_stop_the_run(data_config: DataConfig, tmp_path: Path, poison: Any) -> None:
    poison(np.nan, set(range(4, 30)))
    config = text_run(data_config, tmp_path, nonfinite="skip", checkpoint_every=4)
    with pytest.raises(InputError, match=r"step 24: .*not applied, nor were the 19 before it"):
        train(config, minillm_torch)
