"""Fixtures: both models built from the same weights, tolerances for each precision, small data and small runs."""

import logging
import math
import os
import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell: children would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "gpu" in sys.argv:  # pytest -m gpu
    os.environ["PARITY_TESTS_ON_GPU"] = "1"  # also for the workers of `-n 4`, whose command line does not say so
if "PARITY_TESTS_ON_GPU" in os.environ:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both frameworks share the GPU
else:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # JAX and torch share the cores: see minillm_cli/process.py
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads busy-wait and slow down the other worker

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import minillm_jax
import minillm_torch
from minillm_core.config import DataConfig, ModelConfig, OptimConfig, RopeScaling, RunConfig, TrainConfig
from minillm_core.data.batches import Batch
from minillm_core.data.corpus import list_documents
from minillm_core.data.pieces import text_chunks
from minillm_core.data.run_data import prepare_data
from minillm_core.errors import Interrupted
from minillm_core.model.params import param_table
from minillm_core.model.tolerance import BFLOAT16_MODULE, TOLERANCES
from minillm_core.progress import Work, listen
from minillm_core.tensors import Tensors
from minillm_core.text.tokenizer import Tokenizer
from minillm_core.training import loop
from minillm_core.training.checkpoints import TrainingState, read_info
from minillm_core.training.metrics import read_metrics
from minillm_core.training.train import train
from minillm_jax.weights import Params, merge_model, split_model
from minillm_torch.device import to_device

BACKENDS: dict[str, Any] = {"jax": minillm_jax, "torch": minillm_torch}
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Tier:
    """A precision, and how far the frameworks may differ in it."""

    name: str
    module: float
    logits: float
    gradient: float
    run_loss: float

    @property
    def jax(self) -> jnp.dtype:
        return jnp.dtype(self.name)

    @property
    def torch(self) -> torch.dtype:
        return getattr(torch, self.name)


TIERS = {name: Tier(name, **vars(tolerance)) for name, tolerance in TOLERANCES.items()}
BFLOAT16 = Tier("bfloat16", BFLOAT16_MODULE, logits=math.nan, gradient=math.nan, run_loss=math.nan)
"""Whole models in bfloat16 are compared as distributions (test_bfloat16.py)."""

_SHAPE = {"vocab_size": 509, "context_length": 640, "width": 96, "n_layers": 2, "hidden": 160}
MODELS = {
    "mha": ModelConfig(**_SHAPE, n_heads=6, n_kv_heads=6),
    "gqa": ModelConfig(**_SHAPE, n_heads=6, n_kv_heads=2, norm_eps=1e-5, rope_theta=5e5),
    "mqa-untied": ModelConfig(**_SHAPE, n_heads=6, n_kv_heads=1, tie_embeddings=False),
    "gqa-wide-heads-untied": ModelConfig(**_SHAPE, n_heads=4, n_kv_heads=2, head_dim=40, tie_embeddings=False),
    "mha-narrow-heads-scaled": ModelConfig(
        **_SHAPE, n_heads=4, n_kv_heads=4, head_dim=12, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 128)
    ),
}
LENGTHS = (1, 2, 7, 64, 257, 600)


LONGEST = ("notebook", "gradients", "generate", "cache", "state", "scripts", "doctor_code", "docs", "model", "packing")
"""The test files that take longest; each is run by one worker, so they start first."""


