"""What only a GPU can show, in both frameworks: fused attention, float32 without TF32, bfloat16, same bits, memory.

`pytest parity_tests -m gpu -n 4` runs these tests; without a GPU they are skipped. They need no network and no corpus.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from minillm_core.config import ModelConfig, load_config
from minillm_core.data.batches import Batch
from minillm_core.doctor.examine import compare_distributions
from minillm_core.model.mask import AttentionMask
from minillm_core.model.params import init_params
from minillm_core.model.reference import Reference
from minillm_core.model.tolerance import (
    BFLOAT16_GRADIENT_COSINE,
    BFLOAT16_MEAN_KL,
    BFLOAT16_MODULE,
    BFLOAT16_STAGE,
    BFLOAT16_TOP1_AGREEMENT,
    TOLERANCES,
)
from minillm_core.training.checkpoints import TrainingState
from minillm_core.training.plan import activation_bytes
from minillm_jax import attention as jax_attention
from minillm_torch import attention as torch_attention
from minillm_torch.device import default_device
from parity_tests.conftest import (
    BACKENDS,
    assert_close,
    assert_close_norm,
    assert_same_bits,
    random_tokens,
    random_weights,
    run_config,
    to_numpy,
)

pytestmark = pytest.mark.gpu

MODEL = ModelConfig(
    vocab_size=1024, context_length=512, width=256, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=64, hidden=512
)


def has_gpu() -> bool:
    return torch.cuda.is_available() and jax.default_backend() == "gpu"


@pytest.fixture(autouse=True)
def gpu() -> None:
    if not has_gpu():
        pytest.skip("needs a GPU that JAX and PyTorch can both use")
    default_device()  # sets the precision of products


def test_a_run_says_that_attention_is_fused() -> None:
    """The preset's own step takes the fused kernel, and so do the inputs of the doctor and the benchmark."""
    config = load_config("mini-llm-50m")
    config = replace(config, train=replace(config.train, compute_dtype="bfloat16"))
    for length in (config.train.seq_len, 512):
        settings = replace(config.train, seq_len=length)
        assert BACKENDS["jax"].describe_attention(replace(config, train=settings)) == "fused attention (cuDNN)"
        assert BACKENDS["torch"].describe_attention(replace(config, train=settings)) == "fused attention (SDPA)"


def attention_and_gradients(
    framework: str, attend: Callable[..., Any], inputs: list[np.ndarray], dtype: str
) -> list[np.ndarray]:
    """The output (B, T, N, H) of an attention for the first three inputs, and the gradients of its product with the
    fourth."""
    *qkv, weight = inputs
    if framework == "jax":
        args = [jnp.asarray(x, dtype) for x in qkv]

        @jax.jit
        def both(*args: jax.Array) -> Any:
            out, backward = jax.vjp(attend, *args)
            return out, *backward(jnp.asarray(weight, out.dtype))

        return [to_numpy(x) for x in both(*args)]
    args = [torch.tensor(x, dtype=getattr(torch, dtype), device="cuda", requires_grad=True) for x in qkv]
    out = attend(*args)
    out.backward(torch.tensor(weight, dtype=out.dtype, device="cuda"))
    return [x.detach().double().cpu().numpy() for x in (out, *(arg.grad for arg in args))]


FUSED_IN_JAX = [(512, None), (130, None), (512, 1), (512, 77), (512, 511)]
"""Length and window. PyTorch's kernel takes no window."""


@pytest.mark.parametrize("heads", [(6, 6, 64), (8, 2, 128), (4, 1, 64)])
@pytest.mark.parametrize(
    ("framework", "length", "window"),
    [("torch", 512, None), ("torch", 130, None), *(("jax", *case) for case in FUSED_IN_JAX)],
)
def test_fused_attention_equals_plain_attention(
    framework: str, heads: tuple[int, int, int], length: int, window: int | None
) -> None:
    """Forward and backward, in bfloat16, against plain attention of the same inputs in float32."""
    module = jax_attention if framework == "jax" else torch_attention
    N, K, H = heads
    mask, rng = AttentionMask(window), np.random.default_rng(0)
    place = {"device": torch.device("cuda")} if framework == "torch" else {}
    dtype = jnp.bfloat16 if framework == "jax" else torch.bfloat16
    assert module.why_not_fused(mask, length, H, dtype, **place) is None
    inputs = [rng.standard_normal((2, length, n, H)) for n in (N, K, K, N)]
    inputs = [np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)) for x in inputs]
    bias = module.mask_bias(mask, length, length, jnp.float32 if framework == "jax" else torch.float32, **place)

    def plain(q: Any, k: Any, v: Any) -> Any:
        return module.attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), bias)

    exact = attention_and_gradients(framework, plain, inputs, "float32")
    fused = attention_and_gradients(framework, lambda q, k, v: module.attend_fused(q, k, v, mask), inputs, "bfloat16")
    for name, ours, theirs in zip(("out", "q", "k", "v"), fused, exact, strict=True):
        if window == 1 and name in ("q", "k"):  # a query that sees one key: no gradient, and what rounding leaves of it
            assert np.linalg.norm(theirs) == 0
            assert np.linalg.norm(ours) <= BFLOAT16_STAGE * np.linalg.norm(exact[-1]), name
        else:
            assert_close_norm(name, ours, theirs, BFLOAT16_MODULE)


