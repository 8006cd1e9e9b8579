"""The chat format of a model: from messages to token ids. It is that of `transformers`, with one difference: the text
of a message never becomes a control token, so nobody can write `<|im_end|>` and go on in a different role."""

import itertools
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from minillm_core.errors import InputError
from minillm_core.text.control_tokens import Token, control_tokens, matching
from minillm_core.text.template_process import TemplateEndedError, render_template
from minillm_core.text.tokenizer import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    Tokenizer,
    read_tokenizer_config,
)
from minillm_core.text.tokenizer_json import JsonTokenizer, special_tokens

Message = Mapping[str, str]
"""`{"role": "user", "content": "Hello"}`; the roles that exist are up to the template."""

ROLE_TOKENS = ("<system>", "<user>", "<assistant>")
MINILLM_TEMPLATE = """\
{{ bos_token }}
{%- set starts = {'system': '<system>', 'user': '<user>', 'assistant': '<assistant>'} %}
{%- for message in messages %}
    {%- if message.role not in starts %}
        {{- raise_exception('unknown role ' ~ message.role ~ '; expected system, user or assistant') }}
    {%- endif %}
    {{- starts[message.role] ~ message.content }}
    {%- if message.role == 'assistant' %}{{ eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""
"""For tokenizers without a template that have ROLE_TOKENS, like that of the original Mini-LLM:
`<s><system>Be brief.<user>Hello<assistant>Hi!</s><user>...`."""

THOUGHTS = frozenset(("<think>", "</think>"))
"""Not broken up in the assistant's messages: templates look for them, and they are no way into a different role."""

ROLE = re.compile(r"[\w-]+")
"""So that no role can be a part of a control token's text."""

PRIVATE = range(0xF0000, 0x10FFFE)
"""Private-use characters, which no real text contains."""


