"""Every gradient by name, one clipped AdamW update, and whole training runs."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import minillm_jax
import minillm_torch
from minillm_core.config import OptimConfig, RunConfig
from minillm_core.data.batches import Batch
from minillm_core.model.params import init_params
from minillm_core.training.checkpoints import TrainingState
from minillm_core.training.schedule import learning_rate
from minillm_jax import weights as jax_weights
from minillm_jax.loss import mean_loss as jax_mean_loss
from minillm_jax.optim import clip_by_global_norm as jax_clip_by_global_norm
from minillm_torch.loss import mean_loss as torch_mean_loss
from minillm_torch.optim import clip_by_global_norm as torch_clip_by_global_norm
from parity_tests.conftest import (
    MODELS,
    Pair,
    Tier,
    assert_close,
    assert_close_norm,
    random_tokens,
    random_weights,
    run_config,
    torch_batch,
)

RATE = 1e-2


@partial(jax.jit, static_argnums=0)
def _jax_gradient(
    graphdef: Any, params: jax_weights.Params, rope: jax_weights.Params, batch: Batch
) -> jax_weights.Params:
    return jax.grad(lambda p: jax_mean_loss(jax_weights.merge_model(graphdef, p, rope), batch))(params)


def gradients(pair: Pair, tokens: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """d loss / d parameter by canonical name, both frameworks."""
    pair.torch.zero_grad()
    torch_mean_loss(pair.torch, torch_batch(tokens)).backward()
    theirs = {path: param.grad for path, param in pair.torch.named_parameters()}
    ours = _jax_gradient(*jax_weights.split_model(pair.jax), Batch.from_rows(tokens))
    return minillm_jax.to_canonical(pair.config, ours), minillm_torch.to_canonical(pair.config, theirs)


@pytest.mark.parametrize("length", [9, 300])
def test_every_gradient(pair: Pair, length: int) -> None:
    ours, theirs = gradients(pair, random_tokens(pair.config, 2, length + 1))
    for name in ours:
        assert_close_norm(name, ours[name], theirs[name], pair.tier.gradient)


def test_gradient_against_finite_differences(float64: Tier) -> None:
    """Both gradients could be wrong in the same way; a numerical derivative of the loss would show it."""
    config = MODELS["gqa"]
    weights = {name: array.astype(np.float64) for name, array in random_weights(config).items()}
    tokens = random_tokens(config, 1, 33)
    rng = np.random.default_rng(5)
    direction = {name: rng.standard_normal(array.shape) for name, array in weights.items()}

    def loss_at(t: float) -> float:
        moved = {name: array + t * direction[name] for name, array in weights.items()}
        model = minillm_torch.build_model(config, moved, param_dtype=torch.float64, compute_dtype=torch.float64)
        with torch.no_grad():
            return float(torch_mean_loss(model, torch_batch(tokens)))

    model = minillm_torch.build_model(config, weights, param_dtype=torch.float64, compute_dtype=torch.float64)
    torch_mean_loss(model, torch_batch(tokens)).backward()
    exact = sum(float((param.grad.numpy() * direction[name]).sum()) for name, param in model.named_parameters())
    h = 1e-5
    measured = (8 * (loss_at(h) - loss_at(-h)) - (loss_at(2 * h) - loss_at(-2 * h))) / (12 * h)
    assert abs(measured - exact) <= 1e-7 * abs(exact), f"finite differences {measured}, gradient {exact}"


def run_both(
    config: RunConfig, tier: Tier, batches: list[np.ndarray], start: TrainingState
) -> dict[str, tuple[list[float], list[float], TrainingState]]:
    """Train each framework on the same batches; return its losses, gradient norms and final state."""
    config = replace(config, train=replace(config.train, compute_dtype=tier.name))
    results = {}
    for backend in (minillm_jax, minillm_torch):
        state = backend.import_state(config, start, 0)
        step = backend.make_train_step(config)
        losses, norms = [], []
        for n, tokens in enumerate(batches):
            state, metrics = step(state, Batch.from_rows(tokens), learning_rate(config.optim, n, len(batches)))
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
        results[backend.FRAMEWORK] = losses, norms, backend.export_state(config, state)
    return results


@pytest.mark.parametrize(("name", "grad_clip"), [*((name, 0.1) for name in MODELS), ("gqa", 1e6)])
def test_one_update(name: str, tier: Tier, grad_clip: float) -> None:
    """Both moments and the new weights after one update, and the update against AdamW written out in numpy."""
    config = MODELS[name]
    optim = OptimConfig(RATE, RATE, 0, weight_decay=0.3, beta1=0.8, beta2=0.9, eps=1e-4, grad_clip=grad_clip)
    run = run_config(config, optim=optim, seq_len=48, batch_size=2)
    weights = random_weights(config)
    tokens = random_tokens(config, 2, 49)
    results = run_both(run, tier, [tokens], TrainingState(weights, {}, {}))
    (_, (norm_jax,), ours), (_, (norm_torch,), theirs) = results["jax"], results["torch"]
    assert abs(norm_jax - norm_torch) <= tier.gradient * norm_torch
    assert (norm_torch > grad_clip) == (grad_clip < 1), "the gradient norm must exceed the small grad_clip only"
    for group in ("exp_avg", "exp_avg_sq", "weights"):
        for name, array in getattr(ours, group).items():
            assert_close_norm(f"{group} {name}", array, getattr(theirs, group)[name], tier.gradient)
    factor = min(1.0, grad_clip / (norm_torch + 1e-6))
    for name, moment in theirs.exp_avg.items():
        grad = moment.astype(np.float64) / (1 - optim.beta1)  # clipped
        decay = optim.weight_decay if grad.ndim > 1 else 0.0
        expected = weights[name] * (1 - RATE * decay) - RATE * grad / (np.abs(grad) + optim.eps)
        assert_close_norm(f"AdamW {name}", theirs.weights[name], expected, max(tier.gradient, 1e-7))
    total = np.sqrt(sum((m.astype(np.float64) ** 2).sum() for m in theirs.exp_avg.values())) / (1 - optim.beta1)
    assert abs(total - norm_torch * factor) <= (1e-11 if tier.name == "float64" else 1e-4) * total, (
        "clipping scales by min(1, max_norm / (norm + 1e-6))"
    )


def test_gradient_norm_is_accurate() -> None:
    """4 M float32 gradients, as in `quickstart`: torch's own norm is off by 8e-5, which clipping would pass on."""
    grad = np.random.default_rng(0).standard_normal((2000, 2000)).astype(np.float32)
    exact = np.linalg.norm(grad.astype(np.float64))
    _, ours = jax_clip_by_global_norm({"a": jax.numpy.asarray(grad)}, 1.0)
    _, theirs = torch_clip_by_global_norm({"a": torch.from_numpy(grad)}, 1.0)
    assert float(ours) == pytest.approx(exact, rel=1e-6)
    assert float(theirs) == pytest.approx(exact, rel=1e-6)


