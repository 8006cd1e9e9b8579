"""Progress: units of work count exactly, and the command line shows them as one bar, on terminals only."""

import fcntl
import gzip
import hashlib
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from minillm_core.config import DataConfig
from minillm_core.data.documents import Format
from minillm_core.data.inputs import find_sources
from minillm_core.data.inspect import inspect_data
from minillm_core.data.pieces import read_texts
from minillm_core.data.run_data import open_or_prepare
from minillm_core.decoding.prompts import continue_file
from minillm_core.decoding.scoring import score_split
from minillm_core.doctor.compare import compare
from minillm_core.interop import convert
from minillm_core.progress import Work, progress, steps
from minillm_core.text.tokenizer_json import load_tokenizer
from minillm_core.training.train import train
from parity_tests.conftest import BACKENDS, ROOT, TINY, heard, text_run

pytestmark = pytest.mark.extended

WORK = """
import logging, sys, time
from minillm_cli import console, progress_bar
from minillm_core.progress import progress

def main():
    logger = logging.getLogger("minillm_core.test")
    with progress("counting", 10_000, "sheep") as work, progress("inside", 10, "goat"):
        for n in range(20):
            work.advance(500)
            time.sleep(0.05)
            if n % 5 == 0:
                logger.info(f"message {n}")
        ENDING
    print("the result")

progress_bar.APPEARS_AFTER = progress_bar.LOOKS_EVERY = 0.02
RUN
"""
STARTED = "console.run(main)"


def on_terminal(*command: str, columns: int = 80, at: str = "", do: signal.Signals | None = None) -> tuple[int, str]:
    """The status and the output of a command on a terminal.

    Args:
        at: the output at which a signal is sent.
        do: the signal.
    """
    leader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    process = subprocess.Popen(
        [sys.executable, *command], stdin=terminal, stdout=terminal, stderr=terminal, env=environment
    )
    os.close(terminal)
    seen = b""
    while True:
        try:
            block = os.read(leader, 1 << 16)
        except OSError:  # the end of a terminal on Linux
            break
        if not block:
            break
        seen += block
        if do is not None and at.encode() in seen:
            process.send_signal(do)
            do = None
    os.close(leader)
    return process.wait(), seen.decode().replace("\r\n", "\n")


def lines_of(shown: str) -> list[str]:
    """What each line of a terminal shows in the end: a carriage return begins it again."""
    lines = []
    for line in shown.split("\n"):
        cells: list[str] = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        lines.append("".join(cells).rstrip())
    return lines


def work(ending: str = "pass", run: str = STARTED) -> tuple[str, str]:
    return "-c", WORK.replace("ENDING", ending).replace("RUN", run)


@pytest.mark.parametrize("columns", [0, 40, 80, 200])
def test_a_bar_on_a_terminal(columns: int) -> None:
    """It has the time left, ends at 100 %, and stays below the messages, each on a line of its own."""
    status, shown = on_terminal(*work(), columns=columns)
    assert status == 0
    *lines, last = lines_of(shown)
    assert last == ""
    assert [line for line in lines if "counting" not in line] == [
        *(f"message {n}" for n in (0, 5, 10, 15)),
        "the result",
    ]
    (bar,) = (line for line in lines if "counting" in line)
    assert re.match(r"counting 100%", bar), bar
    assert lines.index(bar) == len(lines) - 2
    assert max(map(len, lines)) <= (columns or 200)
    if columns >= 80:  # a narrow terminal cuts the end off
        assert re.search(r"\| 00:00 left, 10.0k/10.0k, .* sheep/s, 00:0\d passed", bar), bar
    assert "inside" not in shown


