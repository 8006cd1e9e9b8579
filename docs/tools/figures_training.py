"""The figures of the pages on training: the optimizer, the learning rate, the number formats."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from drawing import BLUE, GREEN, GREY, RED, figure, finish
from matplotlib.figure import Figure

from minillm_core.config import ModelConfig, OptimConfig, load_config
from minillm_core.model.params import param_table
from minillm_core.training.schedule import learning_rate
from minillm_jax.optim import apply_update, make_optimizer
from minillm_jax.weights import Params, param_paths

RUN = load_config("mini-llm-50m")
SMALL = ModelConfig(vocab_size=4, context_length=2, width=64, n_layers=1, n_heads=1, n_kv_heads=1, hidden=64)
PATHS = param_paths(SMALL)
NORM, MATRIX = PATHS["model.norm.weight"], PATHS["model.layers.0.self_attn.q_proj.weight"]


@figure
def adamw(canvas: Figure) -> None:
    """Left: the first updates for a constant gradient. Right: two kinds of weight decay, two sizes of gradients."""
    sizes, decay = canvas.subplots(1, 2)
    steps = np.arange(1, 41)
    for beta2, color in ((0.999, RED), (0.95, BLUE)):
        corrected, plain = first_updates(OptimConfig(1.0, 1.0, 0, beta2=beta2), len(steps))
        sizes.plot(steps, plain, color=color, label=f"not corrected, β₂ = {beta2}")
    sizes.plot(steps, corrected, color=GREEN, label="corrected, any β₂")
    sizes.set(ylim=(0, 9.5))
    finish(sizes, xlabel="update number t", ylabel="update / learning rate", title="a constant gradient")
    for gradient, style in ((0.1, "-"), (10.0, "--")):
        for coupled, color, name in ((False, BLUE, "AdamW"), (True, RED, "Adam with L2")):
            label = f"{name}, gradients ±{gradient:g}"
            decay.plot(mean_weight(gradient, coupled=coupled), color=color, linestyle=style, label=label)
    decay.set(ylim=(-0.05, 1.9))
    finish(decay, xlabel="updates", ylabel="mean of the weights", title="weight decay of noisy weights")


def first_updates(optim: OptimConfig, steps: int) -> tuple[list[float], list[float]]:
    """The updates of a norm scale, which does not decay, in learning rates: with bias correction, and without it."""
    gradient = ones()
    optimizer = make_optimizer(optim, SMALL)
    state, corrected, plain = optimizer.init(gradient), [], []
    for _ in range(steps):
        updates, state = optimizer.update(gradient, state, gradient)
        corrected.append(float(updates[NORM][0]))
        plain.append(float(state[0].mu[NORM][0] / (jnp.sqrt(state[0].nu[NORM][0]) + optim.eps)))
    return corrected, plain


def mean_weight(size: float, *, coupled: bool, rate: float = 1e-2, decay: float = 0.1, steps: int = 300) -> list[float]:
    """The mean of a matrix that starts at 1. Its gradients are noise, plus the decay if that is `coupled`."""
    optimizer = make_optimizer(OptimConfig(rate, rate, 0, weight_decay=0.0 if coupled else decay), SMALL)
    update = jax.jit(partial(apply_update, optimizer, learning_rate=rate, finite=True))
    params, rng, means = ones(), np.random.default_rng(0), []
    state = optimizer.init(params)
    for _ in range(steps):
        noise = size * rng.choice([-1, 1], params[MATRIX].shape)
        gradient = noise + (decay * params[MATRIX] if coupled else 0)
        params, state = update(params, params | {MATRIX: gradient.astype(np.float32)}, state)
        means.append(float(params[MATRIX].mean()))
    return means


def ones() -> Params:
    shapes = {name: spec.shape for name, spec in param_table(SMALL).items()}
    return {path: jnp.ones(shapes[name][::-1]) for name, path in PATHS.items()}


@figure
def learning_rates(canvas: Figure) -> None:
    """Left: the schedule of mini-llm-50m. Right: the first updates of a short one, and two off by one."""
    whole, start = canvas.subplots(1, 2)
    steps = np.arange(0, RUN.train.steps, 20)
    whole.plot(steps, [1e4 * learning_rate(RUN.optim, int(n), RUN.train.steps) for n in steps], color=BLUE)
    whole.axvline(RUN.optim.warmup_steps, color=GREY, linewidth=0.8)
    whole.text(RUN.optim.warmup_steps + 150, 0.3, "end of warm-up", fontsize=8, color=GREY)
    whole.set(ylim=(0, 6.6))
    finish(whole, xlabel="step", ylabel="learning rate / 1e-4", title="mini-llm-50m")
    optim, n_steps = OptimConfig(1.0, 0.1, 4), 12
    from_zero = optax.warmup_cosine_decay_schedule(0.0, 1.0, optim.warmup_steps, n_steps, 0.1)
    steps = np.arange(n_steps)
    ours = [learning_rate(optim, int(n), n_steps) for n in steps]
    start.plot(steps, ours, "o-", color=BLUE, markersize=4, label="this project")
    start.plot(steps, [float(from_zero(n)) for n in steps], "s--", color=RED, markersize=3, label="optax, from 0")
    skipped = [learning_rate(optim, int(n) + 1, n_steps) for n in steps]
    start.plot(steps, skipped, "^:", color=GREEN, markersize=3, label="first value skipped")
    start.set(ylim=(0, 1.45))
    finish(start, xlabel="step", ylabel="learning rate / peak", title="4 warm-up steps of 12")


@figure
def precision(canvas: Figure) -> None:
    """Left: the distance of neighbouring numbers. Right: a weight of 1 after 100 updates of the learning rate."""
    spacing, weight = canvas.subplots(1, 2)
    values = 2.0 ** np.arange(-12, 13)
    for name, color in (("bfloat16", RED), ("float32", BLUE), ("float64", GREEN)):
        steps = values * float(ml_dtypes.finfo(name).eps)
        spacing.loglog(values, steps, color=color, label=name)
    spacing.set(ylim=(1e-20, 1e8))
    finish(spacing, xlabel="value", ylabel="distance to the next number", title="spacing")
    rate = RUN.optim.learning_rate
    for dtype, color in ((jnp.bfloat16, RED), (jnp.float32, BLUE)):
        kept = [jnp.ones((), dtype)]
        for _ in range(100):
            kept.append((kept[-1] - rate).astype(dtype))
        weight.plot([float(x) for x in kept], color=color, label=f"weight in {jnp.dtype(dtype).name}")
    weight.set(ylim=(0.93, 1.02))
    finish(weight, xlabel="updates", ylabel="weight", title="updates of 6e-4")
