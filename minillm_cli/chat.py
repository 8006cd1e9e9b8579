"""A conversation with a model in the terminal, in the model's own chat format."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Annotated, Literal

import tyro

from minillm_cli.backends import load_backend
from minillm_cli.console import parse, say
from minillm_core.decoding.conversation import Conversation
from minillm_core.errors import InputError
from minillm_core.text.chat_template import ChatTemplate
from minillm_core.text.tokenizer_json import load_tokenizer
from minillm_core.training.checkpoints import find_checkpoint

COMMANDS = """\
/reset         begin a new conversation
/system TEXT   set the system message from now on; without TEXT: remove it
/help          show these commands
/exit          leave (also Ctrl-D)
Ctrl-C stops a reply; a second one, or one at the prompt, leaves.
To send a message that begins with a slash, put a space before it."""


def main() -> None:
    parse(chat)


def chat(
    path: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="[RUN]")]] = "runs/quickstart",
    backend: Literal["jax", "torch"] = "jax",
    system: str = "",
    max_new_tokens: int = 500,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16", "float64"] = "float32",
) -> None:
    """Reads messages, one per line, and streams the model's replies to stdout. Messages and replies go through the chat
    template of the model. The same messages, options and seed give the same replies in both frameworks.

    /help lists the commands inside a conversation. Everything except the replies goes to stderr, and messages may come
    from a file or a pipe.

    Args:
        path: a run, a run's framework folder, or one checkpoint.
        backend: the framework that runs the model.
        system: the system message, if the model's format has one.
        max_new_tokens: maximum number of tokens of a reply; never more than half of the context.
        temperature: 0 takes the most likely token; 1 leaves the distribution as it is.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens with at least this total probability.
        min_p: keep the tokens at least this many times as likely as the most likely one; 0 keeps all.
        repetition_penalty: above 1, tokens that already occur become less likely.
        seed: seed of the sampling.
        dtype: dtype of the parameters and the computation.
    """
    framework = load_backend(backend, decoding=True)
    checkpoint = find_checkpoint(path, backend)
    model = framework.load(checkpoint, dtype)
    generator = framework.Generator(model, load_tokenizer(checkpoint, model.config.vocab_size))
    conversation = Conversation(
        generator,
        ChatTemplate.of(generator.tokenizer),
        max_new_tokens=max_new_tokens,
        system=system,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        say(f"chatting with {checkpoint}; /help lists the commands")
    for line in _lines(on_terminal):
        try:
            if line.startswith("/"):
                if _is_exit(line, conversation):
                    return
            elif line.strip():
                _reply(conversation, line.strip())
        except InputError as error:
            if not on_terminal:
                raise
            say(f"error: {error}")


def _lines(on_terminal: bool) -> Iterator[str]:
    """The lines that the user types, without their ends."""
    if not on_terminal:
        yield from (line.removesuffix("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives `input` a history and keys for editing)
    while True:
        on_stdout = sys.stdout.isatty()  # otherwise `input` would write its prompt to the file that gets the replies
        if not on_stdout:
            sys.stderr.write("> ")
            sys.stderr.flush()
        try:
            yield input("> " if on_stdout else "")
        except EOFError:
            say()
            return


def _is_exit(line: str, conversation: Conversation) -> bool:
    """Obeys a command. Returns whether it was the one to leave."""
    name, _, text = line.partition(" ")
    if name == "/reset":
        conversation.reset()
        say("(a new conversation)")
    elif name == "/system":
        conversation.system = text.strip()
        say("(system message set)" if text.strip() else "(system message removed)")
    elif name == "/help":
        say(COMMANDS)
    elif name != "/exit":
        raise InputError("unknown command", found=name, hint="/help lists the commands; to send it, put a space before")
    return name == "/exit"


def _reply(conversation: Conversation, text: str) -> None:
    """Prints the reply to a message as it is generated."""
    with _CtrlC() as ctrl_c, contextlib.closing(conversation.ask(text)) as pieces:
        for piece in pieces:
            print(piece, end="", flush=True)
            if ctrl_c.came:
                break
    print(flush=True)
    if ctrl_c.came:
        say("(stopped)")


class _CtrlC:
    """A context that records Ctrl-C; a second one raises KeyboardInterrupt."""

    came = False

    def __enter__(self) -> "_CtrlC":
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True
