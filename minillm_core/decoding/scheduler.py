"""Continuous batching: requests join and leave a batch that is always running (Orca, Yu et al., OSDI 2022).

All arrays that a request is computed with have shapes that depend on this request alone: its prompt runs in a batch of
one row, and it decodes in a batch of always `max_batch` rows, with a capacity that follows from the request's length.
So the same programs compute it whatever runs beside it, and its numbers are the same to the last bit.

Shapes: B rows, T prompt tokens, N tokens per block, V vocabulary.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from minillm_core.decoding.generation import BLOCK, BaseGenerator, check_finite, shown
from minillm_core.decoding.logprobs import Alternatives, most_likely, normalizer
from minillm_core.decoding.requests import Request, Row
from minillm_core.decoding.sampling import Filters, SamplingConfig, uniforms
from minillm_core.errors import InputError

logger = logging.getLogger(__name__)

WIDTHS = (32, 128, 512)
"""Prompt tokens per call: the smallest of these that holds the rest of the prompt, or the largest."""
SCORED_WIDTHS = (32, 128)
"""The same for a prompt whose logits are all kept on the host."""
BLOCK_SECONDS = 0.1
"""About how long a block of tokens takes. Longer blocks cost less per token, but requests join and leave between them,
and a stream advances by whole blocks."""
TOKENS_PER_STEP = 512
"""Prompt tokens that join the batch between two blocks: more would delay the requests that are being decoded."""
MOST_STARTED = 4
"""Requests of a batch of which some continuations run and others wait: each keeps a cache of one row."""
SMALLEST, GROWTH = 192, 2
"""Capacities of the batches: 192, 384, 768 ... tokens per row. Requests of similar length share a batch. With fewer
sizes, more requests would share one; but every step reads the whole cache, which soon is larger than the weights."""


@dataclass(frozen=True)
class Details:
    """What a request reports besides its tokens."""

    alternatives: int | None = None
    """The number of most likely tokens at every position; None: not reported."""
    prompt: bool = False
    """The log-probabilities of the prompt's tokens, and their alternatives."""
    logits: bool = False
    """All logits that each token was sampled from."""

    @property
    def of_tokens(self) -> bool:
        """Whether the host must see the logits of every new token."""
        return self.alternatives is not None or self.logits


@dataclass(frozen=True)
class PromptScores:
    """The log-probability of every token of a prompt except the first, given those before it."""

    logprobs: list[float]
    alternatives: list[Alternatives]


@dataclass(frozen=True)
class Update:
    """What a block adds to one continuation."""

    sample: int
    text: str
    tokens: list[int]
    """With the token that ends the continuation, if one does; it adds no text."""
    logprobs: list[float]
    alternatives: list[Alternatives]
    """One per token if they were asked for, else empty."""
    logits: list[np.ndarray]
    """The same, (V,) each."""
    finish_reason: Literal["stop", "length"] | None


TOKENS_ONLY = Details()


class QueueFullError(Exception):
    """There are too many waiting requests."""


class ExpiredError(Exception):
    """A request took longer than it may."""


Event = PromptScores | Update | Exception
"""An exception ends a request: InputError (logits that are not finite), ExpiredError, or a failure of the device."""


@dataclass(eq=False)
class Job:
    """A request in the scheduler."""

    request: Request
    listener: Callable[[Event], None]
    details: Details
    deadline: float
    """In time.monotonic's seconds."""
    capacity: int
    is_cancelled: bool = False
    state: Any = None
    """The decoding state of one row with the first n_prefilled tokens of the prompt."""
    n_prefilled: int = 0
    n_placed: int = 0
    """Continuations that have joined the batch."""
    scores: PromptScores = field(default_factory=lambda: PromptScores([], []))

    @property
    def prompt(self) -> list[int]:
        return self.request.rows[0].prompt


@dataclass(eq=False)
class _Slot:
    """A continuation in the batch."""

    job: Job
    sample: int
    row: Row
    n_shown: int = 0


class _Batch:
    """Requests of similar length: those that wait, and those in the rows of one state."""

    def __init__(self, capacity: int, n_rows: int):
        self.capacity = capacity
        self.state: Any = None
        self.slots: list[_Slot | None] = [None] * n_rows
        self.waiting: deque[Job] = deque()
        self.token_seconds = BLOCK_SECONDS
        """How long the last block took per token."""

    def jobs(self) -> set[Job]:
        return {*self.waiting, *(slot.job for slot in self.slots if slot)}

    def remove(self, job: Job) -> None:
        self.slots = [None if slot and slot.job is job else slot for slot in self.slots]
        if job in self.waiting:
            self.waiting.remove(job)


