"""generate.py: a file of prompts, killed and resumed; a stream interrupted by Ctrl-C; bad requests."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from minillm_core.decoding.prompts import continue_file, read_prompts
from minillm_core.errors import InputError
from minillm_core.progress import Work
from minillm_core.text.tokenizer import Tokenizer
from parity_tests.commands import fails
from parity_tests.conftest import BACKENDS, ROOT, train_until
from parity_tests.test_generate import complete

OPTIONS = ["--max-new-tokens", "12", "--temperature", "0.9", "--seed", "4", "--stop", "the", "--stop-ids", "7"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data_config: object) -> Path:
    """A run of two steps in each framework."""
    from parity_tests.conftest import text_run

    out = tmp_path_factory.mktemp("prompts") / "run"
    for backend in BACKENDS.values():
        train_until(text_run(data_config, out), backend, 2)  # type: ignore[arg-type]
    return out


@pytest.fixture(scope="module")
def prompts(run: Path) -> Path:
    """120 prompts of all lengths."""
    words = ["We", "the", "People", "of", "the", "United", "States", "in", "Order", "to", "form", "a", "more", "\u20ac"]
    path = run.parent / "prompts.txt"
    path.write_text("".join(" ".join(words[i % 7 : i % 7 + 1 + i % 9]) + f" {i}\n" for i in range(120)), "utf-8")
    return path


def command(run: Path, framework: str, *arguments: object) -> list[str]:
    script = str(ROOT / "scripts" / "generate.py")
    return [sys.executable, script, str(run / framework), "--backend", framework, *map(str, arguments)]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.extended
def test_prompt_file(run: Path, prompts: Path, tmp_path: Path) -> None:
    """Results in the order of the prompts; the same in both frameworks, any batch size, after a kill, and in Python."""
    outputs = {}
    for framework in BACKENDS:
        output = tmp_path / f"{framework}.jsonl"
        batch_size = {"jax": 16, "torch": 7}[framework]
        full = command(
            run, framework, "--prompts", prompts, "--output", output, *OPTIONS, "--n", 2, "--logprobs",
            "--batch-size", batch_size,
        )  # fmt: skip
        partial = output.with_name(output.name + ".partial")
        process = subprocess.Popen(full, cwd=tmp_path, stderr=subprocess.DEVNULL)
        while not partial.exists() or partial.read_text().count("\n") < 10:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        process.kill()
        process.wait()
        kept = partial.read_text(encoding="utf-8")
        partial.write_text(kept[: kept.rindex("\n") + 1] + '{"index": 3, "prom', encoding="utf-8")  # half a line
        n_kept = kept.count("\n") - 1
        assert 0 < n_kept < 120
        if framework == "torch":
            refused = subprocess.run([*full, "--min-p", "0.1"], cwd=tmp_path, capture_output=True, text=True)
            assert refused.returncode == 2
            assert "different request" in refused.stderr
            assert "min_p: 0.0, now 0.1" in refused.stderr
        done = subprocess.run(full, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert f"resuming: {n_kept} of 120 prompts are done" in done.stderr
        assert done.stdout == ""
        assert {path.name for path in tmp_path.iterdir()} == {f"{name}.jsonl" for name in [*outputs, framework]}
        outputs[framework] = rows_of(output)
    again = subprocess.run(full, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    texts, _ = read_prompts(prompts)
    for framework, rows in outputs.items():
        assert [row["index"] for row in rows] == list(range(120))
        assert [row["prompt"] for row in rows] == texts
        checkpoint = run / framework / "checkpoints" / "2"
        generator = BACKENDS[framework].Generator(
            BACKENDS[framework].load(checkpoint), Tokenizer(checkpoint / "tokenizer.model")
        )
        options = {"max_new_tokens": 12, "temperature": 0.9, "seed": 4, "stop": ["the", 7], "n": 2}
        for i in (0, 57, 119):
            alone = complete(generator, [texts[i]], **options)
            assert [c.text for c in alone] == [c["text"] for c in rows[i]["completions"]]
            assert [c.tokens for c in alone] == [c["tokens"] for c in rows[i]["completions"]]
            for c, row in zip(alone, rows[i]["completions"], strict=True):
                assert c.logprobs == pytest.approx(row["logprobs"], abs=1e-4)


@pytest.mark.extended
@pytest.mark.parametrize("framework", BACKENDS)
def test_ctrl_c_ends_a_stream(framework: str, run: Path, tmp_path: Path) -> None:
    """The text decoded so far stays on stdout, in whole characters; no traceback; exit status 130."""
    full = command(run, framework, "--prompt", "We the", "--max-new-tokens", 300, "--temperature", 1, "--stop-ids", 1)
    whole = subprocess.run(full, cwd=tmp_path, capture_output=True, check=True).stdout.decode()
    with (tmp_path / "errors").open("wb") as file:  # a pipe would fill up: XLA logs much about its cache
        process = subprocess.Popen(full, cwd=tmp_path, stdout=subprocess.PIPE, stderr=file)
    assert process.stdout is not None
    first = os.read(process.stdout.fileno(), 6)
    assert first == b"We the"
    first += os.read(process.stdout.fileno(), 10)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    errors = (tmp_path / "errors").read_text()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert whole.startswith((first + rest).decode().rstrip("\n"))
    assert len(first + rest) < len(whole.encode())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "no prompts"),
        ("p.txt", b"one\n\nthree\n", r"(?s)not a prompt.*line 2"),
        ("p.txt", b"\xff\xfe", "cannot read the prompts"),
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', r"(?s)not a prompt.*line 2"),
        ("p.jsonl", b'{"prompt": 3}\n', r"(?s)not a prompt.*line 1"),
        ("p.jsonl", b"a text\n", r'(?s)not a prompt.*"prompt".*line 1'),
        ("P.JSONL", b'{"prompt": "\\ud800"}\n', r"(?s)not a prompt.*line 1"),
    ],
)
def test_bad_prompt_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / name)
    (tmp_path / "good.jsonl").write_text('\ufeff{"prompt": "a\\nb"}\r\n{"prompt": "c\u2028d"}', "utf-8")
    assert read_prompts(tmp_path / "good.jsonl")[0] == ["a\nb", "c\u2028d"]


def test_prompts_are_read_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a named pipe: nothing hangs, and the request is known by what was read."""
    pipe, output = tmp_path / "pipe.jsonl", tmp_path / "o.jsonl"
    os.mkfifo(pipe)
    content = b'{"prompt": "one"}\n{"prompt": "two"}\n'
    writer = threading.Thread(target=pipe.write_bytes, args=[content])
    writer.start()
    texts, digest = read_prompts(pipe)
    writer.join()
    assert (texts, digest) == (["one", "two"], hashlib.sha256(content).hexdigest())
    generator = BACKENDS["torch"].Generator(BACKENDS["torch"].load(run), Tokenizer(run / "tokenizer.model"))
    options = {"max_new_tokens": 3, "temperature": 0.0, "n": 1, "logprobs": False}
    for first in (True, False):
        (tmp_path / "P.JSONL").write_bytes(content if first else content.replace(b"two", b"2"))

        def stop(work: Work, n: int) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Work, "advance", stop)
        with pytest.raises(KeyboardInterrupt if first else InputError, match=None if first else "different prompts"):
            continue_file(generator, tmp_path / "P.JSONL", output, 1, {}, options)


