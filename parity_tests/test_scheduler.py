"""Continuous batching: what runs beside a request changes no bit of its answer, in both frameworks."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from minillm_core.decoding import scheduler as scheduling
from minillm_core.decoding.generation import BLOCK, BaseGenerator
from minillm_core.decoding.logprobs import most_likely
from minillm_core.decoding.scheduler import (
    Details,
    Event,
    ExpiredError,
    Job,
    PromptScores,
    QueueFullError,
    Scheduler,
    Update,
)
from minillm_core.errors import InputError
from minillm_core.text.tokenizer import Tokenizer
from parity_tests.conftest import BACKENDS, TIERS, TINY, Tier
from parity_tests.test_generate import complete, generators

ROWS = 4


@pytest.fixture
def n_threads() -> Iterator[int]:
    """Three threads for torch, so that they share a batch unevenly."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


@dataclass
class Answer:
    """Everything that a listener was told, by sample."""

    scores: PromptScores | None = None
    updates: dict[int, list[Update]] = field(default_factory=dict)
    error: Exception | None = None
    n_events: int = 0

    def listen(self, event: Event) -> None:
        self.n_events += 1
        if isinstance(event, PromptScores):
            self.scores = event
        elif isinstance(event, Update):
            self.updates.setdefault(event.sample, []).append(event)
        else:
            self.error = event

    def all(self, name: str, sample: int = 0) -> Any:
        parts = [getattr(update, name) for update in self.updates[sample]]
        return "".join(parts) if name == "text" else [item for part in parts for item in part]

    def result(self) -> list[tuple[Any, ...]]:
        return [
            (*(self.all(name, i) for name in ("text", "tokens", "logprobs")), self.updates[i][-1].finish_reason)
            for i in sorted(self.updates)
        ]


def submit(
    scheduler: Scheduler, request: dict[str, Any], details: Details = scheduling.TOKENS_ONLY
) -> tuple[Job, Answer]:
    options, answer = dict(request), Answer()
    checked = scheduler.generator.request([options.pop("prompt")], options.pop("max_new_tokens"), **options)
    return scheduler.submit(checked, answer.listen, details), answer


def run(scheduler: Scheduler) -> None:
    while scheduler.step():
        pass


def alone(generator: BaseGenerator, request: dict[str, Any], details: Details = scheduling.TOKENS_ONLY) -> Answer:
    scheduler = Scheduler(generator, max_batch=ROWS)
    _, answer = submit(scheduler, request, details)
    run(scheduler)
    return answer


