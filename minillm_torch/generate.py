"""Decoding on the device: prefill, sampling, and a loop over a static cache.

Shapes: B rows, T prompt tokens, N tokens per block, V vocabulary.
"""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minillm_core.data.batches import Batch
from minillm_core.decoding.generation import BLOCK, BaseGenerator
from minillm_core.decoding.sampling import Filters
from minillm_core.text.tokenizer import Tokenizer
from minillm_torch.device import compiled
from minillm_torch.kv_cache import KVCache, LayerCache, init_cache, only_rows, put_row, take_rows
from minillm_torch.loss import make_eval_step, token_losses
from minillm_torch.model import MiniLLM
from minillm_torch.precision import at_least_float32
from minillm_torch.sampling import Options, apply_options, draw, largest

DecodeState = tuple[Tensor, KVCache]
"""Logits (B, V) for the next token, and the cache of all tokens before it."""


MAX_RECORDED = 16
"""Recorded steps that a generator keeps, besides those in use. Each has a cache of its own."""
_RECORDING = threading.Lock()
"""PyTorch allows one recording at a time in a process."""


class Generator(BaseGenerator):
    """Generates and scores text; see BaseGenerator for `generate`, `stream`, `prefill` and `score`."""

    def __init__(self, model: MiniLLM, tokenizer: Tokenizer, *, compile: bool = False):
        """`compile` compiles the decoding step with `torch.compile`, once per batch size and bucket of lengths."""
        super().__init__(model, tokenizer)
        self._dtype = model.compute_dtype
        self._eval_step = make_eval_step(model)
        self._model = model
        self._device = model.model.norm.weight.device
        self._decoder = compiled(model.model) if compile else model.model
        self._records = self._device.type == "cuda"
        self._recorded: list[_RecordedStep] = []
        """In the order in which they were last used."""
        self._lock = threading.Lock()

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
        uniforms, active = torch.from_numpy(uniforms_BN).to(self._device), torch.from_numpy(active_B)
        options, seen = Options.of(filters, greedy, state[0]), torch.zeros_like(state[0], dtype=torch.bool)
        if options.has_penalty:  # else nothing has to be sent: 8 MB for 256 rows
            seen.copy_(torch.from_numpy(seen_BV))
        block = _Block(seen, uniforms, active, n_tokens, options)
        if self._records:
            with self._lock:  # the buffers of a step belong to one call at a time
                tokens_BN, logprobs_BN, state = self._step_for(state, options).run(state, block)
        else:
            tokens_BN, logprobs_BN, state = _decode(self._model, self._decoder, state, block)
        return tokens_BN.cpu().numpy(), logprobs_BN.cpu().numpy(), state

    def _step_for(self, state: DecodeState, options: Options) -> "_RecordedStep":
        """The recorded step whose buffers hold this state, or one whose buffers nobody holds any more, or a new one. Of
        the steps that are free, only the last used ones are kept."""
        weights = tuple(param.data_ptr() for param in self._model.parameters())  # a graph reads them where they were
        key = (len(state[0]), state[1].capacity, options.static, weights)
        usable = [step for step in self._recorded if step.key == key and step.holds(state)]
        usable += [step for step in self._recorded if step.key == key and step.is_free()]
        if usable:
            self._recorded.remove(usable[0])
        for step in [step for step in self._recorded if step.is_free()]:
            if len(self._recorded) >= MAX_RECORDED:
                self._recorded.remove(step)
        step = usable[0] if usable else _RecordedStep(key, self._model, self._decoder, options)
        self._recorded.append(step)
        return step

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


@dataclass(frozen=True)
class _Block:
    """What the next tokens of every row depend on, besides the state."""

    seen_BV: Tensor
    uniforms_BN: Tensor
    active_B: Tensor
    """On the host."""
    n_tokens: int
    options: Options


def _step(
    model: MiniLLM,
    decoder: Any,
    logits_BV: Tensor,
    cache: KVCache,
    seen_BV: Tensor,
    uniform_B: Tensor,
    valid_B: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, DecodeState]:
    """Samples a token of every row, marks it as seen, and runs the model on it."""
    filtered_BV = apply_options(logits_BV, seen_BV, options)
    token_B = largest(filtered_BV)
    if not options.greedy:
        token_B = torch.where(options.filters.greedy_B, token_B, draw(filtered_BV, uniform_B))
    logprob_B = -token_losses(logits_BV, token_B)
    seen_BV.scatter_(1, token_B[:, None], True)
    x_BTD, cache = decoder(token_B[:, None], cache, valid_B)
    logits_BV = model.head(x_BTD)[:, 0].contiguous()  # the layout decides in which order sums are added
    return token_B, logprob_B, (logits_BV, cache)