CORE = ("gqa", "mqa-untied", "mha-narrow-heads-scaled")
"""Between them: groups, one group, heads of a different width, an untied head, scaled rotations."""


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """float64 proves identity for every configuration; lower precisions, outside of CORE, belong to the extended
    tests. The longest files come first."""
    for item in items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        config, precision = params.get("config", params.get("name")), params.get("tier", params.get("module_pair"))
        if isinstance(config, str) and config in MODELS.keys() - CORE and precision in ("float32", "bfloat16"):
            item.add_marker("extended")
    order = {f"test_{name}.py": n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session", autouse=True)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile quickly, which is most of what the tests do, and share compiled programs between them.

    LLVM optimizes little, which changes how a program rounds, not what it computes. Set
    JAX_DISABLE_MOST_OPTIMIZATIONS=0 to test the programs that users get, as the continuous integration does with some
    files. The programs for GPUs are always those.
    """
    settings: dict[str, Any] = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    if request.config.getoption("markexpr") not in ("compiled", "gpu"):
        settings["jax_disable_most_optimizations"] = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") != "0"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(int(value) if isinstance(value, bool) else value))
        yield


PLOT_LOSS = loop.plot_loss


@pytest.fixture(scope="session", autouse=True)
def no_plots() -> Iterator[None]:
    """Runs draw no loss curve, which takes half a second per evaluation; the runs of test_scripts.py do draw it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "plot_loss", lambda *_: None)
        yield


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What the libraries log is in `caplog.text`, whatever an earlier test has done to their logger."""
    logger = logging.getLogger("minillm_core")
    propagate, logger.propagate = logger.propagate, True
    caplog.set_level(logging.INFO, logger="minillm_core")
    yield
    logger.propagate = propagate


@contextmanager
def heard() -> Iterator[list[Work]]:
    """The units of work that begin here, in order."""
    works: list[Work] = []

    @contextmanager
    def listener(work: Work) -> Iterator[None]:
        works.append(work)
        yield

    listen(listener)
    yield works
    listen(None)


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[Tier]:
    """float64 and float32 in turn. JAX's 64-bit mode is on for float64 only, as it is for a user."""
    with jax.enable_x64(request.param == "float64"):
        yield TIERS[request.param]


@pytest.fixture(params=[*TIERS, "bfloat16"])
def module_pair(request: pytest.FixtureRequest, config: ModelConfig) -> Iterator["Pair"]:
    with jax.enable_x64(request.param == "float64"):
        yield make_pair(config, TIERS.get(request.param, BFLOAT16))


@pytest.fixture
def float64() -> Iterator[Tier]:
    with jax.enable_x64(True):
        yield TIERS["float64"]


