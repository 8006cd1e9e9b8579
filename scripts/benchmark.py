"""Checks parity and measures the speed of both frameworks on this machine's GPU or CPU; prints a Markdown report.

Parity is checked in float32 (no TF32) and bfloat16, with the tolerances of the tests. Then a short training of the
preset on its own data, and decoding, are timed. The default preset is mini-llm-50m on a GPU, else quickstart.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both frameworks share the GPU; read at import

import platform
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import minillm_jax
import minillm_torch
from minillm_cli.console import parse_run_config, run, say
from minillm_core.config import RunConfig
from minillm_core.data.batches import Batch
from minillm_core.data.prepared import PreparedData
from minillm_core.data.run_data import prepare_data
from minillm_core.errors import InputError
from minillm_core.files import user_path
from minillm_core.model.params import init_params, training_flops_per_token
from minillm_core.model.tolerance import (
    BFLOAT16_GRADIENT_COSINE,
    BFLOAT16_MEAN_KL,
    BFLOAT16_TOP1_AGREEMENT,
    TOLERANCES,
)
from minillm_core.tensors import Tensors
from minillm_core.training.checkpoints import CheckpointInfo, CheckpointWriter, TrainingState
from minillm_core.training.schedule import learning_rate

BACKENDS = (minillm_jax, minillm_torch)
PARITY_LENGTH = 512


@dataclass(frozen=True)
class BenchmarkConfig(RunConfig):
    """A run to benchmark."""

    steps: int = 20
    """Training steps to time, after two warm-up steps."""
    tokens: int = 256
    """Tokens to decode."""
    decode_batch: int = 16
    """Rows of batched decoding; a single row is timed as well."""
    out: str | None = None
    """Also write the report to this file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.tokens < 1 or self.decode_batch < 1:
            expected = "steps, tokens and decode_batch of 1 or more"
            raise InputError(
                "an option is out of range",
                expected=expected,
                found=f"{self.steps}, {self.tokens}, {self.decode_batch}",
            )


@dataclass(frozen=True)
class Check:
    """One measured quantity and its bound."""

    name: str
    value: float
    bound: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def row(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"| {self.name} | {self.value:.3g} | {sign} {self.bound:g} | {'yes' if self.holds else '**NO**'} |"


def main() -> None:
    on_gpu = torch.cuda.is_available() or jax.default_backend() == "gpu"
    config = parse_run_config(__doc__, BenchmarkConfig, "mini-llm-50m" if on_gpu else "quickstart")
    checks = [*parity(config, "float32"), *parity(config, "bfloat16")]
    table = ["| parity | measured | bound | holds |", "|---|---|---|---|", *(check.row() for check in checks)]
    rates = ["| rate | jax | torch |", "|---|---|---|", *training_rates(config), *decoding_rates(config)]
    report = "\n".join([*header(config), "", *table, "", *rates, ""])
    print(report)
    if config.out:
        out = user_path(config.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(report, encoding="utf-8")
    if not all(check.holds for check in checks):
        raise InputError("the frameworks differ by more than the bounds in the report")


def header(config: BenchmarkConfig) -> list[str]:
    c = config.train
    return [
        f"# {Path(c.out_dir).name} on {jax.devices()[0].device_kind}",
        "",
        f"- {minillm_jax.describe_device()}; {minillm_torch.describe_device()}; Python {platform.python_version()}",
        f"- {platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        f"- jax: {minillm_jax.describe_attention(config)}; torch: {minillm_torch.describe_attention(config)}",
        f"- training: {c.batch_size} x {c.seq_len} tokens in {c.grad_accum} micro-batches, {c.compute_dtype} precision",
    ]


def parity(config: BenchmarkConfig, dtype: str) -> list[Check]:
    """Compares logits and every gradient of both frameworks, from the same initial weights, on random tokens."""
    say(f"parity at {dtype}")
    length = min(PARITY_LENGTH, config.model.context_length)
    settings = replace(config.train, compute_dtype=dtype, batch_size=2, seq_len=length, grad_accum=1)
    one = replace(config, train=settings)
    weights = init_params(one.model, one.train.seed)
    rows = np.random.default_rng(0).integers(0, one.model.vocab_size, (2, settings.seq_len + 1)).astype(np.int32)
    batch = Batch.from_rows(rows)
    logits, grads = {}, {}
    for backend in BACKENDS:
        state = backend.import_state(one, TrainingState(weights, {}, {}), 0)
        logits[backend.FRAMEWORK] = forward(backend, backend.model_of(one, state), batch.tokens_BT)
        state, metrics = backend.make_train_step(one)(state, batch, 0.0)
        grads[backend.FRAMEWORK] = unclipped(one, backend.export_state(one, state), float(metrics["grad_norm"]))
        free_memory()
    ours, theirs = torch.from_numpy(logits["jax"]), torch.from_numpy(logits["torch"])
    pairs = [
        (grads["jax"][name].ravel().astype(np.float64), array.ravel().astype(np.float64))
        for name, array in grads["torch"].items()
    ]
    if dtype == "float32":
        error = float((ours - theirs).abs().max() / max(1.0, float(theirs.abs().max())))
        worst = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)
        return [
            Check("float32 logits, largest error", error, TOLERANCES["float32"].logits),
            Check("float32 gradients, worst relative norm", worst, TOLERANCES["float32"].gradient),
        ]
    log_p, log_q = torch.log_softmax(theirs, -1), torch.log_softmax(ours, -1)
    cosine = min(float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))) for a, b in pairs)
    divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    agreement = float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    return [
        Check("bfloat16 mean KL, nat", divergence, BFLOAT16_MEAN_KL),
        Check("bfloat16 top-1 agreement", agreement, BFLOAT16_TOP1_AGREEMENT, at_least=True),
        Check("bfloat16 gradients, worst cosine", cosine, BFLOAT16_GRADIENT_COSINE, at_least=True),
    ]