def test_foreign_partial_output_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    for content in ("my own notes", "line\nline\n", '{"index": 3}\n'):
        (tmp_path / "o.jsonl.partial").write_text(content)
        arguments = (str(run / "torch"), "--backend", "torch", "--prompts", "p.txt", "--output", "o.jsonl")
        fails("cannot resume from this file", "generate", *arguments, cwd=tmp_path)
        assert (tmp_path / "o.jsonl.partial").read_text() == content


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "p.txt"], "need each other"),
        (["--output", "o.jsonl"], "add --prompts FILE"),
        (["--prompts", "-", "--output", "o.jsonl"], "--prompts /dev/stdin"),
        (["--n", "2"], "need a file"),
        (["--logprobs"], "need a file"),
        (["--compile"], "for torch"),
        (["--prompts", "none.txt", "--output", "o.jsonl"], "cannot read the prompts"),
        (["--prompts", "p.txt", "--output", "nowhere/o.jsonl"], "folder of the output does not exist"),
        (["--prompts", "p.txt", "--output", "."], "the output is a folder"),
        (["--prompts", "p.txt", "--output", ""], "not a path"),
        (["--prompts", "p.txt", "--output", "o.jsonl", "--batch-size", "0"], "batch_size"),
        (["--prompts", "p.txt", "--output", "o.jsonl", "--max-new-tokens", "320"], "longer than the context"),
        (["--prompt", ""], "empty prompt"),
        (["--stop", ""], "stop string is empty"),
        (["--top-p", "2"], "top_p"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    fails(message, "generate", str(run / "jax"), "--backend", "jax", *arguments, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]
