"""What the command line prints: messages of the libraries, and commands in the form in which it was started."""

import logging
import sys
from collections.abc import Callable, Iterator

import pytest

from minillm_cli import console
from minillm_core.errors import InputError

HELP = ("convert", "torch->jax", "a run")


@pytest.fixture(autouse=True)
def _restored_logger() -> Iterator[None]:
    yield
    logger = logging.getLogger("minillm_core")
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, console._Console)]


def test_libraries_are_heard_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        console.show_progress()
    logger = logging.getLogger("minillm_core.training.loop")
    logger.info("step 3")
    logger.warning("skipping")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "step 3\nwarning: skipping\n")


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


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        console.run(raises(ZeroDivisionError()))
    assert sys.exc_info() == (None, None, None)