def test_nothing_in_a_pipe() -> None:
    command = [sys.executable, *work()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "the result\n"
    assert done.stderr == "".join(f"message {n}\n" for n in (0, 5, 10, 15))


def test_libraries_show_nothing() -> None:
    """Without the command line, not even on a terminal."""
    assert on_terminal(*work(run="main()")) == (0, "the result\n")


@pytest.mark.parametrize(
    ("ending", "sent", "status", "last"),
    [
        ("time.sleep(60)", signal.SIGINT, 130, r"interrupted"),
        ("raise console.InputError('wrong')", None, 2, r"error: wrong"),
    ],
)
def test_a_command_that_ends_early(ending: str, sent: signal.Signals | None, status: int, last: str) -> None:
    """The terminal goes on with a fresh line, and the bar does not claim to be complete."""
    found, shown = on_terminal(*work(f"work.done -= 5000; {ending}"), at="message 15", do=sent)
    assert found == status
    assert shown.endswith("\n")
    lines = lines_of(shown)
    assert re.fullmatch(last, lines[-2]), lines
    assert not [line for line in lines if re.search(r"counting.*\b100%", line)]
    (bar,) = (line for line in lines if line.startswith("counting"))
    assert "message" not in bar


def test_a_unit_that_a_generator_has_open_is_closed_too() -> None:
    """It is still referenced when Ctrl-C ends the command."""
    code = "for n in steps(range(9), 'stepping', 'stair'): time.sleep(0.2 if n < 3 else 60)"
    code = WORK.replace("import progress\n", "import progress, steps\n").replace(
        "    logger =", f"    {code}\n    logger ="
    )
    script = code.replace("ENDING", "pass").replace("RUN", STARTED)
    status, shown = on_terminal("-c", script, at="3/9", do=signal.SIGINT)
    assert status == 130
    assert [line[:8] for line in lines_of(shown)] == ["stepping", "interrup", ""]
    assert "100%" not in shown


def test_units_inside_units_and_in_threads_are_not_heard() -> None:
    def elsewhere() -> None:
        with progress("in a thread", 1, "step") as work:
            work.advance()

    with heard() as works:
        with progress("outside", 2, "step") as outside, progress("inside", 1, "step") as inside:
            inside.advance()
            outside.advance(2)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert [*steps("ab", "stepping", "letter")] == ["a", "b"]
        for _ in steps("abc", "breaking", "letter"):
            break
        with pytest.raises(ZeroDivisionError):
            [1 / (letter != "b") for letter in steps("abc", "failing in a loop", "letter")]
        with pytest.raises(ZeroDivisionError), progress("failing", 5, "step"):
            raise ZeroDivisionError
        with progress("after it", 3, "step") as after:
            after.skip(1)
            after.finish()
    found = [(work.doing, work.done, work.skipped, work.total) for work in works]
    assert found == [
        ("outside", 2, 0, 2),
        ("stepping", 2, 0, 2),
        ("breaking", 0, 0, 3),
        ("failing in a loop", 1, 0, 3),
        ("failing", 0, 0, 5),
        ("after it", 3, 3, 3),
    ]


def counted(works: list[Work]) -> list[str]:
    """What was done; each unit counts exactly its total, but for a search that ends when something is found."""
    for work in works:
        is_search = work.doing.startswith("trying ")
        assert is_search or work.total in (None, work.done), f"{work.doing}: {work.done} of {work.total}"
    return [work.doing for work in works if not work.doing.startswith("loading")]


def test_reading_counts_the_bytes_on_disk(tmp_path: Path) -> None:
    texts = [f"text {i} " * 50_000 for i in range(10)]
    (tmp_path / "a.txt").write_text("".join(texts))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("".join(texts).encode()))
    pyarrow.parquet.write_table(pa.table({"text": texts}), tmp_path / "c.parquet", row_group_size=3)
    sources = find_sources([tmp_path])
    with heard() as works:
        assert sum(map(len, read_texts(sources, Format()))) == 3 * len("".join(texts))
    assert counted(works) == ["reading the text"]
    assert works[0].total == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_preparing_for_a_run(corpus: Path, tmp_path: Path) -> None:
    config = DataConfig(corpus=str(corpus), dir=str(tmp_path / "data"), holdout_every=5)
    with heard() as works:
        open_or_prepare(config, TINY.vocab_size)
    done = counted(works)
    assert done[:3] == ["reading the text", "training 512 pieces (time unknown)", "hashing the corpus"]
    assert {"encoding", "writing the shards", "flushing to disk", "checking the data"} <= {*done}
    with heard() as works:
        inspect_data(config.dir)
    assert counted(works) == ["checking the data"]
    assert works[0].total == sum(path.stat().st_size for path in (tmp_path / "data").glob("*.[bd]*"))