def requests(n: int) -> list[dict[str, Any]]:
    """Different prompts, lengths and options, some greedy, some with several samples and stops."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(n):
        request = {
            "prompt": [1, *rng.integers(4, 512, rng.integers(0, 60)).tolist()],
            "max_new_tokens": int(rng.integers(1, 40)),
            "temperature": [0.0, 0.7, 1.3][i % 3],
            "top_k": [0, 5][i % 2],
            "top_p": [1.0, 0.9, 0.5, 0.95][i % 4],
            "min_p": [0.0, 0.05][i // 2 % 2],
            "repetition_penalty": [1.0, 1.3, 0.8][i // 3 % 3],
            "seed": i,
        }
        if i % 5 == 0:
            request |= {"n": 3, "stop": ["e", "th"]}
        if i % 7 == 0:
            request |= {"prompt": [1, *rng.integers(4, 512, 270).tolist()], "stop": [17]}  # a batch of longer rows
        found.append(request)
    return found


@pytest.mark.parametrize("framework", BACKENDS)
def test_an_answer_is_that_of_the_request_alone(framework: str, tokenizer: Tokenizer) -> None:
    """40 requests that arrive at random times, some cancelled: tokens, text and log-probabilities, bit for bit."""
    generator = generators(TINY, TIERS["float32"], tokenizer)[framework]
    wanted, rng = requests(40), np.random.default_rng(1)
    details = [Details(alternatives=3) if i % 6 == 0 else scheduling.TOKENS_ONLY for i in range(40)]
    scheduler = Scheduler(generator, max_batch=ROWS)
    answers, most = [], 0
    for request, detail in zip(wanted, details, strict=True):
        answers.append(submit(scheduler, request, detail)[1])
        cancelled, _ = submit(scheduler, request | {"max_new_tokens": 40})
        for _ in range(rng.integers(0, 4)):
            scheduler.step()
            most = max(most, scheduler.n_running)
        scheduler.cancel(cancelled)
    run(scheduler)
    assert most >= 2 * ROWS - 1, "few requests ran side by side"
    assert (scheduler.n_running, scheduler.n_waiting) == (0, 0)
    for request, detail, answer in zip(wanted, details, answers, strict=True):
        assert answer.result() == alone(generator, request, detail).result(), request
        assert len(answer.result()) == request.get("n", 1)


@pytest.mark.extended
@pytest.mark.parametrize(("hidden", "n_rows"), [(100, 3), (172, 5), (2048, 40)])
@pytest.mark.parametrize("framework", BACKENDS)
def test_an_answer_does_not_depend_on_its_row(
    framework: str, hidden: int, n_rows: int, tokenizer: Tokenizer, n_threads: int
) -> None:
    """In the first row, in the last one, and in between; also with sizes that vector instructions do not divide, and
    with batches that several threads share."""
    generator = generators(replace(TINY, hidden=hidden), TIERS["float32"], tokenizer)[framework]
    scheduler = Scheduler(generator, max_batch=n_rows)
    request = {"prompt": [1, *range(60, 80)], "max_new_tokens": 40, "temperature": 1.0, "seed": 3}
    answers = [submit(scheduler, request)[1] for _ in range(n_rows)]
    run(scheduler)
    different = [i for i in range(n_rows) if answers[i].result() != answers[0].result()]
    assert not different, f"rows {different} of {n_rows}"


def test_frameworks_and_generate_agree(float64: Tier, tokenizer: Tokenizer) -> None:
    """The scheduler's answers are those of `generate`, in both frameworks."""
    both = generators(TINY, float64, tokenizer)
    for request in requests(15):  # 3 x 5: every kind of sampling, with and without several samples
        options = dict(request)
        expected = complete(both["torch"], [options.pop("prompt")], **options)
        for generator in both.values():
            for (text, tokens, logprobs, reason), completion in zip(
                alone(generator, request).result(), expected, strict=True
            ):
                end = tokens[len(completion.tokens) :]  # `generate` leaves it out
                assert len(end) <= 1
                assert {*end} <= {generator.tokenizer.eos_id, 17}
                assert (text, tokens, reason) == (completion.text, completion.tokens + end, completion.finish_reason)
                assert np.allclose(logprobs[: len(completion.tokens)], completion.logprobs, rtol=0, atol=1e-12)


@pytest.mark.extended
@pytest.mark.parametrize("framework", BACKENDS)
def test_prompts_are_scored(framework: str, float64: Tier, tokenizer: Tokenizer) -> None:
    """The log-probabilities of a prompt are those of `score`; the alternatives and the logits explain each choice."""
    generator = generators(TINY, float64, tokenizer)[framework]
    for n_tokens in (2, 33, 200, TINY.context_length):
        prompt = [1, *range(4, 3 + n_tokens)]
        new = min(9, TINY.context_length - n_tokens)
        request = {"prompt": prompt, "max_new_tokens": new, "least_new_tokens": 0, "temperature": 0.0}
        answer = alone(generator, request, Details(alternatives=2, prompt=True, logits=True))
        assert answer.scores is not None
        assert np.allclose(answer.scores.logprobs, generator.score([prompt])[0], rtol=0, atol=1e-12)
        assert len(answer.scores.alternatives) == n_tokens - 1
        whole = [best[0] for best in answer.scores.alternatives]
        likely = alone(generator, {"prompt": prompt[:2], "max_new_tokens": 1, "temperature": 0.0})
        assert n_tokens == 2 or likely.all("tokens") == [whole[1][0]]
        if not new:
            assert not answer.updates
            continue
        for token, logprob, best, logits_V in zip(
            *(answer.all(name) for name in ("tokens", "logprobs", "alternatives", "logits")), strict=True
        ):
            assert best[0][0] == token
            assert best[0][1] == pytest.approx(logprob, abs=1e-12)
            assert best[0][1] >= best[1][1]
            assert logits_V[best[1][0]] == np.sort(logits_V)[-2]
            assert best[0][1] - best[1][1] == pytest.approx(logits_V[token] - logits_V[best[1][0]], abs=1e-12)