class Scheduler:
    """Runs requests of one generator, many at a time, in a thread of its own. Each answer is the one that the request
    gets alone, whatever runs beside it."""

    def __init__(self, generator: BaseGenerator, *, max_batch: int = 16, max_queue: int = 256, time_limit: float = 600):
        """
        Args:
            max_batch: continuations of similar length that are decoded together.
            max_queue: requests that may wait.
            time_limit: seconds that a request may take, waiting included.
        """
        for name, value in (("max_batch", max_batch), ("max_queue", max_queue), ("time_limit", time_limit)):
            if not value > 0:
                raise InputError(f"{name} is out of range", expected="more than 0", found=value)
        self.generator, self.max_batch = generator, max_batch
        self.max_queue, self._time_limit = max_queue, time_limit
        self._batches: dict[int, _Batch] = {}
        self._submitted: deque[Job] = deque()
        self._work = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the thread. Unfinished requests get an exception."""
        with self._work:
            self._is_closed = True
            self._work.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def n_running(self) -> int:
        """Continuations that are being decoded."""
        return sum(slot is not None for batch in [*self._batches.values()] for slot in batch.slots)

    @property
    def n_waiting(self) -> int:
        """Requests that have not joined a batch."""
        return len(self._submitted) + sum(len(batch.waiting) for batch in [*self._batches.values()])

    def submit(self, request: Request, listener: Callable[[Event], None], details: Details = TOKENS_ONLY) -> Job:
        """Queues a request, made by `generator.request`.

        Args:
            listener: called in the scheduler's thread with every event of the request; it must not block.

        Raises:
            QueueFullError: too many requests wait.
        """
        capacity, limit = SMALLEST, self.generator.config.context_length
        while capacity < len(request.rows[0].prompt) + request.max_new_tokens:
            capacity *= GROWTH
        job = Job(request, listener, details, time.monotonic() + self._time_limit, min(capacity, limit))
        with self._work:
            if self._is_closed:
                raise QueueFullError("the server is shutting down")
            if self.n_waiting >= self.max_queue:
                raise QueueFullError(f"{self.max_queue} requests are waiting")
            self._submitted.append(job)
            self._work.notify()
        return job

    def cancel(self, job: Job) -> None:
        """The request leaves before the next block. Its listener may still get an event that is under way."""
        job.is_cancelled = True
        with self._work:
            self._work.notify()

    def _run(self) -> None:
        while not self._is_closed:
            if not self.step():
                with self._work:
                    if not self._submitted and not self._is_closed:
                        self._work.wait()
        for job in [*self._submitted, *(job for batch in self._batches.values() for job in batch.jobs())]:
            job.listener(QueueFullError("the server is shutting down"))

    def step(self) -> bool:
        """Lets requests join, and decodes one block of every batch. Returns whether there is more to do."""
        with self._work:
            while self._submitted:
                job = self._submitted.popleft()
                batch = self._batches.setdefault(job.capacity, _Batch(job.capacity, self.max_batch))
                batch.waiting.append(job)
        for batch in self._batches.values():
            self._remove_ended(batch)
            try:
                self._admit(batch)
                self._decode(batch)
            except Exception as error:
                logger.exception("a batch failed")
                for job in batch.jobs():
                    job.listener(error)
                self._batches[batch.capacity] = _Batch(batch.capacity, self.max_batch)
                break
        busy = {capacity for capacity, batch in self._batches.items() if batch.jobs()}
        if len(self._batches) > 1:  # one idle batch keeps its memory, for the next request
            self._batches = {capacity: self._batches[capacity] for capacity in busy or [*self._batches][:1]}
        return bool(busy)

    def _remove_ended(self, batch: _Batch) -> None:
        now = time.monotonic()
        for job in batch.jobs():
            if job.is_cancelled or now > job.deadline:
                batch.remove(job)
                if not job.is_cancelled:
                    job.listener(ExpiredError(f"the request took longer than {self._time_limit:g} seconds"))

    def _admit(self, batch: _Batch) -> None:
        """Processes prompts, first come first served, and puts their continuations into free rows. Requests that have
        several continuations take turns, one row each."""
        budget = TOKENS_PER_STEP
        while budget > 0 and (job := self._next(batch)):
            if job.n_prefilled < len(job.prompt):
                budget -= self._prefill(job)
                continue
            if job.details.prompt and job.n_placed == 0:
                try:
                    check_finite(job.scores.logprobs, "the prompt")
                except InputError as error:
                    batch.remove(job)
                    job.listener(error)
                    continue
                job.listener(job.scores)
            batch.waiting.remove(job)
            if job.request.max_new_tokens:
                row = batch.slots.index(None)
                if batch.state is None:
                    batch.state = self.generator._new_state(self.max_batch, batch.capacity)
                batch.state = self.generator._put_row(batch.state, row, job.state)
                batch.slots[row] = _Slot(job, job.n_placed, job.request.rows[job.n_placed])
                job.n_placed += 1
                if job.n_placed < job.request.n:
                    batch.waiting.append(job)
                    continue
            job.state = None

    def _next(self, batch: _Batch) -> Job | None:
        """The first waiting request for which there is room: a free row, unless it wants no new tokens."""
        n_started = sum(job.state is not None for job in batch.waiting)
        for job in batch.waiting:
            has_room = None in batch.slots or not job.request.max_new_tokens
            if has_room and (job.state is not None or job.request.n == 1 or n_started < MOST_STARTED):
                return job
        return None

    def _prefill(self, job: Job) -> int:
        """Processes the next tokens of a prompt, and returns how many the program has room for."""
        if job.state is None:
            job.state = self.generator._new_state(1, job.capacity)
        widths, start = SCORED_WIDTHS if job.details.prompt else WIDTHS, job.n_prefilled
        rest = job.prompt[start:]
        width = min(next((w for w in widths if w >= len(rest)), widths[-1]), job.capacity - start)
        tokens_BT = np.zeros((1, width), np.int32)
        n_tokens = min(width, len(rest))
        tokens_BT[0, :n_tokens] = rest[:n_tokens]
        valid_B = np.array([n_tokens], np.int32)
        if job.details.prompt:
            logits_BTV, job.state = self.generator._prefill_logits(job.state, tokens_BT, valid_B)
            for logits_V, target in zip(logits_BTV[0], rest[1 : n_tokens + 1], strict=False):
                job.scores.logprobs.append(float(logits_V[target]) - normalizer(logits_V))
                job.scores.alternatives.append(most_likely(logits_V, job.details.alternatives or 0))
        else:
            job.state = self.generator._prefill(job.state, tokens_BT, valid_B)
        job.n_prefilled += n_tokens
        return width

    def _decode(self, batch: _Batch) -> None:
        """Decodes a block: BLOCK_SECONDS long, or shorter if a row needs less. A block has one token if it is the first
        of a continuation, or if the host must see the logits."""
        active = [(i, slot) for i, slot in enumerate(batch.slots) if slot]
        if not active:
            return
        asking = [i for i, slot in active if slot.job.details.of_tokens]
        missing = min(slot.job.request.max_new_tokens - len(slot.row.tokens) for _, slot in active)
        is_first = any(not slot.row.tokens for _, slot in active)  # others often come at the same time
        count = 1 if asking or is_first else max(1, min(BLOCK, missing, round(BLOCK_SECONDS / batch.token_seconds)))
        logits = {i: self.generator._next_logits(batch.state, i) for i in asking}
        noise_BN = np.zeros((self.max_batch, BLOCK), np.float32)
        seen_BV = np.zeros((self.max_batch, self.generator.config.vocab_size), bool)
        active_B = np.zeros(self.max_batch, bool)
        options = [SamplingConfig()] * self.max_batch
        for i, slot in active:
            options[i], n_tokens = slot.job.request.sampling, len(slot.row.prompt) + len(slot.row.tokens)
            noise_BN[i] = uniforms(options[i].seed, slot.row.key, n_tokens, BLOCK)
            if options[i].repetition_penalty != 1:
                seen_BV[i, slot.row.prompt + slot.row.tokens] = True
            active_B[i] = True
        filters = Filters.of(options, self.generator.config.vocab_size)
        started = time.monotonic()
        tokens_BN, logprobs_BN, batch.state = self.generator._decode(
            batch.state, seen_BV, noise_BN, active_B, count, filters, greedy=False
        )
        batch.token_seconds = max((time.monotonic() - started) / count, 1e-6)
        for i, slot in active:
            if batch.slots[i] is slot:  # not if a failed continuation of the same request has ended it
                self._report(batch, slot, tokens_BN[i].tolist(), logprobs_BN[i].tolist(), logits.get(i))

    def _report(
        self, batch: _Batch, slot: _Slot, tokens: list[int], logprobs: list[float], logits_V: np.ndarray | None
    ) -> None:
        """Adds a block to a continuation, and tells the listener."""
        job, row, n_before = slot.job, slot.row, len(slot.row.tokens)
        try:
            self.generator._extend(row, tokens, logprobs, job.request)
        except InputError as error:
            batch.remove(job)
            job.listener(error)
            return
        text = shown(self.generator._text(row.tokens), job.request.stop_strings, ended=row.finish_reason is not None)
        tokens, logprobs = row.tokens[n_before:], row.logprobs[n_before:]
        if row.end is not None:
            tokens, logprobs = [*tokens, row.end[0]], [*logprobs, row.end[1]]
        alternatives, all_logits = list[Alternatives](), list[np.ndarray]()
        if logits_V is not None:  # of the only token of this block
            if job.details.alternatives is not None:
                alternatives.append(most_likely(logits_V, job.details.alternatives))
            if job.details.logits:
                all_logits.append(logits_V)
        update = Update(
            slot.sample, text[slot.n_shown :], tokens, logprobs, alternatives, all_logits, row.finish_reason
        )
        slot.n_shown = len(text)
        if row.finish_reason:
            batch.slots[batch.slots.index(slot)] = None
        job.listener(update)
