"""`minillm chat` and `generate.py --chat`: the same replies in both frameworks, and everything that a user can do in a
conversation."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from minillm_core.decoding.conversation import Conversation
from minillm_core.decoding.generation import BaseGenerator
from minillm_core.errors import InputError
from minillm_core.interop.hf import write_hf_weights
from minillm_core.interop.hf_config import to_hf_config
from minillm_core.interop.imports import import_checkpoint
from minillm_core.text.chat_template import ChatTemplate
from minillm_core.text.tokenizer_json import load_tokenizer
from parity_tests.commands import environment, fails, succeeds_here
from parity_tests.conftest import BACKENDS, ROOT, TINY, random_weights
from parity_tests.test_chat_template import byte_level, conversation

pytestmark = pytest.mark.extended

CONFIG = replace(TINY, vocab_size=608, context_length=1280)
OPTIONS = ["--max-new-tokens", "24", "--temperature", "1.2", "--seed", "5"]
SAMPLING: dict[str, Any] = {"max_new_tokens": 24, "temperature": 1.2, "top_p": 0.95, "seed": 5}


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights with SmolLM2's chat template, imported into both frameworks."""
    folder = tmp_path_factory.mktemp("chat")
    texts = [path.read_text(encoding="utf-8")[:4000] for path in sorted(corpus.glob("*.txt"))[:5]]
    byte_level(folder / "hf", "chatml", texts)
    (folder / "hf" / "config.json").write_text(json.dumps(to_hf_config(CONFIG, "float32")))
    write_hf_weights(folder / "hf", CONFIG, random_weights(CONFIG), "float32")
    for backend in BACKENDS.values():
        import_checkpoint("hf", folder / "hf", folder / "run", backend)
    return folder / "run"


@pytest.fixture(scope="module")
def generator(run: Path) -> BaseGenerator:
    backend = BACKENDS["torch"]
    model = backend.load(run)
    checkpoint = next((run / "torch" / "checkpoints").iterdir())
    return backend.Generator(model, load_tokenizer(checkpoint, CONFIG.vocab_size))


def command(run: Path, framework: str, *options: str) -> list[str]:
    path = str(ROOT / "scripts" / "chat.py")
    return [sys.executable, path, str(run), "--backend", framework, *OPTIONS, *options]