def test_most_likely() -> None:
    logits = np.array([1.0, 3.0, 3.0, 2.0, -math.inf])
    assert [token for token, _ in most_likely(logits, 4)] == [1, 2, 3, 0]
    assert [token for token, _ in most_likely(logits, 1)] == [1]
    assert len(most_likely(logits, 9)) == 5
    assert sum(math.exp(logprob) for _, logprob in most_likely(logits, 9)) == pytest.approx(1)


@pytest.mark.extended
@pytest.mark.parametrize("framework", BACKENDS)
def test_a_request_that_leaves_frees_its_row(framework: str, tokenizer: Tokenizer) -> None:
    generator = generators(TINY, TIERS["float32"], tokenizer)[framework]
    scheduler = Scheduler(generator, max_batch=1)
    request = {"prompt": [1, 5], "max_new_tokens": 180, "stop": [], "temperature": 1.0}
    first, left = submit(scheduler, request)
    _, answer = submit(scheduler, request | {"max_new_tokens": 3})
    scheduler.step()
    assert (scheduler.n_running, scheduler.n_waiting) == (1, 1)
    scheduler.cancel(first)
    run(scheduler)
    assert left.n_events == 1
    assert len(answer.all("tokens")) <= BLOCK
    assert answer.updates[0][-1].finish_reason is not None


@pytest.mark.extended
def test_requests_with_many_continuations_take_turns(tokenizer: Tokenizer) -> None:
    """A short request does not wait until all continuations of the one before it are done; a scored prompt needs no
    row."""
    generator = generators(TINY, TIERS["float32"], tokenizer)["torch"]
    scheduler = Scheduler(generator, max_batch=ROWS)
    many = {"prompt": [1, 5], "max_new_tokens": 30, "n": 20, "temperature": 1.0}
    large = [submit(scheduler, many | {"seed": i})[1] for i in range(6)]
    scheduler.step()
    _, short = submit(scheduler, {"prompt": [1, 5], "max_new_tokens": 2})
    _, scored = submit(
        scheduler, {"prompt": [1, 5, 6], "max_new_tokens": 0, "least_new_tokens": 0}, Details(prompt=True)
    )
    n_steps = 0
    while not short.updates or not short.updates[0][-1].finish_reason:
        scheduler.step()
        n_steps += 1
        assert scored.scores is not None
    assert n_steps < 60
    assert sum(len(answer.updates) for answer in large) < 80
    run(scheduler)
    for i, answer in enumerate(large):
        assert answer.result() == alone(generator, many | {"seed": i}).result()