@pytest.fixture(params=MODELS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return MODELS[request.param]


def random_weights(config: ModelConfig, seed: int = 0, sharpness: float = 3.0) -> Tensors:
    """Weights for which every part of the model matters: attention far from uniform, norm scales away from 1.

    `sharpness` scales the query and key projections.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, spec in param_table(config).items():
        if not spec.decays:
            tensors[name] = 1 + 0.3 * rng.standard_normal(spec.shape)
        else:
            gain = sharpness if "q_proj" in name or "k_proj" in name else 1.0
            tensors[name] = gain * rng.standard_normal(spec.shape) / np.sqrt(spec.shape[1])
    return {name: array.astype(np.float32) for name, array in tensors.items()}


def random_tokens(config: ModelConfig, batch: int, length: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length)).astype(np.int32)


@dataclass(frozen=True)
class Pair:
    """The same model in both frameworks."""

    config: ModelConfig
    tier: Tier
    weights: Tensors
    jax: minillm_jax.MiniLLM
    torch: minillm_torch.MiniLLM

    def logits(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            theirs = self.torch(to_torch(tokens))[0]
        ours, _ = jax_forward(*split_model(self.jax), tokens, None)
        return to_numpy(ours), to_numpy(theirs)


@partial(jax.jit, static_argnums=0)
def jax_forward(
    graphdef: Any,
    params: Params,
    rope: Params,
    tokens: jax.Array,
    cache: minillm_jax.KVCache | None,
    valid: jax.Array | None = None,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> tuple[jax.Array, minillm_jax.KVCache | None]:
    """The JAX model as one compiled function, shared by all tests of one shape."""
    return merge_model(graphdef, params, rope)(tokens, cache, valid, positions, segments)


@lru_cache
def make_pair(config: ModelConfig, tier: Tier) -> Pair:
    """Both models with `random_weights`. Built once and shared, so a test that trains must build its own pair."""
    return pair_of(config, tier, random_weights(config))


def pair_of(config: ModelConfig, tier: Tier, weights: Tensors) -> Pair:
    return Pair(
        config,
        tier,
        weights,
        minillm_jax.build_model(config, weights, param_dtype=tier.jax, compute_dtype=tier.jax),
        minillm_torch.build_model(config, weights, param_dtype=tier.torch, compute_dtype=tier.torch),
    )


@pytest.fixture
def pair(config: ModelConfig, tier: Tier) -> Pair:
    return make_pair(config, tier)


def to_torch(array: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
    tensor = torch.from_numpy(np.asarray(array))
    return tensor.long() if dtype is None else tensor.to(dtype)


def torch_batch(rows: np.ndarray) -> Batch:
    """Rows (B, T + 1) as a batch of torch tensors, which predicts each token from those before it."""
    return to_device(Batch.from_rows(rows), torch.device("cpu"))


def to_numpy(array: jax.Array | torch.Tensor) -> np.ndarray:
    """Convert an array of either framework and any dtype to float64."""
    if isinstance(array, torch.Tensor):
        return array.detach().double().numpy()
    return np.asarray(array).astype(np.float64)


def assert_close(name: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> None:
    """Check the largest difference, absolute or relative to the largest value, whichever is smaller."""
    assert ours.shape == theirs.shape, f"{name}: shapes {ours.shape} and {theirs.shape}"
    assert np.isfinite([ours, theirs]).all(), f"{name}: not finite"
    error = np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())
    assert error <= tolerance, f"{name}: differs by {error:.2e}, more than {tolerance:.0e}"


def assert_close_norm(name: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> None:
    """Check the norm of the difference, relative to the norm of `theirs`."""
    assert ours.shape == theirs.shape, f"{name}: shapes {ours.shape} and {theirs.shape}"
    scale = np.linalg.norm(theirs)
    assert scale > 0, f"{name}: all zero, so nothing is compared"
    error = np.linalg.norm(ours.astype(np.float64) - theirs) / scale
    assert error <= tolerance, f"{name}: differs by {error:.2e}, more than {tolerance:.0e}"


def run_config(
    model: ModelConfig,
    out_dir: Path | str = "unused",
    *,
    data: DataConfig | None = None,
    optim: OptimConfig | None = None,
    **train: object,
) -> RunConfig:
    """The configuration of a small run. Keywords set fields of TrainConfig."""
    settings = {"steps": 8, "batch_size": 4, "seq_len": 32, "compute_dtype": "float32", "seed": 3} | train
    return RunConfig(
        model,
        optim or OptimConfig(learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=2),
        data or DataConfig(corpus="sotu", dir="unused"),
        TrainConfig(out_dir=str(out_dir), **settings),
    )


TINY = ModelConfig(
    vocab_size=512, context_length=320, width=48, n_layers=2, n_heads=4, n_kv_heads=2, hidden=96, head_dim=16
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty real documents: the beginnings of speeches."""
    folder = tmp_path_factory.mktemp("corpus")
    for document in list_documents(DataConfig(corpus="sotu", dir="unused"))[::12][:20]:
        (folder / document.path.name).write_text(next(text_chunks(document))[:12_000], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def data_config(corpus: Path) -> DataConfig:
    """The corpus, prepared with a vocabulary of 512 pieces."""
    config = DataConfig(corpus=str(corpus), dir=str(corpus.parent / "prepared"), holdout_every=5)
    assert prepare_data(config, TINY.vocab_size)
    return config


@pytest.fixture(scope="session")
def tokenizer(data_config: DataConfig) -> Tokenizer:
    return Tokenizer(Path(data_config.dir) / "tokenizer.model")


def text_run(data: DataConfig, out_dir: Path, **train: Any) -> RunConfig:
    """A run on real text in which the learning-rate schedule and gradient clipping both take effect."""
    optim = OptimConfig(learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=5)
    settings = {"steps": 30, "log_every": 1, "eval_every": 10, "checkpoint_every": 10, "keep_last": 0} | train
    return run_config(TINY, out_dir, data=data, optim=optim, **settings)


def metrics_of(run: Path, framework: str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without the speed, which depends on the clock."""
    rows = read_metrics(run / framework / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


def losses_of(run: Path, framework: str) -> np.ndarray:
    return np.array([row["loss"] for row in metrics_of(run, framework)])


def state_at(run: Path, framework: str, step: int) -> TrainingState:
    checkpoint = run / framework / "checkpoints" / str(step)
    return BACKENDS[framework].read_payload(checkpoint, read_info(checkpoint).config)


def assert_same_bits(ours: TrainingState, theirs: TrainingState) -> None:
    for group in ("weights", "exp_avg", "exp_avg_sq"):
        a, b = getattr(ours, group), getattr(theirs, group)
        assert a.keys() == b.keys()
        assert len(a) > 0
        for name in a:
            assert a[name].dtype == b[name].dtype
            assert a[name].tobytes() == b[name].tobytes(), f"{group} {name}"


def train_until(config: RunConfig, backend: Any, step: int) -> None:
    """Train, with a real SIGTERM sent during step `step`: the run saves that step and stops."""
    rate = loop.learning_rate

    def learning_rate(optim: OptimConfig, n: int, n_steps: int) -> float:
        if n == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(optim, n, n_steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "learning_rate", learning_rate)
        with pytest.raises(Interrupted):
            train(config, backend)