@pytest.mark.parametrize("window", [None, 256])
def test_torch_takes_a_kernel_that_stores_no_scores(window: int | None) -> None:
    """With every other kernel forbidden, a train step still runs, also with a window that hides nothing."""
    model = replace(MODEL, sliding_window=window)
    backend, config = BACKENDS["torch"], run_config(model, seq_len=256, compute_dtype="bfloat16")
    batch = Batch.from_rows(random_tokens(model, 4, 257))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        backend.make_train_step(config)(backend.init_state(config), batch, 1e-3)


def two_documents(tokens: np.ndarray, length: int) -> tuple[Batch, Batch]:
    """Rows of two documents, the first of `length` tokens; and the same documents, each in a row of its own."""
    whole = Batch.from_rows(tokens)
    index_BT = np.broadcast_to(np.arange(tokens.shape[1] - 1, dtype=np.int32), whole.tokens_BT.shape)
    second_BT = index_BT >= length
    whole = replace(whole, weights_BT=np.where(index_BT == length - 1, 0, whole.weights_BT).astype(np.float32))
    packed = replace(whole, positions_BT=index_BT - length * second_BT, segments_BT=second_BT.astype(np.int32))
    fields = (whole.tokens_BT, whole.targets_BT, whole.weights_BT)
    alone = [np.concatenate([x * ~second_BT, np.roll(x * second_BT, -length, axis=1)]) for x in fields]
    return packed, Batch(*alone)


@pytest.mark.parametrize("packed", [False, True])
def test_windows_and_segments_agree(packed: bool) -> None:
    """A train step in bfloat16 with a window (fused in JAX, plain in PyTorch), and with two documents in each row: the
    step of the same documents in rows of their own."""
    model, tokens = replace(MODEL, sliding_window=50), random_tokens(MODEL, 4, 257)
    batches = two_documents(tokens, 100) if packed else (Batch.from_rows(tokens),)
    moments = []
    for backend in BACKENDS.values():
        for batch in batches:
            config = run_config(model, batch_size=len(batch.tokens_BT), seq_len=256, compute_dtype="bfloat16")
            state = backend.import_state(config, TrainingState(random_weights(model, sharpness=1.0), {}, {}), 0)
            state, _ = backend.make_train_step(config)(state, batch, 1e-3)
            moments.append(backend.export_state(config, state).exp_avg)
    for others in moments[1:]:
        for name, ours in moments[0].items():
            a, b = ours.ravel().astype(np.float64), others[name].ravel().astype(np.float64)
            assert a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) >= BFLOAT16_GRADIENT_COSINE, name


@pytest.mark.parametrize("framework", BACKENDS)
def test_float32_products_are_float32(framework: str) -> None:
    """Every stage on the GPU against the numpy reference in float64. TF32 would be wrong by about 1e-3."""
    weights, tokens = random_weights(MODEL, sharpness=1.0), random_tokens(MODEL, 2, 256)
    trace = BACKENDS[framework].trace(MODEL, weights, tokens, "float32")
    for name, expected in Reference(MODEL, weights).stages(tokens):
        assert_close(name, trace.stages[name], expected, TOLERANCES["float32"].logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_frameworks_agree(dtype: str) -> None:
    """Distributions, losses and gradients of the doctor's own run, which takes the fused kernel in bfloat16."""
    weights, tokens = random_weights(MODEL, sharpness=1.0), random_tokens(MODEL, 2, 512)
    ours, theirs = (backend.trace(MODEL, weights, tokens, dtype) for backend in BACKENDS.values())
    for name, gradient in ours.gradients.items():
        a, b = gradient.ravel().astype(np.float64), theirs.gradients[name].ravel().astype(np.float64)
        if dtype == "float32":
            assert_close_norm(name, a, b, TOLERANCES["float32"].gradient)
        else:
            assert a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) >= BFLOAT16_GRADIENT_COSINE, name
    if dtype == "float32":
        assert_close("logits", ours.stages["logits"], theirs.stages["logits"], TOLERANCES["float32"].logits)
    else:
        mean_kl, top_k = compare_distributions(ours.stages["logits"], theirs.stages["logits"])
        assert mean_kl <= BFLOAT16_MEAN_KL
        assert top_k[1] >= BFLOAT16_TOP1_AGREEMENT


