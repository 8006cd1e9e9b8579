"""The bodies of the API's requests: OpenAI's fields, and those that vLLM adds to them.

A field that is not listed here is refused. So is a field that the server does not support, unless its value changes
nothing: an answer to a different question would be worse than none.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

MOST_CHOICES = 128
"""Continuations of one request, over all its prompts."""
MOST_ALTERNATIVES = 20
MOST_STOPS = 16
MOST_LOGPROBS = 1_000_000
"""Log-probabilities in one answer, alternatives included: about 40 MB."""

T = TypeVar("T")
Zero = Literal[0] | None
Many = Annotated[list[T], Field(fail_fast=True)]
"""A list that is read up to the first wrong item: a body has room for a million of them, and an error takes 2 KB."""
Token = Annotated[int, Field(ge=0)]
Stop = Annotated[str, Field(min_length=1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Body):
    include_usage: bool | None = None


class SamplingFields(_Body):
    """What both kinds of completions have in common. `null` is the same as a missing field."""

    model: str
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    """Continuations of every prompt; 1 by default."""
    temperature: Annotated[float, Field(ge=0)] | None = None
    """1 by default; 0 takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """Not in OpenAI's API. 0, -1 or missing: all tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Not in OpenAI's API."""
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    """Not in OpenAI's API."""
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    """The same request with the same seed has the same answer. Missing: a different seed every time."""
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=MOST_STOPS)] | None = None
    """Not in OpenAI's API: token ids that end a continuation."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """A name for the caller's own records; it changes nothing."""
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None


class CompletionRequest(SamplingFields):
    """The body of /v1/completions."""

    prompt: str | Many[str] | Many[Token] | Many[Many[Token]]
    """A text, token ids, or several of either. The token that begins a document is put before a text only."""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """16 by default. 0 only together with `echo`."""
    logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    """Report every token's log-probability, and this many of the most likely tokens."""
    echo: bool | None = None
    """Begin the answer with the prompt; with `logprobs`, those of the prompt's tokens too."""
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    role: str
    content: str | Many[TextPart]
    name: None = None
    refusal: None = None
    """This and what follows: a reply of OpenAI's client, as the next request's history, has them."""
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


class ResponseFormat(_Body):
    type: Literal["text"]


class ChatRequest(SamplingFields):
    """The body of /v1/chat/completions."""

    messages: Annotated[Many[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """By default as many as fit into the context."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """The older name of `max_completion_tokens`."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    tools: Annotated[list[str], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None


class PlaygroundRequest(_Body):
    """The body of /playground/generate."""

    prompt: str
    max_tokens: Annotated[int, Field(ge=1)]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    stop: Annotated[list[str], Field(max_length=MOST_STOPS)]