def forward(backend: Any, model: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits in float64."""
    if backend is minillm_jax:
        return np.asarray(model(jnp.asarray(tokens))[0]).astype(np.float64)
    with torch.inference_mode():
        device = model.model.norm.weight.device
        return model(torch.from_numpy(tokens).long().to(device))[0].double().cpu().numpy()


def unclipped(config: RunConfig, state: TrainingState, grad_norm: float) -> Tensors:
    """The gradients of the first update, unclipped: the first moment is (1 - beta1) times the clipped gradient."""
    factor = min(1.0, config.optim.grad_clip / (grad_norm + 1e-6)) * (1 - config.optim.beta1)
    return {name: moment / factor for name, moment in state.exp_avg.items()}


def training_rates(config: BenchmarkConfig) -> list[str]:
    """Tokens per second of the preset's train step on its own data, the loss after it, and the time to save."""
    prepare_data(config.data, config.model.vocab_size)
    data = PreparedData(config.data.dir, config.model.vocab_size)
    c = config.train
    speeds, losses, saves = [], [], []
    for backend in BACKENDS:
        say(f"training, {backend.FRAMEWORK}")
        step, state = backend.make_train_step(config), backend.init_state(config)
        batches = [data.batch(n, c.batch_size, c.seq_len, c.seed) for n in range(config.steps + 2)]
        for n, batch in enumerate(batches):
            if n == 2:
                backend.export_state(config, state)  # waits for the device
                started = time.perf_counter()
            state, metrics = step(state, batch, learning_rate(config.optim, n, c.steps))
        losses.append(float(metrics["loss"]))
        speeds.append(config.steps * c.tokens_per_step / (time.perf_counter() - started))
        saves.append(saving_times(backend, config, state, data))
        del state
        free_memory()
    flops = training_flops_per_token(config.model, c.seq_len)
    return [
        f"| training, token/s | {speeds[0]:,.0f} | {speeds[1]:,.0f} |",
        f"| training, TFLOP/s of matrix products | {speeds[0] * flops / 1e12:.3g} | {speeds[1] * flops / 1e12:.3g} |",
        f"| loss after {config.steps + 2} steps | {losses[0]:.4f} | {losses[1]:.4f} |",
        "| saving a checkpoint: seconds training waits, of total | "
        + " | ".join(f"{waits:.3f} of {whole:.3f}" for waits, whole in saves)
        + " |",
    ]


def saving_times(backend: Any, config: BenchmarkConfig, state: Any, data: PreparedData) -> tuple[float, float]:
    """Seconds that the train loop waits, and seconds until the checkpoint is committed, both for the second save."""
    run_config = RunConfig(config.model, config.optim, config.data, config.train)
    with tempfile.TemporaryDirectory() as folder, CheckpointWriter(Path(folder)) as writer:
        for step in (1, 2):
            started = time.perf_counter()
            info = CheckpointInfo(backend.FRAMEWORK, step, step, run_config, data.hashes())
            start_payload = partial(backend.start_payload, config=config, state=state)
            writer.save(info, data.dir, start_payload)
            waited = time.perf_counter() - started
            writer.wait()
    return waited, time.perf_counter() - started


def decoding_rates(config: BenchmarkConfig) -> list[str]:
    """Tokens per second of greedy decoding, over all rows, without the time for compilation."""
    weights = init_params(config.model, config.train.seed)
    tokenizer = PreparedData(config.data.dir, config.model.vocab_size).tokenizer
    tokenizer.end_ids = frozenset()  # untrained weights might end the text at any token
    dtype = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    rows = []
    for batch in (1, config.decode_batch):
        speeds = []
        for backend in BACKENDS:
            say(f"decoding, {backend.FRAMEWORK}, batch {batch}")
            model = build(backend, config, weights, dtype)
            generator = backend.Generator(model, tokenizer)
            prompts = [[1, *range(10, 40)]] * batch
            speeds.append(batch * decode_speed(generator, prompts, config.tokens))
            free_memory()
        rows.append(f"| decoding {dtype}, batch {batch}, token/s | {speeds[0]:,.0f} | {speeds[1]:,.0f} |")
    return rows


def build(backend: Any, config: RunConfig, weights: Tensors, dtype: str) -> Any:
    if backend is minillm_jax:
        return backend.build_model(config.model, weights, param_dtype=jnp.dtype(dtype), compute_dtype=jnp.dtype(dtype))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch_dtype = getattr(torch, dtype)
    return backend.build_model(config.model, weights, param_dtype=torch_dtype, compute_dtype=torch_dtype, device=device)


def decode_speed(generator: Any, prompts: list[list[int]], n_tokens: int) -> float:
    """New tokens per second of one row, with prefill in the time. The second call is timed; the first one compiles."""
    for _ in range(2):
        started = time.perf_counter()
        generator.generate(prompts, max_new_tokens=n_tokens, temperature=0.0)
    return n_tokens / (time.perf_counter() - started)


def free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    run(main, as_script=True)