def read_chat_template(folder: Path) -> str | None:
    """The chat template of a folder: its own file, or the only or default one in tokenizer_config.json; None if there
    is none.

    Raises:
        InputError: it cannot be read.
    """
    file = folder / CHAT_TEMPLATE
    try:
        if file.is_file():
            return file.read_text(encoding="utf-8")
        found = read_tokenizer_config(folder).get("chat_template")
        if isinstance(found, list):
            found = {item["name"]: item["template"] for item in found}.get("default")
    except (UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        hint = f"get {CHAT_TEMPLATE} or {TOKENIZER_CONFIG} again"
        raise InputError("damaged chat template", found=repr(error)[:200], where=folder, hint=hint) from error
    return found if isinstance(found, str) else None


class ChatTemplate:
    """The chat format of a model, with its tokenizer. Can be used from several threads.

    The template renders the messages to text, in a process of its own, because it is foreign code. Before that, a
    private-use character breaks up every control token in the messages. Then each control token in the rendered text
    is one that the template wrote.
    """

    def __init__(self, tokenizer: Tokenizer, template: str):
        """`template` is a Jinja2 template, as in chat_template.jinja."""
        self.tokenizer, self.template = tokenizer, template
        self._folder = tokenizer.path.parent
        self._control = control_tokens(tokenizer, template)
        self._pattern = matching(self._control.ids)
        self._structure = matching(self._control.ids.keys() - THOUGHTS)
        self._names = _named_tokens(tokenizer)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatTemplate":
        """The chat format in the tokenizer's folder, or that of this project if the tokenizer has ROLE_TOKENS.

        Raises:
            InputError: there is neither, or the file is damaged.
        """
        template = read_chat_template(tokenizer.path.parent)
        if template is None:
            if not cls(tokenizer, MINILLM_TEMPLATE)._control.ids.keys() >= {*ROLE_TOKENS}:
                expected = (
                    f"{CHAT_TEMPLATE}, a chat_template in {TOKENIZER_CONFIG}, or the tokens {' '.join(ROLE_TOKENS)}"
                )
                hint = (
                    f"use a model that was trained for chats; to train one, put a {CHAT_TEMPLATE} into this folder, or "
                    "begin with a tokenizer that has these tokens (train_tokenizer.py)"
                )
                where = tokenizer.path.parent
                raise InputError("the model has no chat template", expected=expected, where=where, hint=hint)
            template = MINILLM_TEMPLATE
        return cls(tokenizer, template)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The text of a conversation, as `apply_chat_template(tokenize=False)`.

        Args:
            add_generation_prompt: end with the beginning of the assistant's next message.

        Raises:
            InputError: a message is malformed, the template refuses the messages, or it fails.
        """
        return self._render(check_messages(messages), add_generation_prompt)

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
        """The token ids of a conversation, as `apply_chat_template(tokenize=True)`, except that control tokens in the
        messages stay text. Arguments and errors are those of `render`."""
        text, mark = self._safe_text(check_messages(messages), add_generation_prompt)
        return [i for i, _ in self._tokens(text, mark)]

    def prompt(self, asked: str | Sequence[Message], system: str = "") -> list[int]:
        """The token ids that the assistant replies to.

        Args:
            asked: a user's message, or a whole conversation.
            system: a system message for conversations without one; empty: none.

        Raises:
            InputError: as `render`.
        """
        messages = check_messages([{"role": "user", "content": asked}] if isinstance(asked, str) else asked)
        if system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        return self.encode(messages, add_generation_prompt=True)

    def encode_training(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """The token ids of a conversation, and for each whether the assistant writes it: its replies, each with the
        token that ends it. A reply begins where the generation prompt ends.

        Raises:
            InputError: as `render`; or the template does not show where a reply ends.
        """
        checked = check_messages(messages)
        text, mark = self._safe_text(checked, add_generation_prompt=False)
        tokens = self._tokens(text, mark)
        written, ends = [False] * len(tokens), [end for _, end in tokens]
        for start, end in self._replies(checked, text.replace(mark, "")):
            first, after = bisect_right(ends, start), bisect_right(ends, end)
            written[first:after] = [True] * (after - first)
        return [i for i, _ in tokens], written

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a reply: those that end a text, and the one that the template writes after a reply."""
        return self.tokenizer.end_ids | self._probe[1]

    @cached_property
    def _probe(self) -> tuple[str, frozenset[int]]:
        """What the template writes between the generation prompt and a reply (mostly nothing), and the id of the first
        control token after it."""
        reply, mark = "reply", chr(PRIVATE[0])
        question = {"role": "user", "content": "question"}
        try:
            before = self._render([question], add_generation_prompt=True)
            text = self._render([question, {"role": "assistant", "content": reply + mark}], add_generation_prompt=False)
        except TemplateEndedError:
            raise  # nothing is known about the template
        except InputError:
            return "", frozenset()
        head, _, tail = text.partition(mark)
        end = self._structure.search(tail)
        ids = frozenset([self._control.ids[end[0]]] if end else [])
        head = head.removesuffix(reply)
        return head.removeprefix(before) if head.startswith(before) else "", ids

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        variables: dict[str, Any] = {"messages": [dict(m) for m in messages], "tools": None, "documents": None}
        variables |= {"add_generation_prompt": add_generation_prompt, **self._names}
        return render_template(self.template, variables, self._folder)

    def _safe_text(self, messages: Sequence[Message], add_generation_prompt: bool) -> tuple[str, str]:
        """The rendered text, and the character that breaks up control tokens in it. Every control token that is left
        was written by the template.

        A template may join the text of a message with its own, or leave out what stands in the middle of it. If this
        makes a control token, it is seen in a second rendering, with the character between all others, which is then
        the result.
        """
        (mark,) = self._unused(messages, 1)
        text = self._render([self._broken(message, mark) for message in messages], add_generation_prompt)
        apart = self._render([_apart(message, mark) for message in messages], add_generation_prompt)
        if self._structure.findall(apart) != self._structure.findall(text):
            text = apart
        return text, mark

    def _broken(self, message: Message, mark: str) -> dict[str, str]:
        def broken(match: re.Match[str]) -> str:
            token = match[0]
            return token if token in kept else token[0] + mark + token[1:]

        kept = THOUGHTS if message["role"] == "assistant" else frozenset[str]()
        result = {}
        for name, text in message.items():
            before = None
            while text != before:  # breaking up one token may leave a second one that overlaps it
                before, text = text, self._pattern.sub(broken, text)
            result[name] = text
        return result

    def _tokens(self, text: str, mark: str) -> list[Token]:
        """Each part of a text on its own: a broken control token is encoded as text, and what stands between them with
        control tokens."""
        broken = "|".join(re.escape(t[0] + mark + t[1:]) for t in sorted(self._control.ids, key=len, reverse=True))
        tokens: list[Token] = []
        at = 0
        for i, part in enumerate(re.split(f"({broken or '(?!)'})|{mark}", text)):
            if part:  # None: a mark alone
                is_token = i % 2 == 1
                plain = part.replace(mark, "")
                encode = self._control.encode_as_text if is_token else partial(self._control.encode, follows=i > 0)
                tokens += [(token, at + end) for token, end in encode(plain)]
                at += len(plain)
        return tokens

    def _replies(self, messages: Sequence[Message], plain: str) -> list[tuple[int, int]]:
        """Begin and end of each reply, with its end token, in the rendered text without marks. A mark at the end of
        each reply tells where it is."""
        mark, *marks = self._unused(messages, 1 + len(messages))
        marked = [self._broken(message, mark) for message in messages]
        contents = {}
        for message, end_mark in zip(marked, marks, strict=True):
            core = message["content"].rstrip()
            if message["role"] == "assistant" and core:
                contents[end_mark] = core.replace(mark, "")
                message["content"] = core + end_mark + message["content"][len(core) :]
        text = self._render(marked, add_generation_prompt=False)
        clean = str.maketrans(dict.fromkeys([mark, *marks]))
        if text.translate(clean) != plain:
            hint = "train on text that is already in the model's format"
            raise InputError("the chat template does not show where a reply ends", where=self._folder, hint=hint)
        gap, _ = self._probe
        replies, at = [], 0
        for found in re.finditer("|".join(contents) or "(?!)", text):
            end = len(text[: found.start()].translate(clean))
            start = end - _n_common(plain[:end], contents[found[0]])
            for token in self._structure.finditer(text, at, found.start()):  # the template's; a reply begins after it
                start = max(start, len(text[: token.end()].translate(clean)))
            start -= len(gap) if plain[:start].endswith(gap) else 0
            following = self._structure.search(text, found.end())
            if following and self._control.ids[following[0]] in self.stop_ids:
                end = len(text[: following.end()].translate(clean))
            replies.append((start, end))
            at = found.end()
        return replies

    def _unused(self, messages: Sequence[Message], n: int) -> list[str]:
        """Private-use characters that neither the messages nor the template contain."""
        used = {*self.template}.union(*(text for message in messages for text in message.values()))
        return [*itertools.islice((chr(c) for c in PRIVATE if chr(c) not in used), n)]


def check_messages(messages: Any) -> list[Message]:
    """Raises InputError for anything but a list of messages, and says which one is wrong."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        expected, found = "a list of at least one message", repr(messages)[:60]
        raise InputError("not a conversation", expected=expected, found=found)
    for i, message in enumerate(messages):
        where = f"message {i + 1}"
        expected = '{"role": "user", "content": "text"}'
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise InputError("not a message", expected=expected, found=repr(message)[:60], where=where)
        for name, text in message.items():
            if not isinstance(name, str) or not isinstance(text, str):
                raise InputError(f"not text: {name}", expected=expected, found=repr(text)[:60], where=where)
            if name == "role" and not ROLE.fullmatch(text):
                expected = "a word, such as user"
                raise InputError("not a role", expected=expected, found=repr(text)[:60], where=where)
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"not Unicode text: {name}", found=error, where=where) from error
    return list(messages)


def _apart(message: Message, mark: str) -> dict[str, str]:
    """A message with a mark around each character of its text."""
    return {name: text if name == "role" else mark.join(["", *text, ""]) for name, text in message.items()}


def _n_common(text: str, content: str) -> int:
    """The number of characters at the end that are the same in both."""
    n = 0
    while n < min(len(text), len(content)) and text[-n - 1] == content[-n - 1]:
        n += 1
    return n


def _named_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The variables `bos_token`, `eos_token` ... of a template."""
    folder = tokenizer.path.parent
    named: dict[str, Any] = {} if isinstance(tokenizer, JsonTokenizer) else special_tokens(tokenizer.content)
    named |= read_tokenizer_config(folder, SPECIAL_TOKENS_MAP) | read_tokenizer_config(folder)
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if name.endswith("_token") and isinstance(text, str)}