@torch.inference_mode()
def _decode(model: MiniLLM, decoder: Any, state: DecodeState, block: _Block) -> tuple[Tensor, Tensor, DecodeState]:
    """Samples a block of tokens, one model step each, without synchronising with the device in between."""
    logits_BV, cache = state[0], only_rows(state[1], block.active_B)
    valid_B, uniforms_NB = block.active_B.long(), block.uniforms_BN.unbind(1)
    tokens: list[Tensor] = []
    logprobs: list[Tensor] = []
    for uniform_B in uniforms_NB[: block.n_tokens]:
        token_B, logprob_B, (logits_BV, cache) = _step(
            model, decoder, logits_BV, cache, block.seen_BV, uniform_B, valid_B, block.options
        )
        tokens.append(token_B)
        logprobs.append(logprob_B)
    return torch.stack(tokens, dim=1), torch.stack(logprobs, dim=1), (logits_BV, cache)


class _RecordedStep:
    """`_step` over buffers of its own, recorded as a CUDA graph: the host starts several hundred kernels in one call.
    It can be tested on a CPU, where nothing is recorded.

    A state that `run` returns uses the buffers, too. So there is no copy from one block of tokens to the next, and the
    buffers serve a different state only when nobody holds that one any more.
    """

    @torch.inference_mode()
    def __init__(self, key: tuple[Any, ...], model: MiniLLM, decoder: Any, options: Options):
        self.key = key
        n_rows, capacity = key[:2]
        device, dtype, high = model.model.norm.weight.device, model.compute_dtype, at_least_float32(model.compute_dtype)
        self._model, self._decoder = model, decoder
        cache = init_cache(model.config, n_rows, capacity, dtype, device=device)
        self._cache = replace(cache, length_B=cache.length_B.to(device), written_B=cache.written_B.to(device))
        self._logits_BV = torch.zeros((n_rows, model.config.vocab_size), dtype=dtype, device=device)
        self._seen_BV = torch.zeros_like(self._logits_BV, dtype=torch.bool)
        self._uniforms_BN = torch.zeros((n_rows, BLOCK), device=device)
        self._tokens_BN = torch.zeros((n_rows, BLOCK), dtype=torch.int64, device=device)
        self._logprobs_BN = torch.zeros((n_rows, BLOCK), dtype=high, device=device)
        self._valid_B = torch.zeros(n_rows, dtype=torch.int64, device=device)
        self._at_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self._options = replace(options, filters=Filters(*(x.clone() for x in options.filters)))
        self._owner: Callable[[], LayerCache | None] = lambda: None
        self._replay: Callable[[], None] = self._take_step
        if device.type == "cuda":
            with _RECORDING, torch.cuda.device(device):
                self._replay = self._record()

    def _record(self) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries and compilers start here: that cannot be recorded
            self._take_step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._take_step()
        return graph.replay

    def _take_step(self) -> None:
        uniform_B = self._uniforms_BN.index_select(1, self._at_1)[:, 0]
        token_B, logprob_B, (logits_BV, cache) = _step(
            self._model,
            self._decoder,
            self._logits_BV,
            self._cache,
            self._seen_BV,
            uniform_B,
            self._valid_B,
            self._options,
        )
        self._tokens_BN.index_copy_(1, self._at_1, token_B[:, None])
        self._logprobs_BN.index_copy_(1, self._at_1, logprob_B[:, None])
        self._logits_BV.copy_(logits_BV)
        self._cache.length_B.copy_(cache.length_B)
        self._at_1 += 1

    def holds(self, state: DecodeState) -> bool:
        """Whether the buffers hold this state."""
        return self._owner() is state[1].layers[0]

    def is_free(self) -> bool:
        """Whether nobody holds the state in the buffers."""
        return self._owner() is None

    @torch.inference_mode()
    def run(self, state: DecodeState, block: _Block) -> tuple[Tensor, Tensor, DecodeState]:
        """`_decode`; the state it returns uses the buffers."""
        logits_BV, cache, valid_B = state[0], only_rows(state[1], block.active_B), block.active_B.long()
        if not self.holds(state):
            for mine, theirs in zip(self._cache.layers, cache.layers, strict=True):
                mine.k_BKSH.copy_(theirs.k_BKSH)
                mine.v_BKSH.copy_(theirs.v_BKSH)
        if logits_BV is not self._logits_BV:
            self._logits_BV.copy_(logits_BV)
        inputs = ((self._seen_BV, block.seen_BV), (self._uniforms_BN, block.uniforms_BN), (self._valid_B, valid_B))
        filters = zip(self._options.filters, block.options.filters, strict=True)
        for mine, theirs in (*inputs, *filters, (self._cache.length_B, cache.length_B)):
            mine.copy_(theirs)
        self._at_1.zero_()
        for _ in range(block.n_tokens):
            self._replay()
        length_B = cache.length_B + block.n_tokens * valid_B
        layers = cache.layers if self.holds(state) else tuple(replace(layer) for layer in self._cache.layers)
        self._owner = weakref.ref(layers[0])
        after = KVCache(layers, length_B, length_B.clone())
        tokens_BN, logprobs_BN = (x[:, : block.n_tokens].clone() for x in (self._tokens_BN, self._logprobs_BN))
        return tokens_BN, logprobs_BN, (self._logits_BV, after)


def to_numpy(x: Tensor) -> np.ndarray:
    """A copy on the host, in at least float32."""
    return x.to(at_least_float32(x.dtype)).cpu().numpy().copy()
