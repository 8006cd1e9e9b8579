"""The models that a server runs: loaded in the background, each with its own scheduler."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from minillm_core.decoding.requests import Request
from minillm_core.decoding.scheduler import (
    TOKENS_ONLY,
    Details,
    Event,
    Job,
    PromptScores,
    QueueFullError,
    Scheduler,
    Update,
)
from minillm_core.errors import InputError
from minillm_core.model.params import read_weights
from minillm_core.serving.errors import ApiError
from minillm_core.serving.metrics import Metrics, Timer
from minillm_core.serving.token_texts import TokenTexts
from minillm_core.text.chat_template import ChatTemplate
from minillm_core.text.tokenizer_json import load_tokenizer
from minillm_core.training.backend import load_backend
from minillm_core.training.checkpoints import read_info, verify_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What a server accepts; see Scheduler."""

    max_batch: int = 16
    max_queue: int = 256
    time_limit: float = 600


class ServedModel:
    """A checkpoint in one framework."""

    def __init__(self, id: str, framework: str, checkpoint: Path, dtype: str, limits: Limits, metrics: Metrics):
        """Loads it, and compiles its programs with a first request.

        Args:
            checkpoint: of either framework.

        Raises:
            InputError: a framework is not installed, or the checkpoint cannot be used.
        """
        backend = load_backend(framework)
        verify_checkpoint(checkpoint)
        info = read_info(checkpoint)
        opened = load_backend(info.framework).open_weights(checkpoint, info.config)
        model = backend.from_weights(info.config.model, read_weights(info.config.model, opened.items()), dtype)
        self.id, self.framework, self.device, self.metrics = id, framework, backend.describe_device(), metrics
        self.config, self.created = model.config, int(time.time())
        self.tokenizer = load_tokenizer(checkpoint, model.config.vocab_size)
        self.generator = backend.Generator(model, self.tokenizer)
        self.texts = TokenTexts(self.tokenizer)
        self.chat: ChatTemplate | None
        try:
            self.chat, self.why_no_chat = ChatTemplate.of(self.tokenizer), ""
        except InputError as error:
            self.chat, self.why_no_chat = None, str(error)
        self.scheduler = Scheduler(
            self.generator, max_batch=limits.max_batch, max_queue=limits.max_queue, time_limit=limits.time_limit
        )
        self.scheduler.submit(self.generator.request([[0]], 1), lambda event: None)
        while self.scheduler.step():
            pass
        self.scheduler.start()
        metrics.watch(id, self.scheduler)


class Models:
    """All models of a server, by their ids. They are being loaded at first."""

    def __init__(self, checkpoints: dict[str, tuple[str, Path]], dtype: str, limits: Limits):
        """
        Args:
            checkpoints: id -> framework and checkpoint.
        """
        self._checkpoints, self._dtype, self._limits = checkpoints, dtype, limits
        self.metrics = Metrics()
        self._models: dict[str, ServedModel] = {}
        self.state = "loading"
        """`loading`, `ready` or `failed`."""
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None

    @property
    def ids(self) -> list[str]:
        return list(self._checkpoints)

    def start(self) -> threading.Thread:
        """Loads the models in a thread, one after the other."""
        thread = threading.Thread(target=self._load, name="loading", daemon=True)
        thread.start()
        return thread

    def _load(self) -> None:
        try:
            for id, (framework, checkpoint) in self._checkpoints.items():
                self._models[id] = ServedModel(id, framework, checkpoint, self._dtype, self._limits, self.metrics)
                logger.info(f"{id} is ready: {framework}, {self._models[id].device}, {self._dtype}")
        except Exception as error:
            self.state, self.failure = "failed", error
            self.on_failure()
        else:
            self.state = "ready"

    def close(self) -> None:
        for model in self._models.values():
            model.scheduler.close()

    def all(self) -> list[ServedModel]:
        """Raises ApiError (503) while they are being loaded."""
        if self.state != "ready":
            message = "the model is still loading" if self.state == "loading" else f"loading failed: {self.failure}"
            raise ApiError(503, message, code=self.state, headers={"Retry-After": "1"})
        return list(self._models.values())

    def __getitem__(self, id: str) -> ServedModel:
        """Raises ApiError (404) for an unknown id, or as `all`."""
        models = {model.id: model for model in self.all()}
        if id not in models:
            expected = " or ".join(models)
            message = f"there is no model {id!r}; this server has {expected}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return models[id]


class Answers:
    """The events of several prompts that a model continues, as an asynchronous iterator. Cancel it when the client has
    left: its requests then stop."""

    def __init__(self, model: ServedModel, requests: Sequence[Request], details: Details = TOKENS_ONLY):
        """Queues all requests.

        Raises:
            QueueFullError: there is no room for all of them; then none is queued.
        """
        self._model, self._loop = model, asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._has_tokens = [request.max_new_tokens > 0 for request in requests]
        self._n_unfinished = sum(request.n if request.max_new_tokens else 1 for request in requests)
        self._jobs: list[Job] = []
        try:
            for i, request in enumerate(requests):
                self._jobs.append(model.scheduler.submit(request, partial(self._listen, i), details))
        except QueueFullError:
            self.cancel()
            raise
        self._timer = Timer(model.metrics, model.id, sum(len(request.rows[0].prompt) for request in requests))

    def _listen(self, prompt: int, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (prompt, event))
        except RuntimeError:  # the server has shut down
            logger.debug("an answer came after the end")

    def cancel(self) -> None:
        for job in self._jobs:
            self._model.scheduler.cancel(job)

    async def __aiter__(self) -> AsyncIterator[tuple[int, PromptScores | Update]]:
        """Prompt number and event, until every continuation is finished. Raises the exception that ends a request."""
        while self._n_unfinished:
            prompt, event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Update):
                self._n_unfinished -= event.finish_reason is not None
                self._timer.saw(len(event.tokens))
            else:
                self._n_unfinished -= not self._has_tokens[prompt]
            yield prompt, event
        self._timer.finished()