def test_hundred_steps(tier: Tier) -> None:
    """The same run in both frameworks: every loss, every gradient norm, the final parameters."""
    config = MODELS["gqa"]
    run = run_config(config, steps=100, seq_len=64, batch_size=4, optim=OptimConfig(1e-3, 1e-4, 10))
    batches = [random_tokens(config, 4, 65, seed=n % 10) for n in range(100)]  # repeats, so that there is much to learn
    results = run_both(run, tier, batches, TrainingState(init_params(config, 0), {}, {}))
    (losses_jax, norms_jax, ours), (losses_torch, norms_torch, theirs) = results["jax"], results["torch"]
    assert losses_torch[-1] < losses_torch[0] - 1, "nothing was learnt, so little was compared"
    assert_close("losses", np.array(losses_jax), np.array(losses_torch), tier.run_loss)
    assert_close("gradient norms", np.array(norms_jax), np.array(norms_torch), 10 * tier.run_loss)
    if tier.name == "float64":
        for name, array in ours.weights.items():
            assert_close(f"final {name}", array, theirs.weights[name], 1e-10)


@pytest.mark.parametrize("backend", [minillm_jax, minillm_torch], ids=["jax", "torch"])
def test_accumulation_equals_one_large_batch(backend: object, float64: Tier) -> None:
    config = MODELS["gqa"]
    start = TrainingState(random_weights(config), {}, {})
    batches = [random_tokens(config, 8, 33, seed=n) for n in range(3)]
    results = []
    for grad_accum in (1, 4):
        run = run_config(config, batch_size=8, seq_len=32, grad_accum=grad_accum, compute_dtype="float64")
        state = backend.import_state(run, start, 0)
        step = backend.make_train_step(run)
        for tokens in batches:
            state, metrics = step(state, Batch.from_rows(tokens), 1e-3)
        results.append((float(metrics["loss"]), backend.export_state(run, state)))
    (whole_loss, whole), (split_loss, split) = results
    assert abs(whole_loss - split_loss) <= 1e-12
    for name, array in whole.weights.items():
        assert_close(name, split.weights[name], array, 1e-12)


def test_train_state_is_donated() -> None:
    """JAX reuses the memory of the old state, which is deleted by the step."""
    config = run_config(MODELS["gqa"])
    state = minillm_jax.init_state(config)
    minillm_jax.make_train_step(config)(state, Batch.from_rows(random_tokens(config.model, 4, 33)), 1e-3)
    assert all(array.is_deleted() for array in jax.tree.leaves(state))


@pytest.mark.parametrize("backend", [minillm_jax, minillm_torch], ids=["jax", "torch"])
def test_save_in_progress_keeps_its_state(backend: object, tmp_path: Path) -> None:
    """Training steps taken during the save do not change what is saved."""
    config = run_config(MODELS["gqa"])
    state, step = backend.init_state(config), backend.make_train_step(config)
    state, _ = step(state, Batch.from_rows(random_tokens(config.model, 4, 33)), 1e-2)
    exported = backend.export_state(config, state)
    expected = {name: array.copy() for name, array in exported.weights.items()}
    moments = {name: array.copy() for name, array in exported.exp_avg.items()}
    finish = backend.start_payload(tmp_path, config, state)
    for seed in range(3):
        state, _ = step(state, Batch.from_rows(random_tokens(config.model, 4, 33, seed)), 1e-2)
    finish()
    saved = backend.read_payload(tmp_path, config)
    for name, array in expected.items():
        assert np.array_equal(saved.weights[name], array), name
        assert np.array_equal(saved.exp_avg[name], moments[name]), name
        assert not np.array_equal(backend.export_state(config, state).weights[name], array), "no weight changed"
