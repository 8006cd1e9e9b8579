"""llama.cpp with its most exact settings on a CPU: no flash attention, keys and values in float32."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from cyllama.llama import llama_cpp

llama_cpp.disable_logging()


class _Model(llama_cpp.LlamaModel):
    @property
    def n_vocab(self) -> int:
        """The binding's `get_logits_ith` needs it, but the binding's model lacks it."""
        return self.get_vocab().n_vocab


class LlamaCpp:
    """A GGUF file, loaded by llama.cpp."""

    def __init__(self, path: Path):
        settings = llama_cpp.LlamaModelParams()
        settings.n_gpu_layers = 0
        self.model = _Model(str(path), settings)
        self.vocab = self.model.get_vocab()

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits of every position, float32 (T, V)."""
        settings = llama_cpp.LlamaContextParams()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = len(tokens)
        settings.n_threads = settings.n_threads_batch = 2
        settings.flash_attn_type = 0
        settings.type_k = settings.type_v = 0  # float32
        context = llama_cpp.LlamaContext(self.model, settings)
        batch = llama_cpp.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
        for i, token in enumerate(tokens):
            batch.add(int(token), i, [0], True)
        context.decode(batch)
        return np.array([context.get_logits_ith(i) for i in range(len(tokens))], np.float32)

    def greedy(self, prompt: str, n: int) -> list[int]:
        """`n` greedy tokens that continue a text, which starts with the begin-of-document token."""
        tokens = self.tokenize(prompt, bos=True)
        start = len(tokens)
        for _ in range(n):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[start:]

    def ends(self, token: int) -> bool:
        """Whether llama.cpp ends generation at this token."""
        found: bool = self.vocab.is_eog(token)
        return found

    def tokenize(self, text: str, *, bos: bool = False) -> list[int]:
        """The ids of a text. Text that looks like a special token is treated as text."""
        return self.vocab.tokenize(text, bos, False)


def quantise(source: Path, target: Path, file_type: int) -> None:
    """Quantise a file with llama.cpp. A file_type of 0 dequantises it: the result holds float32 numbers."""
    settings = llama_cpp.LlamaModelQuantizeParams()
    settings.ftype = file_type
    settings.allow_requantize = True
    settings.nthread = 2
    llama_cpp.model_quantize(str(source), str(target), settings)
