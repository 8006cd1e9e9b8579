"""Parity in bfloat16: distributions, gradients and a training run, within bounds that were measured, not derived."""

import importlib
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import minillm_jax
import minillm_torch
from minillm_core.config import ModelConfig, OptimConfig, RunConfig
from minillm_core.data.batches import Batch
from minillm_core.model.params import init_params
from minillm_core.model.tolerance import BFLOAT16_GRADIENT_COSINE, BFLOAT16_MEAN_KL, BFLOAT16_TOP1_AGREEMENT
from minillm_core.tensors import Tensors
from minillm_core.training.backend import TrainStep
from minillm_core.training.checkpoints import TrainingState
from minillm_core.training.schedule import learning_rate
from minillm_jax.loss import token_losses as jax_token_losses
from minillm_torch.loss import token_losses as torch_token_losses
from parity_tests.conftest import (
    BACKENDS,
    BFLOAT16,
    MODELS,
    TIERS,
    Pair,
    pair_of,
    random_tokens,
    random_weights,
    run_config,
    to_numpy,
    to_torch,
)
from parity_tests.test_gradients import gradients


def bfloat16_pair(config: ModelConfig, seed: int = 0) -> Pair:
    """Both models with float32 parameters and bfloat16 computation.

    Not with initial weights: there the logits hardly depend on attention, and a model without it passed these bounds.
    """
    weights = random_weights(config, seed, sharpness=1.0)
    return Pair(
        config,
        BFLOAT16,
        weights,
        minillm_jax.build_model(config, weights, param_dtype=jnp.float32, compute_dtype=jnp.bfloat16),
        minillm_torch.build_model(config, weights, param_dtype=torch.float32, compute_dtype=torch.bfloat16),
    )


def test_distributions(config: ModelConfig) -> None:
    """Mean KL <= 1e-3 nat (measured: 6e-5) and top-1 agreement >= 97 % (measured: 97.4 to 98.0 %) at T = 512."""
    ours, theirs = (to_torch(x, torch.float64) for x in bfloat16_pair(config).logits(random_tokens(config, 4, 512)))
    log_p, log_q = torch.log_softmax(theirs, -1), torch.log_softmax(ours, -1)
    divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    agreement = float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    assert divergence <= BFLOAT16_MEAN_KL, f"mean KL {divergence:.1e} nat"
    assert agreement >= BFLOAT16_TOP1_AGREEMENT, f"top-1 agreement {agreement:.1%}"


def test_gradients(config: ModelConfig) -> None:
    """Cosine similarity >= 0.999 for the gradient of every parameter."""
    ours, theirs = gradients(bfloat16_pair(config), random_tokens(config, 4, 257))
    for name in ours:
        a, b = ours[name].astype(np.float64).ravel(), theirs[name].astype(np.float64).ravel()
        cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
        assert cosine >= BFLOAT16_GRADIENT_COSINE, f"{name}: cosine {cosine:.5f}"


STEPS = 50
CONFIG = MODELS["gqa"]
CURVES = 1.5e-3
"""How far two loss curves may be apart at any step, in nats. Measured over 8 seeds and 50 steps: at most 7.0e-4 between
the frameworks, 6.9e-4 (JAX) and 7.0e-4 (PyTorch) between bfloat16 and float32."""
MISTAKES = {
    # fault: (change of the learning rate, change of the parameters after each step); measured: 7e-3, 2.4e-2
    "learning rate 1 % off": (1.01, lambda array: array),
    "parameters kept in bfloat16": (1.0, lambda array: array.astype(jnp.bfloat16).astype(np.float32)),
}


@lru_cache
def loss_curve(framework: str, dtype: str, seed: int, mistake: str | None = None) -> np.ndarray:
    backend = BACKENDS[framework]
    run = run_config(
        CONFIG, steps=STEPS, seq_len=32, batch_size=4, compute_dtype=dtype, optim=OptimConfig(1e-3, 1e-4, 10)
    )
    factor, change = MISTAKES[mistake] if mistake else (1.0, None)
    state = backend.import_state(run, TrainingState(init_params(CONFIG, seed), {}, {}), 0)
    step = backend.make_train_step(run)
    losses = []
    for n in range(STEPS):
        batch = Batch.from_rows(random_tokens(CONFIG, 4, 33, seed=100 * seed + n % 10))
        state, metrics = step(state, batch, factor * learning_rate(run.optim, n, STEPS))
        losses.append(float(metrics["loss"]))
        if change:
            kept = backend.export_state(run, state)
            kept = replace(kept, weights={name: change(array) for name, array in kept.weights.items()})
            state = backend.import_state(run, kept, n + 1)
    return np.array(losses)


def check_curves(seed: int, **mistakes: str) -> None:
    """Both curves in bfloat16 stay together, and with the curve in float32 (of PyTorch; JAX's is the same to 1e-4)."""
    ours, theirs = (loss_curve(framework, "bfloat16", seed, mistakes.get(framework)) for framework in BACKENDS)
    exact = loss_curve("torch", "float32", seed)
    assert exact[-1] < exact[0] - 0.5, "little was learnt, so little was compared"
    for name, a, b in (("jax and torch", ours, theirs), ("jax and float32", ours, exact), ("torch", theirs, exact)):
        assert (error := np.abs(a - b).max()) <= CURVES, f"{name}: the losses differ by {error:.1e} nat"


@pytest.mark.parametrize("seed", [0, 1])
def test_loss_curves(seed: int) -> None:
    """50 steps: at every step, both losses in bfloat16 are within 1.5e-3 nat of each other and of float32."""
    check_curves(seed)