@pytest.fixture(scope="module")
def run(data_config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, whose data has a mask between documents."""
    folder = tmp_path_factory.mktemp("run") / "run"
    config = text_run(replace(data_config, document_mask=True), folder, steps=5, eval_every=4, eval_batches=2)
    with heard() as works:
        train(config, BACKENDS["torch"])
    assert [(work.doing, work.total) for work in works if work.doing == "evaluating"] == [
        ("evaluating", 2),
        ("evaluating", (open_or_prepare(config.data, TINY.vocab_size).n_tokens("val") + 126) // 128),
    ]
    counted(works)
    return folder


def test_evaluating_and_generating(run: Path, data_config: DataConfig, tmp_path: Path) -> None:
    backend, checkpoint = BACKENDS["torch"], run / "torch/checkpoints/5"
    generator = backend.Generator(backend.load(checkpoint), load_tokenizer(checkpoint, TINY.vocab_size))
    for mask in (False, True):
        data = open_or_prepare(replace(data_config, document_mask=mask), TINY.vocab_size)
        with heard() as works:
            score_split(generator, data, "val", 32)
        assert counted(works) == ["evaluating"]
        assert works[0].total == data.n_targets("val")
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    options = {"max_new_tokens": 2, "temperature": 0.0, "n": 1, "logprobs": False}
    with heard() as works:
        continue_file(generator, tmp_path / "p.txt", tmp_path / "o.jsonl", 2, {}, options)
    assert (counted(works), works[0].total) == (["generating"], 3)


def test_converting(run: Path, tmp_path: Path) -> None:
    """In every direction, and what the doctor does with the results."""
    check, read, flush = "checking the checkpoint", "reading the tensors", "flushing to disk"
    write = ["writing the tensors", "hashing the new checkpoint", flush]
    imported = ["reading the weights", "hashing the tensors", *write]
    hf, gguf, copies = tmp_path / "hf", tmp_path / "x.gguf", tmp_path / "copies"
    expected = {
        ("torch->jax", run, copies): [check, read, *write],
        ("jax->torch", copies, tmp_path / "back"): [check, read, *write],
        ("jax->hf", copies, hf): [check, "writing the weights", flush],
        ("jax->gguf", copies, gguf): [check, "writing the weights", flush],
        ("hf->torch", hf, tmp_path / "from-hf"): imported,
        ("gguf->jax", gguf, tmp_path / "from-gguf"): imported,
    }
    for arguments, done in expected.items():
        with heard() as works:
            convert(*arguments)
        assert counted(works) == done, arguments
    for b, differs in ((copies / "jax", False), (tmp_path / "from-gguf", False), (run.parent / "other", True)):
        if differs:
            config = text_run(DataConfig(corpus="unused", dir=str(run.parent)), b)
            config = replace(config, train=replace(config.train, seed=9))
            state = BACKENDS["torch"].read_payload(run / "torch/checkpoints/5", config)
            name = "model.layers.0.self_attn.q_proj.weight"
            changed = replace(state, weights=state.weights | {name: state.weights[name] * 1.5})
            checkpoint = b / "torch/checkpoints/5"
            checkpoint.mkdir(parents=True)
            BACKENDS["torch"].write_payload(checkpoint, config, changed)
            for file in ("checkpoint.json", "tokenizer.model"):
                (checkpoint / file).write_bytes((run / "torch/checkpoints/5" / file).read_bytes())
            (checkpoint / "manifest.json").write_text('{"checkpoint.json": ' + manifest_of(checkpoint) + "}")
        with heard() as works:
            report = compare(run, b, n_tokens=64)
        assert report.equal != differs
        done = counted(works)
        assert {"running the model in torch", "comparing", "checking the code of A", "checking the code of B"} <= {
            *done
        }
        assert ("trying known faults: weights" in done) == differs


def manifest_of(checkpoint: Path) -> str:
    content = (checkpoint / "checkpoint.json").read_bytes()
    return f'{{"size": {len(content)}, "sha256": "{hashlib.sha256(content).hexdigest()}"}}'


def test_a_real_command(tmp_path: Path) -> None:
    """Preparing the default corpus: a bar for each part that takes more than a second."""
    status, shown = on_terminal("-m", "minillm_cli", "prepare", "quickstart", "--data.dir", str(tmp_path / "data"))
    assert status == 0
    assert re.search(r"encoding +\d+% \|.*\| 00:\d\d left, [\d.]+M/12.2M, [\d.]+ ?MB/s", shown)
    bars = [line for line in lines_of(shown) if re.search(r"\d%|passed", line)]
    assert any(line.startswith("encoding 100%") for line in bars)