@pytest.mark.extended
def test_limits(tokenizer: Tokenizer) -> None:
    """A full queue, an expired request, options out of range, a closed scheduler: nobody else is disturbed."""
    generator = generators(TINY, TIERS["float32"], tokenizer)["torch"]
    scheduler = Scheduler(generator, max_batch=1, max_queue=2, time_limit=0.2)
    request = {"prompt": [1, 5], "max_new_tokens": 2}
    _, answer = submit(scheduler, request)
    submit(scheduler, request)
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        submit(scheduler, request)
    run(scheduler)
    assert answer.error is None
    _, late = submit(scheduler, request)
    time.sleep(0.25)
    run(scheduler)
    assert isinstance(late.error, ExpiredError)
    assert not late.updates
    for options in ({"max_batch": 0}, {"max_queue": -1}, {"time_limit": math.nan}):
        with pytest.raises(InputError, match="out of range"):
            Scheduler(generator, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_new_tokens"):
        submit(scheduler, request | {"max_new_tokens": 0})
    scheduler.start()
    scheduler.close()
    with pytest.raises(QueueFullError, match="shutting down"):
        submit(scheduler, request)


@pytest.mark.extended
def test_a_failure_ends_the_requests_that_it_concerns(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that are not finite end one request, a failure of the device those of its batch."""
    generator = generators(TINY, TIERS["float32"], tokenizer)["torch"]
    scheduler = Scheduler(generator, max_batch=ROWS)
    request = {"prompt": [1, 5], "max_new_tokens": 6, "n": 2}
    expected = alone(generator, request).result()
    decode = type(generator)._decode

    def failing(self: Any, *arguments: Any, **options: Any) -> Any:
        tokens, logprobs, state = decode(self, *arguments, **options)
        logprobs[0] = np.nan
        return tokens, logprobs, state

    with monkeypatch.context() as patch:
        patch.setattr(type(generator), "_decode", failing)
        _, bad = submit(scheduler, request)
        _, good = submit(scheduler, request)
        run(scheduler)
    assert isinstance(bad.error, InputError)
    assert good.result() == expected
    with monkeypatch.context() as patch:
        patch.setattr(type(generator), "_decode", lambda *_, **__: 1 / 0)
        failed: Sequence[Answer] = [submit(scheduler, request)[1] for _ in range(2)]
        run(scheduler)
    assert all(isinstance(answer.error, ZeroDivisionError) for answer in failed)
    _, after = submit(scheduler, request)
    run(scheduler)
    assert after.result() == expected


@pytest.mark.extended
def test_scores_that_are_not_finite_are_an_error(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt may be scored without a new token, whose log-probability is checked. NaN is not JSON."""
    generator = generators(TINY, TIERS["float32"], tokenizer)["torch"]
    request = {"prompt": [1, 5, 9], "max_new_tokens": 0, "least_new_tokens": 0}
    scheduler, details = Scheduler(generator, max_batch=1), Details(prompt=True)
    prefill = type(generator)._prefill_logits

    def failing(self: Any, state: Any, tokens_BT: np.ndarray, valid_B: np.ndarray) -> Any:
        logits_BTV, state = prefill(self, state, tokens_BT, valid_B)
        return np.where(tokens_BT[:, :, None] == 9, np.nan, logits_BTV), state

    monkeypatch.setattr(type(generator), "_prefill_logits", failing)
    _, good = submit(scheduler, request, details)
    _, bad = submit(scheduler, request | {"prompt": [1, 9, 5]}, details)
    _, after = submit(scheduler, request, details)
    run(scheduler)
    assert isinstance(bad.error, InputError)
    assert bad.n_events == 1
    assert good.scores
    assert after.scores == good.scores


@pytest.mark.extended
def test_the_thread(tokenizer: Tokenizer) -> None:
    """Started before and after requests arrive; closing tells those that are not finished."""
    generator = generators(TINY, TIERS["float32"], tokenizer)["torch"]
    scheduler = Scheduler(generator, max_batch=1)
    request = {"prompt": [1, 5], "max_new_tokens": 8}
    answers = [submit(scheduler, request)[1] for _ in range(3)]
    scheduler.start()
    answers += [submit(scheduler, request)[1] for _ in range(3)]
    give_up = time.monotonic() + 30
    while not all(a.updates and a.updates[0][-1].finish_reason for a in answers) and time.monotonic() < give_up:
        time.sleep(0.01)
    assert all(a.result() == answers[0].result() for a in answers)
    unfinished = [submit(scheduler, request | {"max_new_tokens": 200})[1] for _ in range(20)]
    scheduler.close()
    assert any(isinstance(a.error, QueueFullError) for a in unfinished)
    assert all(a.error or a.updates[0][-1].finish_reason for a in unfinished)
