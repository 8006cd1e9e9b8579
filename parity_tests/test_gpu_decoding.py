"""Decoding and the compiled train step on a GPU: PyTorch records a step as a CUDA graph, JAX compiles the loop.

`pytest parity_tests -m gpu -n 4` runs these tests; without a GPU they are skipped.
"""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import minillm_jax
import minillm_torch
from minillm_core.data.batches import Batch
from minillm_core.decoding.generation import BaseGenerator
from minillm_core.model.tolerance import BFLOAT16_STAGE, TOLERANCES
from minillm_core.training.checkpoints import TrainingState
from parity_tests.conftest import BACKENDS, assert_close_norm, random_tokens, random_weights, run_config
from parity_tests.test_gpu import MODEL, gpu

pytestmark = pytest.mark.gpu
__all__ = ["gpu"]  # the fixture that skips without a GPU

REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3, "top_k": 40, "top_p": 0.9},
    {"temperature": 0.8, "seed": 1, "repetition_penalty": 1.3, "min_p": 0.01, "n": 2},
]
PROMPTS = [[1, *range(5, 45)], [1, 7], [1, *range(100, 117)]]


def generator_of(framework: str, dtype: str = "float32", device: str = "cuda", **options: Any) -> Any:
    weights = random_weights(MODEL, sharpness=1.0)
    tokenizer: Any = SimpleNamespace(
        fits=lambda _: True, decode_after=lambda _: "", end_ids=frozenset(), vocab_size=1024
    )
    if framework == "jax":
        dtypes = {"param_dtype": jnp.dtype(dtype), "compute_dtype": jnp.dtype(dtype)}
        return minillm_jax.Generator(minillm_jax.build_model(MODEL, weights, **dtypes), tokenizer)
    dtypes = {"param_dtype": getattr(torch, dtype), "compute_dtype": getattr(torch, dtype)}
    model = minillm_torch.build_model(MODEL, weights, **dtypes, device=torch.device(device))
    return minillm_torch.Generator(model, tokenizer, **options)


def generated(generator: BaseGenerator, request: dict[str, Any], prompts: Any = PROMPTS) -> Any:
    """Tokens and log-probabilities of every continuation."""
    found = generator.generate(prompts, max_new_tokens=50, logprobs=True, **request)
    return [(completion.tokens, completion.logprobs) for completion in found]


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("n_prompts", [1, 3])
def test_the_frameworks_decode_the_same_tokens(request_: dict[str, Any], n_prompts: int) -> None:
    """In float32: one row (kernels as (out, in), no scatter) and several; four bits of a threshold at a time."""
    ours, theirs = (generated(generator_of(name), request_, PROMPTS[:n_prompts]) for name in BACKENDS)
    for (tokens, logprobs), (other_tokens, other_logprobs) in zip(ours, theirs, strict=True):
        assert tokens == other_tokens
        assert np.allclose(logprobs, other_logprobs, rtol=0, atol=4 * TOLERANCES["float32"].logits)


@pytest.mark.parametrize("n_prompts", [3, 17])
def test_a_gpu_decodes_the_tokens_of_a_cpu(n_prompts: int) -> None:
    """PyTorch's plain loop on the CPU is the reference; above 16 rows, thresholds are found bit by bit."""
    prompts = [[1, 5 + i, *range(10, 10 + 2 * i)] for i in range(n_prompts)]
    exact = generated(generator_of("torch", device="cpu"), REQUESTS[1], prompts)
    for framework in BACKENDS:
        found = generated(generator_of(framework), REQUESTS[1], prompts)
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in exact], framework


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_recorded_step_changes_nothing(dtype: str) -> None:
    """A replayed CUDA graph gives the bits of the plain loop, also when its buffers are used again."""
    recorded, plain = generator_of("torch", dtype), generator_of("torch", dtype)
    assert recorded._records
    plain._records = False
    for request in (*REQUESTS, *REQUESTS):
        assert generated(recorded, request) == generated(plain, request)
    assert recorded._recorded


def test_a_compiled_step_can_be_recorded() -> None:
    """`Generator(compile=True)` on a GPU: the recorded step of a compiled decoder, greedily in float32."""
    assert [tokens for tokens, _ in generated(generator_of("torch", compile=True), REQUESTS[0])] == [
        tokens for tokens, _ in generated(generator_of("torch"), REQUESTS[0])
    ]


@pytest.mark.parametrize("train", [{}, {"remat": True}, {"grad_accum": 2}])
def test_the_compiled_train_step(train: dict[str, Any]) -> None:
    """`train.torch_compile` is on by default on a GPU: the same step up to rounding, and JAX's."""
    moments = {}
    for name, framework, compiles in (("off", "torch", False), ("on", "torch", True), ("jax", "jax", True)):
        config = run_config(MODEL, batch_size=4, seq_len=256, compute_dtype="float32", torch_compile=compiles, **train)
        backend = BACKENDS[framework]
        state = backend.import_state(config, TrainingState(random_weights(MODEL, sharpness=1.0), {}, {}), 0)
        state, _ = backend.make_train_step(config)(state, Batch.from_rows(random_tokens(MODEL, 4, 257)), 1e-3)
        moments[name] = backend.export_state(config, state).exp_avg
    for tensor, moment in moments["off"].items():
        for name in ("on", "jax"):
            assert_close_norm(f"{name} {tensor}", moments[name][tensor], moment, TOLERANCES["float32"].gradient)


def test_the_compiled_train_step_in_bfloat16() -> None:
    """A compiler keeps more precision between operations than the single operations have."""
    moments = []
    for compiles in (False, True):
        config = run_config(MODEL, batch_size=4, seq_len=256, compute_dtype="bfloat16", torch_compile=compiles)
        backend = BACKENDS["torch"]
        state = backend.import_state(config, TrainingState(random_weights(MODEL, sharpness=1.0), {}, {}), 0)
        state, _ = backend.make_train_step(config)(state, Batch.from_rows(random_tokens(MODEL, 4, 257)), 1e-3)
        moments.append(backend.export_state(config, state).exp_avg)
    for tensor, moment in moments[0].items():
        assert_close_norm(tensor, moments[1][tensor], moment, BFLOAT16_STAGE)
