"""A conversation with a model: its messages, what of them fits into the context, and the replies."""

import logging
from collections.abc import Generator
from typing import Any

from minillm_core.decoding.generation import BaseGenerator
from minillm_core.errors import InputError
from minillm_core.text.chat_template import ChatTemplate, Message

logger = logging.getLogger(__name__)


class Conversation:
    """Equal conversations with equal options have equal replies, in both frameworks."""

    def __init__(
        self, generator: BaseGenerator, template: ChatTemplate, *, max_new_tokens: int, system: str = "", **options: Any
    ):
        """
        Args:
            max_new_tokens: maximum number of tokens of a reply; it is never more than half of the context.
            system: the system message; empty: none.
            **options: of BaseGenerator.stream: temperature, top_k, top_p, min_p, repetition_penalty, seed.

        Raises:
            InputError: an option is out of range.
        """
        self.system = system
        self.messages: list[Message] = []
        """Without the system message."""
        self._generator, self._template = generator, template
        stop = sorted(template.stop_ids - generator.tokenizer.end_ids)
        self._max_new_tokens = min(max_new_tokens, generator.config.context_length // 2)
        self._options = {"max_new_tokens": self._max_new_tokens, "stop": stop, **options}
        self._has_dropped = False
        generator.check([[0]], **self._options)

    def reset(self) -> None:
        """Forgets all messages except the system message."""
        self.messages.clear()
        self._has_dropped = False

    def ask(self, text: str) -> Generator[str]:
        """Adds a user's message and streams the reply, in pieces of whole characters. The conversation keeps as much of
        the reply as was taken from this iterator; if nothing was taken before it was closed, it forgets the message.

        Raises:
            InputError: the message is malformed or does not fit into the context, or the template refuses the messages.
                The conversation is then as it was.
        """
        before = [*self.messages]
        self.messages.append({"role": "user", "content": text})
        reply, ended = "", False
        try:
            for piece in self._generator.stream(self._prompt(), **self._options):
                reply += piece
                yield piece
            ended = True
        finally:
            if reply or ended:
                self.messages.append({"role": "assistant", "content": reply})
            else:
                self.messages = before

    def _prompt(self) -> list[int]:
        """The token ids of the conversation. If they do not fit into the context, the oldest turns are dropped."""
        room = self._generator.config.context_length - self._max_new_tokens
        while True:
            ids = self._template.prompt(self.messages, self.system)
            if len(ids) <= room:
                return ids
            turns = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
            if len(turns) == 1:
                expected, found = f"at most {room} tokens", f"{len(ids)} tokens, with the system message"
                hint = f"shorten it; the context has {room + self._max_new_tokens} tokens, of which a reply may take "
                hint += str(self._max_new_tokens)
                raise InputError("the message does not fit into the context", expected=expected, found=found, hint=hint)
            del self.messages[: turns[1]]
            if not self._has_dropped:
                self._has_dropped = True
                logger.warning("the conversation no longer fits into the context: its oldest part is left out")
