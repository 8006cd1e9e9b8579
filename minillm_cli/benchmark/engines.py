"""The engines: how each does a work. This runs in the process of an engine, which imports one framework."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from minillm_cli.benchmark.cases import Case
from minillm_cli.process import let_threads_sleep
from minillm_core.config import ModelConfig
from minillm_core.data.batches import Batch
from minillm_core.model.params import init_params
from minillm_core.training.backend import load_backend

Round = Callable[[], float | None]
"""Does one round of a work and waits for its end. The loss after it, or None if it trains nothing."""

OURS = ("jax", "torch", "torch-compiled")
PEERS = ("transformers", "llama.cpp")
DOES = {
    "jax": ("train", "prefill", "decode"),
    "torch": ("train", "prefill", "decode"),
    "torch-compiled": ("decode",),
    "transformers": ("train", "prefill", "decode"),
    "llama.cpp": ("prefill", "decode"),
}
"""Engine -> its works."""


def framework_of(engine: str) -> str | None:
    """The framework that an engine computes with; None: its own."""
    return {"jax": "jax", "torch": "torch", "torch-compiled": "torch", "transformers": "torch"}.get(engine)


def make_round(engine: str, case: Case) -> Round:
    """Builds the model of a case with random weights. The first rounds also compile."""
    if engine == "transformers":
        from minillm_cli.benchmark.transformers_peer import make_round as of_transformers

        return of_transformers(case)
    if engine == "llama.cpp":
        from minillm_cli.benchmark.llama_cpp_peer import make_round as of_llama_cpp

        return of_llama_cpp(case)
    framework = engine.removesuffix("-compiled")
    backend = load_backend(framework)
    if case.work == "train":
        return _training(backend, case)
    generator = make_generator(backend, case, compile=engine == "torch-compiled")
    prompts = case.prompts()
    if case.work == "continue":
        return _continuing(generator, prompts[0], case)

    def prefill() -> None:
        prefix = generator.prefill([*prompts[0], 1])  # all tokens but the last are processed
        float(prefix.state[0][0, 0])  # waits

    def decode() -> None:
        texts = generator.generate(prompts, max_new_tokens=case.repeats, temperature=0.0)
        assert len(texts) == case.rows

    return prefill if case.work == "prefill" else decode


def _training(backend: Any, case: Case) -> Round:
    """The same batch again and again, at the full learning rate: the loss falls, so a wrong gradient shows in it."""
    step, state = backend.make_train_step(case.config), backend.init_state(case.config)
    batch, rate = Batch.from_rows(case.batch_rows()), case.config.optim.learning_rate

    def train() -> float:
        nonlocal state
        for _ in range(case.repeats):
            state, metrics = step(state, batch, rate)
        return float(metrics["loss"])

    return train


def _continuing(generator: Any, prompt: list[int], case: Case) -> Round:
    """All rows continue the same prefix, which is processed before."""
    prefix = generator.prefill([*prompt, 1])

    def decode() -> None:
        generator.generate([[1]] * case.rows, prefix=prefix, max_new_tokens=case.repeats, temperature=0.0)

    return decode


def make_generator(backend: Any, case: Case, *, compile: bool = False) -> Any:
    weights: Any = init_params(case.config.model, case.config.train.seed)
    if backend.FRAMEWORK == "jax":
        dtype = importlib.import_module("jax.numpy").dtype(case.dtype)
        model = backend.build_model(case.config.model, weights, param_dtype=dtype, compute_dtype=dtype)
        return backend.Generator(model, NoTokenizer(case.config.model))
    dtype = getattr(importlib.import_module("torch"), case.dtype)
    device = importlib.import_module("minillm_torch.device").default_device()
    model = backend.build_model(case.config.model, weights, param_dtype=dtype, compute_dtype=dtype, device=device)
    return backend.Generator(model, NoTokenizer(case.config.model), **({"compile": True} if compile else {}))


class NoTokenizer:
    """A stand-in for the tokenizer: a benchmark uses only token ids, and no id ends a text."""

    path = None
    end_ids: frozenset[int] = frozenset()

    def __init__(self, config: ModelConfig):
        self.vocab_size = config.vocab_size

    def fits(self, vocab_size: int) -> bool:
        return True

    def decode_after(self, ids: list[int]) -> str:
        return ""


def import_framework(engine: str, work: str) -> Any:
    """Imports the framework of an engine, with this project's settings if the engine is this project's. Peers keep
    their own."""
    if engine in OURS:
        let_threads_sleep(decoding=work != "train")
    framework = framework_of(engine)
    return importlib.import_module(framework or "cyllama.llama.llama_cpp")


def padded(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts and their mask, padded on the left, int64."""
    width = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return ids, mask
