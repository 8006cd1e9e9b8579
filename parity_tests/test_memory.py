"""The memory of a train step: what PyTorch keeps for the backward pass, and what XLA allocates."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from minillm_core.config import ModelConfig, RunConfig, load_config
from minillm_core.data.batches import Batch
from minillm_core.training.plan import activation_bytes
from minillm_jax import loss as jax_loss
from minillm_jax.model import abstract_model
from minillm_jax.train import init_state, jit_train_step
from minillm_jax.weights import Params, merge_model, model_structure, split_model
from minillm_torch import attention as torch_attention
from minillm_torch import loss as torch_loss
from minillm_torch.model import MiniLLM
from parity_tests.conftest import MODELS, run_config

GB = 1e9


@contextmanager
def recording_saved_bytes() -> Iterator[dict[int, torch.UntypedStorage]]:
    """The storages that are saved for the backward pass; each is counted once."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield storages


def saved_bytes(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that the forward pass of a micro-batch keeps, in bfloat16, without the weights and their casts.

    PyTorch's fused attention runs on a CPU too, and keeps the same tensors as on a GPU.
    """
    monkeypatch.setattr(torch_attention, "_kernel_limit", lambda *_: None)
    model = MiniLLM(config.model, param_dtype=torch.float32, compute_dtype=torch.bfloat16)
    ids = torch.zeros((config.train.batch_size, config.train.seq_len), dtype=torch.int64)
    batch = Batch(ids, ids, torch.ones(ids.shape))
    with recording_saved_bytes() as storages:
        torch_loss.loss_sums(model, batch, remat=config.train.remat)
    casts = {cast for p in model.parameters() if p.ndim == 2 for cast in (p.numel() * 2, p.numel() * 4)}
    norms = {p.numel() * 4 for p in model.parameters() if p.ndim == 1}
    return sum(s.nbytes() for s in storages.values() if s.nbytes() not in casts | norms)


SMALL = {
    "gqa": MODELS["gqa"],
    "wide heads, untied": MODELS["gqa-wide-heads-untied"],
    "mha": replace(MODELS["mha"], n_layers=5, hidden=224),
}


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_torch_keeps_what_the_plan_says(name: str, remat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes per token: the difference between two lengths, in which everything that does not grow cancels."""
    monkeypatch.setattr(torch_loss, "TOKENS_PER_CHUNK", 64)
    per_token, planned = (
        (count(512) - count(256)) / (3 * 256)
        for count in (
            lambda T: saved_bytes(run_config(SMALL[name], batch_size=3, seq_len=T, remat=remat), monkeypatch),
            lambda T: activation_bytes(run_config(SMALL[name], batch_size=3, seq_len=T, remat=remat)),
        )
    )
    if remat:  # the plan also counts the block that is being recomputed, which the forward pass does not show
        one = activation_bytes(run_config(replace(SMALL[name], n_layers=1), batch_size=1, seq_len=1))
        planned -= one - 10 * SMALL[name].width - 4
    # The plan leaves out ids, weights and log-sum-exps of the loss: 8 + 8 + 4 + 4 bytes per token, and RoPE's factors.
    assert per_token == pytest.approx(planned, rel=0.02), "bytes per token"  # measured: up to 1.3 % off


def test_the_preset_fits_its_gpu() -> None:
    """mini-llm-50m as shipped, in PyTorch: weights, gradients, moments, activations and chunks of logits take less than
    half of 80 GB."""
    config = load_config("mini-llm-50m")
    n_params = 50_049_408
    chunks = 4 * 4 * torch_loss.TOKENS_PER_CHUNK * config.model.vocab_size
    whole = 16 * n_params + 2 * n_params + activation_bytes(config) + chunks
    assert whole < 40 * GB
    whole_batch = replace(config, train=replace(config.train, grad_accum=1))
    assert activation_bytes(whole_batch) > 80 * GB, "the step was made to fit by its micro-batches"


def abstract_arguments(config: ModelConfig, rows: int) -> tuple[Params, Batch]:
    """The parameters, and a batch of rows of 64 tokens, as shapes."""
    ids = jax.ShapeDtypeStruct((rows, 64), jnp.int32)
    return split_model(abstract_model(config))[1], Batch(ids, ids, jax.ShapeDtypeStruct(ids.shape, jnp.float32))


def loss_of(config: ModelConfig, remat: bool, params: Params, batch: Batch) -> jax.Array:
    graphdef, rope = model_structure(config, param_dtype=jnp.float32, compute_dtype=jnp.float32)
    return jax_loss.loss_sums(merge_model(graphdef, params, rope), batch, remat=remat)[0]


def temporaries(config: ModelConfig, rows: int) -> int:
    """Bytes of temporary memory that XLA:CPU needs for loss and gradients of rows of 64 tokens, in float32."""
    gradient = jax.jit(jax.grad(partial(loss_of, config, False)))
    return gradient.lower(*abstract_arguments(config, rows)).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", [False, True])
def test_jax_recomputes_the_blocks(remat: bool) -> None:
    """In the gradient's program, every block is marked as recomputed. (XLA for CPUs removes the second computation; the
    memory that a GPU saves is in test_compiled.py.)"""
    config = replace(MODELS["gqa"], n_layers=5)
    jaxpr = str(jax.make_jaxpr(jax.grad(partial(loss_of, config, remat)))(*abstract_arguments(config, 2)))
    assert len(re.findall(r"\bprevent_cse=", jaxpr)) == config.n_layers * remat


def test_the_program_of_a_loop_does_not_grow_with_the_blocks() -> None:
    """With `train.scan_layers`, XLA gets the same program for 3 blocks and for 30: only numbers in it differ."""

    def lines(n_layers: int, scan_layers: bool) -> int:
        config = run_config(replace(MODELS["gqa"], n_layers=n_layers), seq_len=64, scan_layers=scan_layers)
        step, rope = jit_train_step(config)
        state = jax.eval_shape(partial(init_state, config))
        _, batch = abstract_arguments(config.model, 4)
        return len(step.lower(state, rope, batch, 1e-3).as_text().splitlines())

    assert lines(30, True) == lines(3, True)
    assert lines(6, False) > 1.5 * lines(3, False)


def test_jax_does_not_keep_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of 512 tokens take 67 MB in float32 with a vocabulary of 32,768. In chunks they are never held."""
    config = replace(MODELS["gqa"], n_layers=1, vocab_size=32_768)
    whole = 4 * 512 * config.vocab_size
    assert temporaries(config, 8) > whole, "the logits"
    monkeypatch.setattr(jax_loss, "TOKENS_PER_CHUNK", 64)
    in_chunks = temporaries(config, 8)
    assert in_chunks < whole
    assert temporaries(config, 16) - in_chunks < whole / 4, "memory grows with tokens x vocabulary"
