"""Decoding on the device: prefill, sampling, and a loop over a static cache.

Shapes: B batch, T prompt positions, N tokens of a block, V vocabulary.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from minillm_core.generation import BaseGenerator
from minillm_core.sampling import SamplingConfig
from minillm_core.tokenizer import Tokenizer
from minillm_torch.kv_cache import KVCache, init_cache
from minillm_torch.layers import at_least_float32
from minillm_torch.model import MiniLLM

DecodeState = tuple[Tensor, KVCache]
"""Logits (B, V) of the next token, and the cache of all before it."""


class Generator(BaseGenerator):
    """Generates text from a model; see BaseGenerator for `generate`, `generate_tokens` and `stream`."""

    def __init__(self, model: MiniLLM, tokenizer: Tokenizer):
        super().__init__(model, tokenizer)
        self._model = model
        self._dtype = model.compute_dtype
        self._device = model.model.norm.weight.device

    def _prefill(self, tokens_BT: np.ndarray, length_B: np.ndarray, capacity: int) -> DecodeState:
        cache = init_cache(self.config, len(tokens_BT), capacity, self._dtype, self._device)
        tokens = torch.from_numpy(tokens_BT).long().to(self._device)
        return _prefill(self._model, tokens, torch.from_numpy(length_B).long(), cache)

    def _decode(
        self, state: DecodeState, uniforms_BN: np.ndarray, n_tokens: int, sampling: SamplingConfig
    ) -> tuple[np.ndarray, DecodeState]:
        filters = (float(sampling.temperature), min(sampling.top_k, self.config.vocab_size), float(sampling.top_p))
        greedy = sampling.temperature == 0
        uniforms = torch.from_numpy(uniforms_BN).to(self._device)
        tokens_BN, state = _decode(self._model, greedy, state, uniforms, n_tokens, filters)
        return tokens_BN.cpu().numpy(), state


@torch.inference_mode()
def _prefill(model: MiniLLM, tokens_BT: Tensor, length_B: Tensor, cache: KVCache) -> DecodeState:
    """Positions past a row's length hold padding; they are not visible, and decoding overwrites them."""
    x_BTD, full_cache = model.model(tokens_BT, cache)
    last_B1D = torch.take_along_dim(x_BTD, (length_B - 1).to(tokens_BT.device)[:, None, None], dim=1)
    return model.head(last_B1D)[:, 0], dataclasses.replace(full_cache, length_B=length_B)


@torch.inference_mode()
def _decode(
    model: MiniLLM,
    greedy: bool,
    state: DecodeState,
    uniforms_BN: Tensor,
    n_tokens: int,
    filters: tuple[float, int, float],
) -> tuple[Tensor, DecodeState]:
    """Samples n_tokens tokens, one model step each, without waiting for the device in between."""
    logits_BV, cache = state
    tokens: list[Tensor] = []
    for i in range(n_tokens):
        token_B = torch.argmax(logits_BV, dim=-1) if greedy else sample(logits_BV, uniforms_BN[:, i], *filters)
        logits_BTV, cache = model(token_B[:, None], cache)
        logits_BV = logits_BTV[:, 0]
        tokens.append(token_B)
    return torch.stack(tokens, dim=1), (logits_BV, cache)


def sample(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """One token per row, by inverse CDF over the filtered distribution, in the order of token ids.

    Sorting only selects: were the CDF in the order of probability, rounding would swap near-equal tokens' places.

    Args:
        uniform_B: in [0, 1), one per row.
        temperature: above 0.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens that together have at least this probability.
    """
    logits_BV = logits_BV.to(at_least_float32(logits_BV.dtype))
    logits_BV = (logits_BV - torch.amax(logits_BV, dim=-1, keepdim=True)) / temperature
    order_BV = torch.argsort(-logits_BV, dim=-1, stable=True)
    rank_BV = torch.argsort(order_BV, dim=-1)
    sorted_BV = torch.take_along_dim(logits_BV, order_BV, dim=-1)
    if top_k > 0:
        sorted_BV = sorted_BV.index_fill(-1, torch.arange(top_k, sorted_BV.shape[-1]).to(sorted_BV.device), -torch.inf)
    # torch's cumsum adds one by one, which in float32 drifts over a large vocabulary; XLA's adds in a tree.
    probs_BV = torch.softmax(sorted_BV, dim=-1).double()
    before_BV = torch.cumsum(probs_BV, dim=-1) - probs_BV
    probs_BV = probs_BV.masked_fill(~((before_BV < top_p) | (before_BV == 0)), 0.0)
    cdf_BV = torch.cumsum(torch.take_along_dim(probs_BV, rank_BV, dim=-1), dim=-1)
    return torch.argmax((cdf_BV > uniform_B[:, None] * cdf_BV[:, -1:]).int(), dim=-1)
