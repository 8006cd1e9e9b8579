"""Sampling: filters of the logits, and the draw of a token.

Shapes: B rows, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minillm_core.decoding.sampling import Filters
from minillm_torch.precision import at_least_float32


@dataclass(frozen=True)
class Options:
    """The sampling options of every row on the device, and which of them any row uses."""

    filters: Filters
    greedy: bool
    """Every row takes the most likely token."""
    has_penalty: bool
    has_top_k: bool
    has_top_p: bool

    @property
    def static(self) -> tuple[bool, ...]:
        """What decides which operations a step has."""
        return self.greedy, self.has_penalty, self.has_top_k, self.has_top_p

    @classmethod
    def of(cls, filters: Filters, greedy: bool, logits_BV: Tensor) -> "Options":
        device, dtype = logits_BV.device, at_least_float32(logits_BV.dtype)
        tensors = (torch.from_numpy(x) for x in filters)
        return cls(
            Filters(*(x.to(device, dtype if x.is_floating_point() else None) for x in tensors)),
            greedy,
            has_penalty=bool((filters.repetition_penalty_B1 != 1).any()),
            has_top_k=bool((filters.top_k_B1 < logits_BV.shape[1]).any()),
            has_top_p=bool((filters.top_p_B1 < 1).any()),
        )


def filter_logits(logits_BV: Tensor, seen_BV: Tensor, filters: Filters, *, greedy: bool) -> Tensor:
    """The logits (B, V) to sample from, up to a constant per row, in at least float32. Dropped tokens have -inf.

    Args:
        seen_BV: bool; the tokens that repetition_penalty applies to.
        greedy: apply only the penalty; the most likely token passes all other filters anyway.
    """
    return apply_options(logits_BV, seen_BV, Options.of(filters, greedy, logits_BV))


def apply_options(logits_BV: Tensor, seen_BV: Tensor, options: Options) -> Tensor:
    logits_BV, filters = logits_BV.to(at_least_float32(logits_BV.dtype)), options.filters
    if options.has_penalty:
        penalty_B1 = filters.repetition_penalty_B1
        penalised_BV = torch.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
        logits_BV = torch.where(seen_BV, penalised_BV, logits_BV)
    if options.greedy:
        return logits_BV
    logits_BV = (logits_BV - torch.amax(logits_BV, dim=-1, keepdim=True)) / filters.temperature_B1
    if options.has_top_k:
        logits_BV = _drop(logits_BV, torch.ones_like(logits_BV), filters.top_k_B1)
    if options.has_top_p:
        logits_BV = _drop(logits_BV, torch.softmax(logits_BV, dim=-1), filters.top_p_B1)
    return logits_BV.masked_fill(logits_BV < filters.log_min_p_B1, -torch.inf)


def _drop(logits_BV: Tensor, weights_BV: Tensor, limit_B1: Tensor) -> Tensor:
    """Drops every token for which the weights of all larger logits sum to the row's limit or more.

    The threshold is found digit by digit, over all numbers of the dtype, mapped to integers in the same order. The
    result is exact and needs no sorting (for 32,000 logits, XLA:CPU takes 7 ms to sort and 0.5 ms for this).
    """
    int_dtype = {4: torch.int32, 8: torch.int64}[logits_BV.dtype.itemsize]
    bits_BV = logits_BV.view(int_dtype)
    ordered_BV = torch.where(bits_BV < 0, bits_BV ^ torch.iinfo(int_dtype).max, bits_BV)
    n_bits = digit_bits(len(logits_BV), logits_BV.device)
    digits_D = torch.arange(1, 1 << n_bits, dtype=int_dtype, device=logits_BV.device)  # D: all digits but 0
    low_B1 = torch.full_like(ordered_BV[:, :1], torch.iinfo(int_dtype).min)  # the largest number that is dropped
    for shift in range(torch.iinfo(int_dtype).bits - n_bits, -1, -n_bits):
        at_BD1 = (low_B1 + (digits_D << shift))[:, :, None]
        above_BD = torch.sum(weights_BV[:, None].masked_fill(ordered_BV[:, None] <= at_BD1, 0), dim=-1)
        n_dropped_B1 = torch.sum(above_BD >= limit_B1, dim=-1, keepdim=True, dtype=int_dtype)
        low_B1 = low_B1 + (n_dropped_B1 << shift)
    return logits_BV.masked_fill(ordered_BV <= low_B1, -torch.inf)


def digit_bits(n_rows: int, device: torch.device) -> int:
    """Bits of the threshold that `_drop` finds per pass over the logits. On a GPU with few rows, starting a kernel
    takes longer than its work, so fewer and larger passes are faster."""
    return 4 if device.type == "cuda" and n_rows <= 16 else 1


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Draws one token per row by inverse CDF, in the order of token ids; never a token of probability zero.

    In the order of probability, rounding could swap two tokens of nearly equal probability.

    Args:
        uniform_B: one number in [0, 1) per row.
    """
    probs_BV = torch.softmax(logits_BV, dim=-1)
    # torch's cumsum adds one by one, so in float32 the error grows with the vocabulary; XLA's adds in a tree. On a GPU,
    # only that of integers is deterministic: 2^-52 is the unit.
    high_BV = (probs_BV.double() * 2.0**52).long() if probs_BV.is_cuda else probs_BV.double()
    cdf_BV = torch.where(probs_BV > 0, torch.cumsum(high_BV, dim=-1).double(), 0)
    return largest((cdf_BV > uniform_B[:, None] * torch.amax(cdf_BV, dim=-1, keepdim=True)).int())


def largest(x_BV: Tensor) -> Tensor:
    """Index of the first largest value of every row, int64."""
    return torch.argmax(x_BV, dim=-1)
