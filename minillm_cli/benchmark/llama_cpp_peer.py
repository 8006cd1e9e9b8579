"""llama.cpp as a peer, through cyllama: a GGUF file with the same random weights, all cores, greedy."""

import os
import tempfile
from pathlib import Path
from typing import Any

from cyllama.llama import llama_cpp

from minillm_cli.benchmark.cases import Case
from minillm_cli.benchmark.engines import Round
from minillm_core.interop.gguf import write_gguf
from minillm_core.interop.gguf_tokenizer import NO_TOKENIZER
from minillm_core.model.params import init_params

CACHE_TYPES = {"float32": 0, "bfloat16": 1}
"""dtype -> llama.cpp's number of the cache's dtype: float32, or float16, its default."""


def make_round(case: Case) -> Round:
    """See engines.make_round."""
    llama_cpp.disable_logging()
    model = _model(case)
    prompts = case.prompts()
    context = _context(model, case, prompts)
    sampler = llama_cpp.LlamaSampler()
    sampler.add_greedy()
    first = llama_cpp.LlamaBatch(n_tokens=sum(map(len, prompts)), embd=0, n_seq_max=1)
    following = llama_cpp.LlamaBatch(n_tokens=len(prompts), embd=0, n_seq_max=1)

    def process() -> list[int]:
        """Processes all prompts; returns where in the batch each one ends."""
        context.kv_cache_clear(False)
        first.clear()
        ends = []
        for row, prompt in enumerate(prompts):
            for i, token in enumerate(prompt):
                first.add(token, i, [row], i == len(prompt) - 1)
            ends.append(first.n_tokens - 1)
        context.decode(first)
        return ends

    def prefill() -> None:
        process()
        context.synchronize()

    def decode() -> None:
        outputs = process()
        for n in range(case.repeats):
            tokens = [sampler.sample(context, i) for i in outputs]
            if n == case.repeats - 1:
                return
            following.clear()
            for row, token in enumerate(tokens):
                following.add(token, len(prompts[row]) + n, [row], True)
            context.decode(following)
            outputs = [*range(len(prompts))]

    return prefill if case.work == "prefill" else decode


def _model(case: Case) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(
            path, case.config.model, init_params(case.config.model, case.config.train.seed), case.dtype, NO_TOKENIZER
        )
        settings = llama_cpp.LlamaModelParams()
        settings.use_mmap = False  # the file is removed
        return llama_cpp.LlamaModel(str(path), settings)


def _context(model: Any, case: Case, prompts: list[list[int]]) -> Any:
    settings = llama_cpp.LlamaContextParams()
    longest, n_tokens = max(map(len, prompts)) + case.repeats, sum(map(len, prompts))
    settings.n_seq_max, settings.n_ctx = len(prompts), len(prompts) * (-(-longest // 256) * 256)
    settings.n_batch = max(n_tokens, 32)
    settings.n_ubatch = min(settings.n_batch, 512)
    settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
    settings.type_k = settings.type_v = CACHE_TYPES[case.dtype]
    return llama_cpp.LlamaContext(model, settings)
