"""Decoding on the device: prefill, sampling, and a loop over a static cache.

Shapes: B rows, T prompt tokens, N tokens per block, V vocabulary.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from minillm_core.data.batches import Batch
from minillm_core.decoding.generation import BaseGenerator
from minillm_core.decoding.sampling import Filters
from minillm_core.text.tokenizer import Tokenizer
from minillm_torch.kv_cache import KVCache, init_cache, only_rows, put_row, take_rows
from minillm_torch.loss import make_eval_step, token_losses
from minillm_torch.model import MiniLLM
from minillm_torch.precision import at_least_float32

DecodeState = tuple[Tensor, KVCache]
"""Logits (B, V) for the next token, and the cache of all tokens before it."""


class Generator(BaseGenerator):
    """Generates and scores text; see BaseGenerator for `generate`, `stream`, `prefill` and `score`."""

    def __init__(self, model: MiniLLM, tokenizer: Tokenizer, *, compile: bool = False):
        """`compile` compiles the decoding step with `torch.compile`, once per batch size and bucket of lengths."""
        super().__init__(model, tokenizer)
        self._dtype = model.compute_dtype
        self._eval_step = make_eval_step(model)
        self._model = model
        self._device = model.model.norm.weight.device
        self._decoder = torch.compile(model.model, dynamic=False) if compile else model.model
        if compile:  # by default torch stops compiling after eight shapes and only logs it
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)

    def _new_state(self, n_rows: int, capacity: int) -> DecodeState:
        logits_BV = torch.zeros((n_rows, self.config.vocab_size), dtype=self._dtype, device=self._device)
        return logits_BV, init_cache(self.config, n_rows, capacity, self._dtype, device=self._device)

    def _take_rows(self, state: DecodeState, rows_B: np.ndarray, capacity: int) -> DecodeState:
        logits_BV, cache = state
        rows = torch.from_numpy(rows_B).long()
        return logits_BV[rows.to(self._device)], take_rows(cache, rows, capacity)

    def _put_row(self, state: DecodeState, row: int, one_row: DecodeState) -> DecodeState:
        return _put_row(state, row, one_row)

    def _next_logits(self, state: DecodeState, row: int) -> np.ndarray:
        return to_numpy(state[0][row])

    def _prefill(self, state: DecodeState, tokens_BT: np.ndarray, valid_B: np.ndarray) -> DecodeState:
        tokens = torch.from_numpy(tokens_BT).long().to(self._device)
        return _prefill(self._model, state, tokens, torch.from_numpy(valid_B).long())

    def _prefill_logits(
        self, state: DecodeState, tokens_BT: np.ndarray, valid_B: np.ndarray
    ) -> tuple[np.ndarray, DecodeState]:
        tokens = torch.from_numpy(tokens_BT).long().to(self._device)
        logits_BTV, state = _prefill_logits(self._model, state, tokens, torch.from_numpy(valid_B).long())
        return to_numpy(logits_BTV), state

    def _decode(
        self,
        state: DecodeState,
        seen_BV: np.ndarray,
        uniforms_BN: np.ndarray,
        active_B: np.ndarray,
        n_tokens: int,
        filters: Filters,
        *,
        greedy: bool,
    ) -> tuple[np.ndarray, np.ndarray, DecodeState]:
        seen, uniforms = (torch.from_numpy(array).to(self._device) for array in (seen_BV, uniforms_BN))
        tokens_BN, logprobs_BN, state = _decode(
            self._model, self._decoder, greedy, state, seen, uniforms, torch.from_numpy(active_B), n_tokens, filters
        )
        return tokens_BN.cpu().numpy(), logprobs_BN.cpu().numpy(), state

    def _losses(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self._eval_step(Batch.from_rows(rows)))


@torch.inference_mode()
def _put_row(state: DecodeState, row: int, one_row: DecodeState) -> DecodeState:
    logits_BV, cache = state
    logits_1V, one = one_row
    logits_BV[row] = logits_1V[0]
    return logits_BV, put_row(cache, row, one)


@torch.inference_mode()
def _prefill(model: MiniLLM, state: DecodeState, tokens_BT: Tensor, valid_B: Tensor) -> DecodeState:
    logits_BV, cache = state
    x_BTD, cache_after = model.model(tokens_BT, cache, valid_B)
    valid = valid_B.to(tokens_BT.device)
    last_B1D = torch.take_along_dim(x_BTD, (valid - 1).clamp(min=0)[:, None, None], dim=1)
    return torch.where((valid > 0)[:, None], model.head(last_B1D)[:, 0], logits_BV), cache_after


@torch.inference_mode()
def _prefill_logits(
    model: MiniLLM, state: DecodeState, tokens_BT: Tensor, valid_B: Tensor
) -> tuple[Tensor, DecodeState]:
    logits_BV, cache = state
    x_BTD, cache_after = model.model(tokens_BT, cache, valid_B)
    valid, logits_BTV = valid_B.to(tokens_BT.device), model.head(x_BTD)
    last_B1V = torch.take_along_dim(logits_BTV, (valid - 1).clamp(min=0)[:, None, None], dim=1)
    return logits_BTV, (torch.where((valid > 0)[:, None], last_B1V[:, 0], logits_BV), cache_after)


@torch.inference_mode()
def _decode(
    model: MiniLLM,
    decoder: Any,
    greedy: bool,
    state: DecodeState,
    seen_BV: Tensor,
    uniforms_BN: Tensor,
    active_B: Tensor,
    n_tokens: int,
    filters: Filters,
) -> tuple[Tensor, Tensor, DecodeState]:
    """Samples n_tokens tokens, one model step each, without synchronising with the device in between."""
    logits_BV, cache = state[0], only_rows(state[1], active_B)
    valid_B, greedy_B = active_B.long(), torch.from_numpy(filters.greedy_B).to(logits_BV.device)
    tokens: list[Tensor] = []
    logprobs: list[Tensor] = []
    for i in range(n_tokens):
        filtered_BV = filter_logits(logits_BV, seen_BV, filters, greedy=greedy)
        token_B = largest(filtered_BV)
        if not greedy:
            token_B = torch.where(greedy_B, token_B, draw(filtered_BV, uniforms_BN[:, i]))
        tokens.append(token_B)
        logprobs.append(-token_losses(logits_BV, token_B))
        seen_BV.scatter_(1, token_B[:, None], True)
        x_BTD, cache = decoder(token_B[:, None], cache, valid_B)
        logits_BV = model.head(x_BTD)[:, 0].contiguous()  # the layout decides in which order sums are added
    return torch.stack(tokens, dim=1), torch.stack(logprobs, dim=1), (logits_BV, cache)


def filter_logits(logits_BV: Tensor, seen_BV: Tensor, filters: Filters, *, greedy: bool) -> Tensor:
    """The logits (B, V) to sample from, up to a constant per row, in at least float32. Dropped tokens have -inf.

    Args:
        seen_BV: bool; the tokens that repetition_penalty applies to.
        greedy: apply only the penalty; the most likely token passes all other filters anyway.
    """
    logits_BV = logits_BV.to(at_least_float32(logits_BV.dtype))
    penalty_B1, temperature_B1, top_p_B1, log_min_p_B1 = (
        torch.from_numpy(x).to(logits_BV)
        for x in (filters.repetition_penalty_B1, filters.temperature_B1, filters.top_p_B1, filters.log_min_p_B1)
    )
    if (filters.repetition_penalty_B1 != 1).any():
        penalised_BV = torch.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
        logits_BV = torch.where(seen_BV, penalised_BV, logits_BV)
    if greedy:
        return logits_BV
    logits_BV = (logits_BV - torch.amax(logits_BV, dim=-1, keepdim=True)) / temperature_B1
    if (filters.top_k_B1 < logits_BV.shape[1]).any():
        logits_BV = _drop(
            logits_BV, torch.ones_like(logits_BV), torch.from_numpy(filters.top_k_B1).to(logits_BV.device)
        )
    if (filters.top_p_B1 < 1).any():
        logits_BV = _drop(logits_BV, torch.softmax(logits_BV, dim=-1), top_p_B1)
    return logits_BV.masked_fill(logits_BV < log_min_p_B1, -torch.inf)


def _drop(logits_BV: Tensor, weights_BV: Tensor, limit_B1: Tensor) -> Tensor:
    """Drops every token for which the weights of all larger logits sum to the row's limit or more.

    The threshold is found by bisection over all numbers of the dtype, mapped to integers in the same order. The result
    is exact and needs no sorting (for 32,000 logits, XLA:CPU takes 7 ms to sort and 0.5 ms to bisect).
    """
    int_dtype = {4: torch.int32, 8: torch.int64}[logits_BV.dtype.itemsize]
    bits_BV = logits_BV.view(int_dtype)
    ordered_BV = torch.where(bits_BV < 0, bits_BV ^ torch.iinfo(int_dtype).max, bits_BV)
    shape = (logits_BV.shape[0], 1)
    low_B1, high_B1 = (
        torch.full(shape, bound, dtype=int_dtype, device=logits_BV.device)
        for bound in (torch.iinfo(int_dtype).min, torch.iinfo(int_dtype).max)
    )  # always dropped, always kept
    for _ in range(8 * logits_BV.dtype.itemsize):
        middle_B1 = (low_B1 & high_B1) + ((low_B1 ^ high_B1) >> 1)
        above_B1 = torch.sum(weights_BV.masked_fill(ordered_BV <= middle_B1, 0), dim=-1, keepdim=True)
        kept_B1 = above_B1 < limit_B1
        low_B1, high_B1 = torch.where(kept_B1, low_B1, middle_B1), torch.where(kept_B1, middle_B1, high_B1)
    return logits_BV.masked_fill(ordered_BV <= low_B1, -torch.inf)


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Draws one token per row by inverse CDF, in the order of token ids; never a token of probability zero.

    In the order of probability, rounding could swap two tokens of nearly equal probability.

    Args:
        uniform_B: one number in [0, 1) per row.
    """
    probs_BV = torch.softmax(logits_BV, dim=-1)
    # torch's cumsum adds one by one, so in float32 the error grows with the vocabulary; XLA's adds in a tree.
    cdf_BV = torch.where(probs_BV > 0, torch.cumsum(probs_BV.double(), dim=-1), 0)
    return largest((cdf_BV > uniform_B[:, None] * torch.amax(cdf_BV, dim=-1, keepdim=True)).int())


def largest(x_BV: Tensor) -> Tensor:
    """Index of the first largest value of every row, int64."""
    return torch.argmax(x_BV, dim=-1)


def to_numpy(x: Tensor) -> np.ndarray:
    """A copy on the host, in at least float32."""
    return x.to(at_least_float32(x.dtype)).cpu().numpy().copy()
