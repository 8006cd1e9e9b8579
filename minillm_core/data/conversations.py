"""Conversations as documents: lists of messages, each with a role and a text.

A conversation is one chunk, whatever its length: its messages as JSON, with nothing but `role` and `content`. So equal
conversations have equal bytes, however they are written in their files.
"""

import json
from typing import Any

from minillm_core.data.chunks import LONGEST_TEXT, Chunk, bad

ROLES = ("system", "user", "assistant")


def of_messages(source: int, offset: int, messages: Any) -> Chunk:
    """A document from a value that should be a list of messages."""
    if problem := _problem_of(messages):
        return bad(source, offset, problem)
    kept = [{"role": message["role"], "content": message["content"]} for message in messages]
    try:
        data = json.dumps(kept, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return bad(source, offset, "half of a surrogate pair, which is not text")
    if len(data) > LONGEST_TEXT:
        return bad(source, offset, f"the conversation has more than {LONGEST_TEXT:,} bytes")
    return Chunk(source, offset, data, begins=True, ends=True)


def _problem_of(messages: Any) -> str:
    """Why a value is not a conversation; empty if it is one."""
    if not isinstance(messages, list):
        return f"not a list of messages, but of the type {type(messages).__name__}"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            return f"message {number} is not an object, but of the type {type(message).__name__}"
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            return f"message {number} has the role {str(role)[:40]!r}, not one of {', '.join(ROLES)}"
        if not isinstance(content, str):
            return f"the content of message {number} is not text, but of the type {type(content).__name__}"
        if "\0" in content:
            return f"a NUL byte in message {number}"
    return "" if messages else "no messages"


def messages_of(data: bytes) -> list[dict[str, str]]:
    """The messages of a conversation's chunk."""
    found: list[dict[str, str]] = json.loads(data)
    return found
