"""What the command line prints: messages of the libraries, and commands in the form in which it was started."""

import errno
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minillm_cli import console
from minillm_cli import train as train_command
from minillm_cli.main import main
from minillm_core.errors import InputError, missing_package
from minillm_core.files import output_file, owner
from minillm_core.text.tokenizer import Tokenizer
from minillm_jax import attention as jax_attention
from minillm_torch import attention as torch_attention
from parity_tests.conftest import TINY, run_config

HELP = ("convert", "torch->jax", "a run")


@pytest.fixture(autouse=True)
def _restored_logger() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("minillm_core", "minillm_jax", "minillm_torch")]
    before = [(logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (logger.level, logger.propagate) in zip(loggers, before, strict=True):
        logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, console._Console)]


def test_libraries_are_heard_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        console.show_progress()
    logger = logging.getLogger("minillm_core.training.loop")
    logger.info("step 3")
    logger.warning("skipping")
    for attention in (jax_attention, torch_attention):
        attention._say_plain.cache_clear()
        attention._say_plain("segments")
    captured = capsys.readouterr()
    why = "plain attention, which is slower and needs more memory: the fused kernel cannot compute segments\n"
    assert (captured.out, captured.err) == ("", f"step 3\nwarning: skipping\n{why}{why}")


def raises(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("as_script", "command", "shown"),
    [
        (False, HELP, "minillm convert 'torch->jax' 'a run'"),
        (True, HELP, "python scripts/convert.py 'torch->jax' 'a run'"),
        (True, ("train", "--backend", "torch", "--train.steps", "3"), "python scripts/train_torch.py --train.steps 3"),
        (False, ("train", "--backend", "torch"), "minillm train --backend torch"),
        (True, ("prepare",), "python scripts/prepare_data.py"),
    ],
)
def test_the_command_that_helps(
    as_script: bool, command: tuple[str, ...], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        console.run(raises(InputError("wrong", hint="convert it", command=command)), as_script=as_script)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: wrong\n  what to do: convert it\n  command: {shown}\n"


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError("a library's own")], ids=repr)
def test_a_fault_of_the_program_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        console.run(raises(error))
    assert sys.exc_info() == (None, None, None)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (
            OSError(errno.EACCES, "Permission denied", "x"),
            2,
            "error: Permission denied\n  where: x\n",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x"), 2, "error: the disk is full, or.*\n  where: x\n"),
        (BrokenPipeError(), 141, "^$"),  # as in `minillm generate | head`
    ],
    ids=repr,
)
def test_errors_of_the_system(error: Exception, status: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(console, "say", said.append)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(SystemExit) as ended:
        console.run(raises(error))
    assert ended.value.code == status
    assert re.search(message, "".join(said)), said


def test_a_missing_package_can_be_done_without() -> None:
    """The message says what to install, here and in a checkout, and how to do without it."""
    error = missing_package(ModuleNotFoundError(name="wandb"), "wandb", otherwise="or leave out --train.wandb")
    assert re.search(r"pip install wandb; .*-e '\.\[wandb\]'; or leave out --train\.wandb$", str(error)), error


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("-", "standard output"),
        ("new/", "is a folder"),
        ("nowhere/x.png", "folder of the output does not exist"),
        ("pipe", "a pipe or a device"),
        ("note.md", "a file of a different kind"),
        ("x.png", None),
    ],
)
def test_an_output_does_not_replace_what_is_there(
    name: str, problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("note.md").write_text("precious", encoding="utf-8")
    Path("x.png").write_bytes(b"\x89PNG...")
    if problem is None:
        assert output_file(name, b"\x89PNG") == Path(name)
        monkeypatch.setattr(os, "access", lambda *_: False)
        problem = "cannot be written"
    with pytest.raises(InputError, match=f"(?s){problem}"):
        output_file(name, b"\x89PNG")


def test_hidden_names_are_not_shown() -> None:
    for hidden in (".x.jsonl.lock", ".x.jsonl.partial", "..x.jsonl.partial.partial"):
        assert owner(Path("/a") / hidden) == Path("/a/x.jsonl")


def test_a_command_may_be_written_with_an_underscore(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As its script is: `minillm compare_runs`."""
    for name in ("compare-runs", "compare_runs"):
        monkeypatch.setattr(sys, "argv", ["minillm", name, "--help"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        assert "usage: minillm compare-runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train quickstart --train.steps 5 --train.steps=6", "--train.steps is given twice.*found:.*'5' and '6'"),
        ("generate --stop A --stop B", "--stop is given twice.*together, as in `--stop A B`"),
        ("generate --max-new-tokens 5 --max_new_tokens 6", "--max-new-tokens is given twice"),
        ("convert torch-to-jax --dtype float32 --dtype float16", "--dtype is given twice"),
        ("plan --json --json", "--json is given twice"),
    ],
)
def test_an_option_is_given_once(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["minillm", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)


def test_values_may_be_equal() -> None:
    def command(prompt: str, stop: tuple[str, ...] = (), seed: int = 0) -> tuple[str, tuple[str, ...], int]:
        return prompt, stop, seed

    arguments = ["--prompt=--seed is", "--stop", "A", "A", "--seed", "-1"]
    assert console.parse(command, arguments=arguments) == ("--seed is", ("A", "A"), -1)


@pytest.mark.parametrize("word", ["true", "false"])
def test_truth_values_are_written_as_in_yaml(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["minillm train", "quickstart", "--train.deterministic", word])
    command = console.parse_run_config("", train_command.TrainCommand)
    assert command.train.deterministic == (word == "true")


@pytest.mark.parametrize("context", [30, 320])
def test_the_sample_fits_the_context(context: int, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 120 tokens after the prompt, fewer if the context is short."""
    asked: list[int] = []

    class Generator:
        def __init__(self, model: Any, tokenizer: Tokenizer):
            self.tokenizer = tokenizer

        def stream(self, prompt: str, *, max_new_tokens: int, **sampling: float) -> Iterator[str]:
            asked.append(len(self.tokenizer.encode(prompt, bos=True)) + max_new_tokens)
            return iter(())

    monkeypatch.setattr(train_command, "load_tokenizer", lambda *_: tokenizer)
    config = run_config(replace(TINY, context_length=context), seq_len=16)
    backend: Any = SimpleNamespace(Generator=Generator, load=lambda checkpoint: SimpleNamespace(config=config.model))
    train_command.print_sample(Path("unused"), backend, train_command.SAMPLE_PROMPT)
    n_prompt = len(tokenizer.encode(train_command.SAMPLE_PROMPT, bos=True))
    assert n_prompt < 30
    assert asked == [min(context, n_prompt + 120)]