@pytest.mark.extended
@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_loss_curves_show_a_mistake(mistake: str, framework: str) -> None:
    with pytest.raises(AssertionError, match="the losses differ"):
        check_curves(0, **{framework: mistake})


def rounding_errors(config: ModelConfig) -> float:
    """How much more PyTorch's gradients lose to bfloat16 than JAX's: the mean ratio of their errors against float32."""
    ratios = []
    for seed in range(8):
        tokens, errors = random_tokens(config, 4, 65, seed), {}
        pairs = (bfloat16_pair(config, seed), pair_of(config, TIERS["float32"], bfloat16_pair(config, seed).weights))
        rounded, exact = (gradients(pair, tokens) for pair in pairs)
        for framework, a, b in zip(BACKENDS, rounded, exact, strict=True):
            errors[framework] = [np.linalg.norm(a[name] - b[name]) / np.linalg.norm(b[name]) for name in b]
        ratios.append(np.log(np.divide(errors["torch"], errors["jax"])).mean())
    return float(np.exp(np.mean(ratios)))


ROUNDING = 0.03
"""Measured over 8 seeds: ratios of 1.002 to 1.013 for the five configurations."""


def test_rounding_errors_are_equal() -> None:
    """Both frameworks round in the same places: their gradients are equally far from those in float32."""
    ratio = rounding_errors(CONFIG)
    assert abs(ratio - 1) <= ROUNDING, f"torch loses {ratio:.3f} times as much as jax"


@pytest.mark.extended
@pytest.mark.parametrize("framework", BACKENDS)
def test_rounding_errors_show_a_norm_in_bfloat16(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured: 11 % in PyTorch, whose kernel for the norm is more exact inside, and 35 % in JAX."""
    layers = importlib.import_module(f"minillm_{framework}.layers")
    monkeypatch.setattr(layers, "at_least_float32", lambda dtype: dtype)
    config = replace(CONFIG, rope_theta=4e5 + len(framework))  # JAX keeps what it has compiled for a configuration
    ratio = rounding_errors(config)
    assert (ratio > 1 + 1.5 * ROUNDING) if framework == "torch" else (ratio < 1 - 1.5 * ROUNDING), ratio


@lru_cache
def step_of(framework: str, grad_accum: int) -> tuple[RunConfig, TrainStep]:
    optim = OptimConfig(1e-3, 1e-4, 2, grad_clip=1e9)
    run = run_config(CONFIG, batch_size=grad_accum, grad_accum=grad_accum, compute_dtype="bfloat16", optim=optim)
    return run, BACKENDS[framework].make_train_step(run)


def moments(framework: str, rows: np.ndarray, weights: Tensors, hook: Any = None) -> Tensors:
    """The first moments after one update, which are proportional to its gradient: nothing is clipped."""
    run, step = step_of(framework, len(rows))
    state = BACKENDS[framework].import_state(run, TrainingState(weights, {}, {}), 0)
    if hook:
        for param in state.model.parameters():
            param.register_post_accumulate_grad_hook(hook)
    state, _ = step(state, Batch.from_rows(rows), 1e-3)
    return BACKENDS[framework].export_state(run, state).exp_avg


def accumulation_error(framework: str, hook: Any = None) -> float:
    """Relative norm of the difference between 8 accumulated gradients and the mean of 8 single ones: the median of the
    tensors, and the smallest of three seeds.

    Not the largest: JAX compiles one row and a loop over 8 rows to different programs. With some seeds an activation
    of one row is then rounded to the other neighbour in bfloat16, and the gradients differ by 1e-3.
    """
    by_seed = []
    for seed in range(3):
        weights, rows = random_weights(CONFIG, seed, sharpness=1.0), random_tokens(CONFIG, 8, 33, seed)
        together, errors = moments(framework, rows, weights, hook), []
        single = [moments(framework, row[None], weights) for row in rows]
        for name, array in together.items():
            mean = np.mean([tensors[name] for tensors in single], axis=0)
            errors.append(np.linalg.norm(array - mean) / np.linalg.norm(mean))
        by_seed.append(np.median(errors))
    return float(min(by_seed))


@pytest.mark.extended
@pytest.mark.parametrize("framework", BACKENDS)
def test_gradients_are_accumulated_in_float32(framework: str) -> None:
    """Single gradients are rounded to bfloat16, their sum is not (measured: 7e-8)."""
    assert accumulation_error(framework) <= 1e-5


def round_gradient(param: torch.Tensor) -> None:
    param.grad.copy_(param.grad.bfloat16())


@pytest.mark.extended
def test_accumulation_in_bfloat16_is_caught() -> None:
    error = accumulation_error("torch", hook=round_gradient)
    assert error > 1e-3, error


def test_loss_is_not_computed_in_bfloat16() -> None:
    """bfloat16 logits give the float64 loss: both frameworks promote to a higher precision before the logarithm."""
    logits = torch.randn(2, 40, 300, generator=torch.Generator().manual_seed(0)).mul(4).bfloat16()
    targets = random_tokens(MODELS["gqa"], 2, 40) % 300
    expected = (
        torch.logsumexp(logits.double(), -1) - torch.gather(logits.double(), -1, to_torch(targets)[..., None])[..., 0]
    )
    theirs = torch_token_losses(logits, to_torch(targets))
    ours = jax_token_losses(jnp.asarray(logits.float().numpy(), jnp.bfloat16), jnp.asarray(targets))
    for framework, losses in (("jax", ours), ("torch", theirs)):
        assert np.abs(to_numpy(losses) - expected.numpy()).max() <= 1e-5, framework
