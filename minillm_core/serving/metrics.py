"""Metrics for Prometheus."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from minillm_core.decoding.scheduler import Scheduler

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, says: str, *labels: str) -> Counter:
            return Counter(f"minillm_{name}", says, labels, registry=self.registry)

        def histogram(name: str, says: str) -> Histogram:
            return Histogram(f"minillm_{name}", says, ["model"], buckets=SECONDS, registry=self.registry)

        self.responses = counter("responses_total", "Responses, by path and status.", "path", "status")
        self.prompt_tokens = counter("prompt_tokens_total", "Tokens of accepted prompts.", "model")
        self.generated_tokens = counter("generated_tokens_total", "Generated tokens.", "model")
        self.first_token = histogram("first_token_seconds", "Time from a request to its first token.")
        self.request = histogram("request_seconds", "Time from a request to the end of its answer.")
        self._running = Gauge("minillm_running", "Continuations in the batch.", ["model"], registry=self.registry)
        self._waiting = Gauge("minillm_waiting", "Requests that wait.", ["model"], registry=self.registry)

    def watch(self, model: str, scheduler: Scheduler) -> None:
        """Reports how busy a scheduler is."""
        self._running.labels(model).set_function(lambda: scheduler.n_running)
        self._waiting.labels(model).set_function(lambda: scheduler.n_waiting)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Timer:
    """Measures one request, from now on."""

    def __init__(self, metrics: Metrics, model: str, prompt_tokens: int):
        self._metrics, self._model, self._started, self._has_token = metrics, model, time.monotonic(), False
        metrics.prompt_tokens.labels(model).inc(prompt_tokens)

    def saw(self, n_tokens: int) -> None:
        """New tokens have come."""
        if not self._has_token:
            self._metrics.first_token.labels(self._model).observe(time.monotonic() - self._started)
        self._has_token = True
        self._metrics.generated_tokens.labels(self._model).inc(n_tokens)

    def finished(self) -> None:
        self._metrics.request.labels(self._model).observe(time.monotonic() - self._started)
