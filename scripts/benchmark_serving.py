"""Measures a server: throughput next to that of `generate`, and many streams at once for minutes.

Needs `pip install -c constraints.txt -e '.[test]'`.
"""

import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import tyro

from minillm_cli.backends import load_backend
from minillm_cli.console import parse, run, say
from minillm_core.text.tokenizer_json import load_tokenizer
from minillm_core.training.checkpoints import find_checkpoint

WORDS = (
    "people",
    "states",
    "government",
    "free",
    "peace",
    "law",
    "the",
    "of",
    "shall",
    "not",
    "and",
    "their",
    "to",
    "be",
)
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
N_REQUESTS = 48
"""Different requests of the load; each answer is compared with that of the request alone."""


@dataclass
class Load:
    """What happened under load."""

    first_token: list[float] = field(default_factory=list)
    """Seconds to the first token of each request, waiting included."""
    n_finished: int = 0
    n_left: int = 0
    n_tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    """Resident bytes of the server, every second."""


def requests_of(model: str, max_tokens: int) -> list[dict[str, Any]]:
    """Prompts of 1 to 40 words; half of the requests sample with filters, some ask for log-probabilities."""
    rng = random.Random(0)
    found = []
    for i in range(N_REQUESTS):
        body = {"model": model, "prompt": " ".join(rng.choices(WORDS, k=rng.randint(1, 40))), "seed": i}
        body |= {"max_tokens": rng.randint(max_tokens // 4, max_tokens)}
        body |= [{"temperature": 0}, {"top_p": 0.9}, {"top_k": 50, "temperature": 1.5}, {}][i % 4]
        found.append(body | ({"logprobs": 2} if i % 12 == 0 else {}))
    return found


@contextlib.contextmanager
def serving(path: str, backend: str, max_batch: int) -> Iterator[tuple[str, int]]:
    """A server of its own: address and process."""
    script = Path(__file__).with_name("serve.py")
    command = [sys.executable, str(script), path, "--backend", backend, "--port", "0", "--max-batch", str(max_batch)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen([*command, "--name", "served"], stderr=log)
        try:
            url = ""
            while not url or httpx.get(f"{url}/health").status_code != 200:
                time.sleep(0.2)
                assert process.poll() is None, "the server has ended"
                log.seek(0)
                url = next((line.split(" on ")[1].split()[0] for line in log if line.startswith("serving")), "")
            yield url, process.pid
        finally:
            process.terminate()
            process.wait()


async def stream(
    client: httpx.AsyncClient, body: dict[str, Any], leave_after: int | None = None
) -> tuple[str, float, int]:
    """The text with its log-probabilities, seconds to the first token, and tokens of one streamed request."""
    started, first, parts, usage = time.perf_counter(), 0.0, [], 0
    body = body | STREAM
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, (await answer.aread()).decode()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            first = first or time.perf_counter() - started
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            usage = event.get("usage", {}).get("completion_tokens", 0)
            parts += [json.dumps([choice["text"], choice["logprobs"]]) for choice in event["choices"]]
            if leave_after is not None and len(parts) > leave_after:
                break
    texts = [json.loads(part) for part in parts]
    logprobs = [value for _, found in texts if found for value in found["token_logprobs"]]
    return "".join(text for text, _ in texts) + str(logprobs), first, usage


async def load(url: str, pid: int, bodies: list[dict[str, Any]], n_streams: int, seconds: float) -> Load:
    """Keeps n_streams requests running; a third of them hang up."""
    found, limits = Load(), httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        alone = [(await stream(client, body))[0] for body in bodies]
        say(f"{len(bodies)} answers alone; now {n_streams} streams for {seconds:g} s")
        end = time.monotonic() + seconds

        async def keep_asking(number: int) -> None:
            rng = random.Random(number)
            while time.monotonic() < end:
                i = rng.randrange(len(bodies))
                leave_after = rng.randint(0, 5) if rng.random() < 1 / 3 else None
                answer, first, n_tokens = await stream(client, bodies[i], leave_after)
                found.first_token.append(first)
                found.n_left += leave_after is not None
                if leave_after is None:
                    found.n_finished, found.n_tokens = found.n_finished + 1, found.n_tokens + n_tokens
                    if answer != alone[i]:
                        found.wrong.append(f"{bodies[i]}: {answer!r}, alone {alone[i]!r}")

        async def watch() -> None:
            while True:
                status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
                found.memory.append(int(status.split("VmRSS:")[1].split()[0]) << 10)
                await asyncio.sleep(1)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(keep_asking(i) for i in range(n_streams)))
        watching.cancel()
    return found


def throughput(url: str, path: str, backend: str, tokens: int, rounds: int) -> None:
    """16 requests at once against one call of `generate` with the same 16 prompts, in turn."""
    framework = load_backend(backend, decoding=True)
    checkpoint = find_checkpoint(path, backend)
    model = framework.load(checkpoint)
    generator = framework.Generator(model, load_tokenizer(checkpoint, model.config.vocab_size))
    prompts = [" ".join(WORDS[: 1 + i % len(WORDS)]) for i in range(16)]
    end = {"stop": [], "temperature": 1.0, "top_p": 1.0, "seed": 0}
    generator.tokenizer.end_ids = frozenset()  # so that every continuation has all tokens

    def batch() -> float:
        started = time.perf_counter()
        generator.generate(prompts, max_new_tokens=tokens, **end)
        return time.perf_counter() - started

    async def served(streamed: bool) -> float:
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            bodies = [{"model": "served", "prompt": prompt, "max_tokens": tokens, "seed": 0} for prompt in prompts]
            started = time.perf_counter()
            if streamed:
                n_tokens = [n for *_, n in await asyncio.gather(*(stream(client, body | STREAM) for body in bodies))]
            else:
                answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
                n_tokens = [answer.json()["usage"]["completion_tokens"] for answer in answers]
            return 16 * tokens * (time.perf_counter() - started) / sum(n_tokens)  # some end before all tokens

    ways: dict[str, Callable[[], float]] = {
        "generate": batch,
        "server": lambda: asyncio.run(served(False)),
        "server, streaming": lambda: asyncio.run(served(True)),
    }
    times = [[way() for way in ways.values()] for _ in range(rounds + 1)][1:]  # the first round compiles
    for name, column in zip(ways, zip(*times, strict=True), strict=True):
        ratio = statistics.median(row[0] / own for row, own in zip(times, column, strict=True))
        print(f"16 at once, {name}: {16 * tokens / statistics.median(column):,.0f} token/s, ratio {ratio:.2f}")


def main(
    path: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="[RUN]")]] = "runs/quickstart",
    backend: Literal["jax", "torch"] = "jax",
    streams: int = 64,
    seconds: float = 300,
    max_tokens: int = 128,
    max_batch: int = 16,
    rounds: int = 5,
) -> None:
    """Measures a server of this checkpoint, in a process of its own: the throughput of 16 requests at once next to that
    of `generate`, then many streams at once, a third of which hang up. Every finished answer is compared with that of
    the same request alone. The exit status is 1 if one differs.

    Args:
        path: a run, a run's framework folder, or one checkpoint.
        backend: the framework that runs the model.
        streams: requests at a time.
        seconds: duration of the load; 0: only the throughput.
        max_tokens: the longest continuation.
        max_batch: rows of the server's batch.
        rounds: timed rounds of the throughput; 0: only the load.
    """
    with serving(path, backend, max_batch) as (url, pid):
        if rounds:
            throughput(url, path, backend, max_tokens, rounds)
        if not seconds:
            return
        found = asyncio.run(load(url, pid, requests_of("served", max_tokens), streams, seconds))
    times = sorted(found.first_token)
    middle, late = times[len(times) // 2], times[len(times) * 95 // 100]
    settled = found.memory[len(found.memory) // 5 :]
    print(f"{found.n_finished} finished, {found.n_left} hung up, {len(found.wrong)} differ from the request alone")
    print(f"{found.n_tokens / seconds:,.0f} token/s; first token: median {middle:.2f} s, 95 % within {late:.2f} s")
    print(f"memory: {settled[0] / 1e6:,.0f} MB after a fifth of the time, {settled[-1] / 1e6:,.0f} MB at the end")
    for answer in found.wrong[:3]:
        say(answer)
    if found.wrong:
        sys.exit(1)


if __name__ == "__main__":
    run(lambda: parse(main), as_script=True)
