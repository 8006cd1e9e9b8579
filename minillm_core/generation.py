"""Text generation, the framework-free half: requests checked, prompts padded, noise drawn, text streamed.

Each framework's Generator adds the two device functions, `_prefill` and `_decode`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from minillm_core.config import ModelConfig
from minillm_core.errors import InputError
from minillm_core.sampling import SamplingConfig, uniforms
from minillm_core.tokenizer import Tokenizer

BLOCK = 16
"""Tokens decoded on the device between two looks of the host."""


def bucket(n: int, limit: int) -> int:
    """The next power of two from 16 up, at most `limit`: few different shapes, few compilations."""
    return min(max(16, 1 << (n - 1).bit_length()), limit)


class BaseGenerator(ABC):
    """Generates text from a model. The same seed draws the same numbers in both frameworks."""

    def __init__(self, model: Any, tokenizer: Tokenizer):
        """Raises InputError if the tokenizer has another vocabulary than the model."""
        self.config: ModelConfig = model.config
        self.tokenizer = tokenizer
        if tokenizer.vocab_size != self.config.vocab_size:
            raise InputError(
                "the tokenizer has another vocabulary than the model",
                expected=f"{self.config.vocab_size} pieces",
                found=f"{tokenizer.vocab_size} pieces",
                where=tokenizer.path,
                do="use the tokenizer.model of the run that trained the model",
            )

    @abstractmethod
    def _prefill(self, tokens_BT: np.ndarray, length_B: np.ndarray, capacity: int) -> Any:
        """Runs padded prompts (int32) into a new cache; returns the decoding state: logits (B, V) and cache."""

    @abstractmethod
    def _decode(
        self, state: Any, uniforms_BN: np.ndarray, n_tokens: int, sampling: SamplingConfig
    ) -> tuple[np.ndarray, Any]:
        """Samples `n_tokens` tokens (at most N); returns them, int (B, n_tokens), and the new decoding state."""

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int, **sampling: Any) -> list[str]:
        """The continuation of each prompt, without the prompt, up to the end-of-document token.

        Args:
            sampling: temperature, top_k, top_p, seed (see SamplingConfig).

        Raises:
            InputError: no prompt, a prompt that does not fit the context, or an option out of range.
        """
        ids = [self.tokenizer.encode(prompt, bos=True) for prompt in prompts]
        rows = self.generate_tokens(ids, max_new_tokens=max_new_tokens, **sampling)
        return [self.tokenizer.decode(row) for row in rows]

    def generate_tokens(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, **sampling: Any
    ) -> list[list[int]]:
        """Token ids of each continuation, the end-of-document token left out. Arguments and errors as in `generate`."""
        rows: list[list[int]] = [[] for _ in prompts]
        for block_BN in self.blocks(prompts, max_new_tokens, SamplingConfig(**sampling)):
            for row, block in zip(rows, block_BN, strict=True):
                row += block.tolist()
        return [self._until_end(row) for row in rows]

    def stream(self, prompt: str, *, max_new_tokens: int, **sampling: Any) -> Iterator[str]:
        """The continuation of one prompt in pieces, as they are decoded. Arguments and errors as in `generate`."""
        prompts = [self.tokenizer.encode(prompt, bos=True)]
        return self._text_of(self.blocks(prompts, max_new_tokens, SamplingConfig(**sampling)))

    def _text_of(self, blocks: Iterator[np.ndarray]) -> Iterator[str]:
        ids: list[int] = []
        n_sent = 0
        for block_BN in blocks:
            ids = self._until_end(ids + block_BN[0].tolist())
            text = self.tokenizer.decode(ids)
            complete = len(text.rstrip("\ufffd"))  # a character whose bytes are not all there yet waits
            if complete > n_sent:
                yield text[n_sent:complete]
                n_sent = complete
        if ids and len(text := self.tokenizer.decode(ids)) > n_sent:
            yield text[n_sent:]

    def blocks(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: SamplingConfig
    ) -> Iterator[np.ndarray]:
        """Decodes up to BLOCK tokens of every row at a time, int (B, n), until every row has ended or has
        max_new_tokens. A row that has ended goes on; what follows its end means nothing."""
        self._check(prompts, max_new_tokens)  # at the call, not at the first block
        return self._decode_blocks(prompts, max_new_tokens, sampling)

    def _decode_blocks(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: SamplingConfig
    ) -> Iterator[np.ndarray]:
        length_B = np.array([len(prompt) for prompt in prompts], np.int32)
        limit = self.config.context_length
        tokens_BT = np.zeros((len(prompts), bucket(int(length_B.max()), limit)), np.int32)
        for row, prompt in zip(tokens_BT, prompts, strict=True):
            row[: len(prompt)] = prompt
        state = self._prefill(tokens_BT, length_B, bucket(int(length_B.max()) + max_new_tokens, limit))
        ended_B = np.zeros(len(prompts), bool)
        for start in range(0, max_new_tokens, BLOCK):
            uniforms_BN = uniforms(sampling.seed, len(prompts), length_B + start, BLOCK)
            block_BN, state = self._decode(state, uniforms_BN, min(BLOCK, max_new_tokens - start), sampling)
            yield block_BN
            ended_B |= (block_BN == self.tokenizer.eos_id).any(axis=1)
            if ended_B.all():
                return

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if not prompts or not all(prompts):
            raise InputError("nothing to continue", expected="at least one prompt of at least one token", found=prompts)
        if max_new_tokens < 1:
            raise InputError("max_new_tokens is out of range", expected="1 or more", found=max_new_tokens)
        longest = max(map(len, prompts))
        limit = self.config.context_length
        if longest + max_new_tokens > limit:
            raise InputError(
                "the prompt and its continuation are longer than the context",
                expected=f"at most {limit} tokens",
                found=f"{longest} of the prompt + {max_new_tokens} new",
                do=f"shorten the prompt, or ask for at most {limit - longest} new tokens"
                if longest < limit
                else "shorten the prompt",
            )
        ids = [token for prompt in prompts for token in prompt]
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            expected = f"0 to {self.config.vocab_size - 1}"
            raise InputError("token id outside the vocabulary", expected=expected, found=f"{min(ids)} to {max(ids)}")

    def _until_end(self, ids: list[int]) -> list[int]:
        return ids[: ids.index(self.tokenizer.eos_id)] if self.tokenizer.eos_id in ids else ids