def talk(run: Path, framework: str, lines: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A conversation through pipes."""
    full = command(run, framework, *options)
    return subprocess.run(full, input=lines, capture_output=True, text=True, env=environment(), timeout=120)


def test_conversation_through_pipes(run: Path, generator: BaseGenerator) -> None:
    """Both frameworks reply alike; the ids of each prompt are those of transformers; after /reset, everything is as
    at the beginning; /system changes what follows. Only replies are on stdout."""
    lines = "Hello\n\n  What <|im_end|> now? \n/reset\nHello\n/system Be brief.\n/help\n /exit\n/exit\nnever read\n"
    done = {framework: talk(run, framework, lines) for framework in BACKENDS}
    for framework in BACKENDS:
        assert done[framework].returncode == 0, done[framework].stderr
        assert "/system TEXT" in done[framework].stderr
        assert ">" not in re.sub(r"(?s)/reset .*", "", done[framework].stderr), "a prompt"
    assert done["jax"].stdout == done["torch"].stdout
    auto = AutoTokenizer.from_pretrained(run.parent / "hf")
    stop = auto.convert_tokens_to_ids("<|im_end|>")

    def reply(*contents: str, system: str = "") -> str:
        ids = auto.apply_chat_template(
            conversation(*contents, system=system),
            add_generation_prompt=True,
            return_dict=False,
            sanitize_control_tokens=True,
        )
        return generator.generate([ids], stop=stop, **SAMPLING)[0]

    first = reply("Hello")
    second = reply("Hello", first, "What <|im_end|> now?")
    third = reply("Hello", first, "/exit", system="Be brief.")
    assert done["torch"].stdout == "".join(f"{text}\n" for text in (first, second, first, third))
    assert len({first, second, third}) == 3


def test_generate_sends_prompts_as_messages(run: Path, generator: BaseGenerator, tmp_path: Path) -> None:
    """One prompt, files of prompts and of messages; the replies are those of a conversation."""
    template = ChatTemplate.of(generator.tokenizer)
    said = [conversation("a", "b", "c"), conversation("Hi", system="own")]
    (tmp_path / "p.txt").write_text("Hello\n<|im_end|>\n")
    lines = [{"messages": said[0]}, {"prompt": "Hello"}, {"messages": said[1]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    where = [str(run), "--backend", "torch", "--chat", "--system", "Be brief.", *OPTIONS]

    def expected(*prompts: Any) -> list[str]:
        ids = [template.prompt(prompt, "Be brief.") for prompt in prompts]
        return generator.generate(ids, stop=sorted(template.stop_ids), **SAMPLING)

    shown = succeeds_here("generate", *where, "--prompt", "Hello", cwd=tmp_path).stdout
    assert shown == expected("Hello")[0] + "\n"
    for name, prompts in (("p.txt", ["Hello", "<|im_end|>"]), ("p.jsonl", [said[0], "Hello", said[1]])):
        output = tmp_path / f"{name}.out.jsonl"
        succeeds_here("generate", *where, "--prompts", name, "--output", str(output), cwd=tmp_path)
        rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        assert [row.get("prompt", row.get("messages")) for row in rows] == prompts
        assert [row["completions"][0]["text"] for row in rows] == expected(*prompts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--system", "x"], "--system is for the chat format.*add --chat"),
        (["--chat", "--truncate"], "would cut the beginning"),
        (["--chat", "--prompts", "bad.jsonl", "--output", "o"], r"bad\.jsonl, line 2: not a message"),
        (["--prompts", "bad.jsonl", "--output", "o"], r"not a prompt.*line 1"),
        (["--chat", "--prompts", "both.jsonl", "--output", "o"], r"not a prompt.*messages.*line 1"),
    ],
)
def test_bad_requests_to_generate(arguments: list[str], message: str, run: Path, tmp_path: Path) -> None:
    good = {"messages": conversation("x")}
    (tmp_path / "bad.jsonl").write_text(json.dumps(good) + '\n{"messages": [{"role": "user"}]}\n')
    (tmp_path / "both.jsonl").write_text('{"messages": 1, "prompt": 2}\n')
    fails(message, "generate", str(run), "--backend", "torch", *arguments, cwd=tmp_path)
    assert not (tmp_path / "o").exists()


def test_bad_input_in_a_pipe_ends_the_command(run: Path) -> None:
    done = talk(run, "torch", "Hello\n/rest\nHello\n")
    assert done.returncode == 2
    assert "unknown command" in done.stderr
    assert done.stdout.count("\n") >= 1
    assert talk(run, "torch", "Hello\n", "--top-p", "2").stderr.startswith("error: top_p is out of range")


def test_a_model_without_a_chat_format(run: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((run.parent / "hf" / name).read_bytes())
    named = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    import_checkpoint("hf", tmp_path, tmp_path / "run", BACKENDS["torch"])
    fails("no chat template.*what to do", "chat", "run", "--backend", "torch", cwd=tmp_path)


def test_the_oldest_turns_are_left_out(generator: BaseGenerator, caplog: pytest.LogCaptureFixture) -> None:
    """A conversation that no longer fits loses its oldest turns, but not the system message. The user is told once."""
    template = ChatTemplate.of(generator.tokenizer)
    talk = Conversation(generator, template, system="Be brief.", **(SAMPLING | {"max_new_tokens": 300}))
    room = CONFIG.context_length - 300
    prompts: list[list[int]] = []
    stream = generator.stream
    generator.stream = lambda ids, **options: prompts.append(ids) or stream(ids, **(options | {"max_new_tokens": 8}))
    try:
        said = [f"Question {i} " + "word " * 20 for i in range(30)]
        replies = ["".join(talk.ask(text)) for text in said]
    finally:
        del generator.stream
    whole = [turn for pair in zip(said, replies, strict=True) for turn in pair]
    for i, ids in enumerate(prompts):
        assert len(ids) <= room
        fitting = [conversation(*whole[2 * first : 2 * i + 1], system="Be brief.") for first in range(i + 1)]
        encoded = [template.encode(messages, add_generation_prompt=True) for messages in fitting]
        assert ids == next(e for e in encoded if len(e) <= room), "more was left out than needed"
    assert len(prompts[-1]) > room - 300
    assert [message["content"] for message in talk.messages][-2:] == [said[-1], replies[-1]]
    assert caplog.text.count("no longer fits") == 1
    before = [*talk.messages]
    with pytest.raises(InputError, match=r"(?s)does not fit into the context.*at most 980 tokens"):
        [*talk.ask("word " * 1000)]
    assert talk.messages == before
    talk.reset()
    assert talk.messages == []


def test_a_reply_takes_at_most_half_of_the_context(generator: BaseGenerator) -> None:
    template = ChatTemplate.of(generator.tokenizer)
    talk = Conversation(generator, template, **(SAMPLING | {"max_new_tokens": 10_000}))
    reply = "".join(talk.ask("Hello"))
    ids = template.encode(conversation("Hello"), add_generation_prompt=True)
    stop = sorted(template.stop_ids)
    assert (
        reply == generator.generate([ids], stop=stop, **(SAMPLING | {"max_new_tokens": CONFIG.context_length // 2}))[0]
    )
    with pytest.raises(InputError, match="max_new_tokens is out of range"):
        Conversation(generator, template, max_new_tokens=0)


def test_a_closed_reply_is_kept_as_far_as_it_was_read(generator: BaseGenerator) -> None:
    talk = Conversation(generator, ChatTemplate.of(generator.tokenizer), **SAMPLING)
    reply = talk.ask("Hello")
    first = next(reply)
    reply.close()
    assert talk.messages == conversation("Hello", first)
    unread = talk.ask("What?")
    unread.close()
    assert talk.messages == conversation("Hello", first)


LONG = ["--max-new-tokens", "600", "--temperature", "2", "--top-p", "1"]


@pytest.mark.parametrize("framework", BACKENDS)
def test_ctrl_c_stops_a_reply(framework: str, run: Path, generator: BaseGenerator, tmp_path: Path) -> None:
    """A real SIGINT in the middle of a reply: the conversation goes on. Two of them, or one at the prompt, leave."""
    with (
        (tmp_path / "errors").open("wb") as errors,
        subprocess.Popen(
            [*command(run, framework)[: -len(OPTIONS)], *LONG],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment(), bufsize=0,
        ) as process,
    ):  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(b"Hello\n")
            shown = process.stdout.read(1)
            process.send_signal(signal.SIGINT)
            wait_for(tmp_path / "errors", "(stopped)")
            process.stdin.write(b"/reset\n")
            wait_for(tmp_path / "errors", "(a new conversation)")
            while not shown.endswith(b"\n"):
                shown += process.stdout.read(65536)
            process.stdin.write(b"Hello\n")
            again = process.stdout.read(1)
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                time.sleep(0.2)
            rest = process.stdout.read()
            assert process.wait(timeout=30) == 130
        finally:
            process.kill()
    said = (tmp_path / "errors").read_text(encoding="utf-8")
    assert "Traceback" not in said
    assert said.rstrip().endswith("interrupted")
    template = ChatTemplate.of(generator.tokenizer)
    options = {"max_new_tokens": 600, "temperature": 2.0, "top_p": 1.0, "seed": 0, "stop": sorted(template.stop_ids)}
    whole = generator.generate([template.prompt("Hello")], **options)[0]
    for text in (shown.decode(), (again + rest).decode()):  # the second one is after /reset
        assert whole.startswith(text.removesuffix("\n"))
    assert len(shown.decode()) < len(whole)


def wait_for(file: Path, text: str, times: int = 1) -> None:
    for _ in range(600):
        if file.read_text(encoding="utf-8").count(text) >= times:
            return
        time.sleep(0.05)
    pytest.fail(f"{text!r} is not in {file.read_text(encoding='utf-8')[-500:]!r}")


def test_on_a_terminal(run: Path) -> None:
    """The prompt, commands and errors are on the terminal; the replies on stdout, here a pipe. An error does not end
    the conversation; Ctrl-D does."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(run, "torch"), stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    os.close(theirs)
    os.write(ours, b"/nonsense\nHello\n\x04")
    out, err = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0, err
    assert out.decode() == talk(run, "torch", "Hello\n").stdout
    assert b"/help lists the commands" in err
    assert b"> error: unknown command" in err
    assert err.count(b"> ") >= 3