def trained(framework: str, steps: range, state: Any = None, **train: Any) -> TrainingState:
    """The state after training steps with the deterministic kernels."""
    backend = BACKENDS[framework]
    settings = {"batch_size": 4, "seq_len": 256, "compute_dtype": "bfloat16", "deterministic": True} | train
    config = run_config(MODEL, steps=8, **settings)
    step = backend.make_train_step(config)
    state = backend.init_state(config) if state is None else backend.import_state(config, state, steps.start)
    for n in steps:
        state, _ = step(state, Batch.from_rows(random_tokens(MODEL, 4, 257, seed=n)), 1e-3)
    return copy.deepcopy(backend.export_state(config, state))


@pytest.mark.parametrize("framework", BACKENDS)
def test_the_same_bits_again_and_after_a_resume(framework: str) -> None:
    """Deterministic bfloat16 training: twice, and stopped and resumed twice."""
    whole = trained(framework, range(8))
    assert_same_bits(trained(framework, range(8)), whole)
    resumed = trained(framework, range(6, 8), trained(framework, range(3, 6), trained(framework, range(3))))
    assert_same_bits(resumed, whole)


@pytest.mark.parametrize("framework", BACKENDS)
def test_recomputed_blocks_change_nothing(framework: str) -> None:
    """Remat and micro-batches in bfloat16: the same up to the rounding of sums."""
    plain = trained(framework, range(1))
    for train in ({"remat": True}, {"grad_accum": 2}, {"scan_layers": True, "remat": True}):
        other = trained(framework, range(1), **train)
        for name, moment in plain.exp_avg.items():
            assert_close_norm(f"{train} {name}", other.exp_avg[name], moment, BFLOAT16_MODULE)


@pytest.mark.parametrize("framework", BACKENDS)
def test_cached_decoding_equals_no_cache(framework: str) -> None:
    """Prefill and single steps, rows of different lengths, in float32."""
    backend, weights = BACKENDS[framework], random_weights(MODEL, sharpness=1.0)
    tokens, lengths = random_tokens(MODEL, 3, 40), np.array([40, 17, 5])
    if framework == "jax":
        dtypes = {"param_dtype": jnp.float32, "compute_dtype": jnp.float32}
        model, put, make_cache = backend.build_model(MODEL, weights, **dtypes), jnp.asarray, backend.init_cache
        host: Callable[..., Any] = jnp.asarray
    else:
        dtypes = {"param_dtype": torch.float32, "compute_dtype": torch.float32}
        model = backend.build_model(MODEL, weights, **dtypes, device="cuda")
        make_cache = partial(backend.init_cache, device="cuda")
        put, host = (lambda x: torch.from_numpy(x).long().cuda()), torch.from_numpy
    with torch.no_grad():
        whole = np.asarray(_cpu(model(put(tokens))[0]))
        cache = make_cache(MODEL, 3, 64, dtypes["compute_dtype"])
        logits, cache = model(put(tokens), cache, host(lengths))
        for row, length in enumerate(lengths):
            error = np.abs(_cpu(logits)[row, :length] - whole[row, :length]).max()
            assert error <= TOLERANCES["float32"].logits, f"prefill, row {row}"
        new = random_tokens(MODEL, 3, 1, seed=9)
        logits, _ = model(put(new), cache)
        for row, length in enumerate(lengths):
            alone = np.concatenate([tokens[row, :length], new[row]])[None]
            expected = _cpu(model(put(alone))[0])[0, -1]
            assert np.abs(_cpu(logits)[row, 0] - expected).max() <= TOLERANCES["float32"].logits, f"step, row {row}"


def _cpu(x: Any) -> np.ndarray:
    return x.detach().double().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, np.float64)


def test_memory_of_the_step() -> None:
    """mini-llm-50m at a quarter of its micro-batch: both frameworks stay near what the plan says."""
    config = load_config("mini-llm-50m")
    settings = replace(config.train, batch_size=8, grad_accum=1, compute_dtype="bfloat16")
    config = replace(config, train=settings)
    batch = Batch.from_rows(random_tokens(config.model, 8, settings.seq_len + 1))
    start = TrainingState(init_params(config.model, 0), {}, {})
    planned = activation_bytes(config)
    torch.cuda.reset_peak_memory_stats()
    backend = BACKENDS["torch"]
    backend.make_train_step(config)(backend.import_state(config, start, 0), batch, 1e-3)
    peak = torch.cuda.max_memory_allocated()
    fixed = 18 * 50_049_408
    print(f"torch: peak {peak / 1e9:.2f} GB; planned {(planned + fixed) / 1e9:.2f} GB without chunks of logits")
    assert peak - fixed <= 1.15 * planned + 2e9
    backend = BACKENDS["jax"]
    _, metrics = backend.make_train_step(config)(backend.import_state(config, start, 0), batch, 1e-3)
    float(metrics["loss"])
    peak = jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    print(f"jax: peak {peak / 1e9:.2f} GB since the start of the process")
    assert peak - fixed <= planned + 2e9
