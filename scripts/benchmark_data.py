"""Compares the speed of the preparation of data with SentencePiece alone, nanoGPT's way, and datatrove; times loading.

All read the same JSON lines, with a tokenizer of the same pieces. Each runs in its own process; they take turns, so
that changes in the machine's speed affect all of them. A measured time is all the work from the files to the token ids
on disk, without imports.

Needs `pip install -c constraints.txt -e '.[test]'`; and `pip install datatrove`, or it is left out.
"""

import importlib.util
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from minillm_cli.console import parse, run, say
from minillm_core.data.documents import Format, read_piece
from minillm_core.data.encode import LINES
from minillm_core.data.inputs import find_sources
from minillm_core.data.mixture import Mixture, Phase, shares_of
from minillm_core.data.pieces import pieces_of
from minillm_core.data.plan import Plan
from minillm_core.data.prepare import prepare
from minillm_core.data.prepared import SPLITS, PreparedData
from minillm_core.data.sources import Source
from minillm_core.data.training_data import TrainingData
from minillm_core.errors import InputError
from minillm_core.files import user_path
from minillm_core.text.tokenizer import TOKENIZER_JSON, TOKENIZER_MODEL
from minillm_core.text.tokenizer_json import collect_tokenizer, load_tokenizer, sentencepiece_to_json

LOADED = (64, 512)
WAYS = ("sentencepiece", "nanogpt", "datatrove", "minillm")
Way = Literal["sentencepiece", "nanogpt", "datatrove", "minillm"]


def documents_of(source: Source, how: Format) -> Iterator[str]:
    parts: list[bytes] = []
    for piece in pieces_of(0, source, how, 1 << 24):
        for chunk in read_piece(piece, [source], how):
            parts.append(chunk.data)
            if chunk.ends:
                yield b"".join(parts).decode()
                parts = []


def write_lines(inputs: tuple[str, ...], how: Format, folder: Path, n_files: int) -> int:
    """All documents as JSON lines, in files of about the same size. Returns the bytes of the text."""
    folder.mkdir()
    files = [(folder / f"{i}.jsonl").open("w", encoding="utf-8") for i in range(n_files)]
    sizes = [0] * n_files
    for source in find_sources(inputs):
        for text in documents_of(source, how):
            least = sizes.index(min(sizes))
            sizes[least] += len(text.encode())
            files[least].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    for file in files:
        file.close()
    return sum(sizes)


def with_sentencepiece(lines: list[Path], tokenizer: Path, out: Path, n_workers: int) -> tuple[float, int]:
    """SentencePiece alone: one process, one thread, line by line (much faster than whole documents); nothing is
    written."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(tokenizer / TOKENIZER_MODEL))
    begin, n_tokens = time.perf_counter(), 0
    for path in lines:
        with path.open(encoding="utf-8") as file:
            for line in file:
                parts = LINES.findall(json.loads(line)["text"])
                n_tokens += sum(map(len, model.encode(parts, num_threads=1)))
    return time.perf_counter() - begin, n_tokens


def with_nanogpt(lines: list[Path], tokenizer: Path, out: Path, n_workers: int) -> tuple[float, int]:
    """What data/openwebtext/prepare.py of nanoGPT does, with this tokenizer instead of GPT-2's."""
    from datasets import load_dataset
    from sentencepiece import SentencePieceProcessor

    begin = time.perf_counter()
    files = [str(path) for path in lines]
    dataset = load_dataset("json", data_files=files, split="train", cache_dir=str(out), num_proc=n_workers)
    model = SentencePieceProcessor(model_file=str(tokenizer / TOKENIZER_MODEL))

    def process(example: Any) -> Any:
        ids = model.encode(example["text"], num_threads=1)
        ids.append(model.eos_id())
        return {"ids": ids, "len": len(ids)}

    tokenized = dataset.map(process, remove_columns=["text"], num_proc=n_workers)
    n_tokens = int(np.sum(tokenized["len"], dtype=np.uint64))
    ids = np.memmap(out / "train.bin", dtype=np.uint16, mode="w+", shape=(n_tokens,))
    n_batches, start = min(1024, len(tokenized)), 0
    for index in range(n_batches):
        batch = tokenized.shard(num_shards=n_batches, index=index, contiguous=True).with_format("numpy")
        part = np.concatenate(batch["ids"])
        ids[start : start + len(part)] = part
        start += len(part)
    ids.flush()
    return time.perf_counter() - begin, n_tokens


def with_datatrove(lines: list[Path], tokenizer: Path, out: Path, n_workers: int) -> tuple[float, int]:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    begin = time.perf_counter()
    steps = [
        JsonlReader(str(lines[0].parent), glob_pattern="*.jsonl"),
        DocumentTokenizer(
            str(out / "tokens"), str(tokenizer / TOKENIZER_JSON), batch_size=100, shuffle_documents=False
        ),
    ]
    LocalPipelineExecutor(steps, tasks=n_workers, workers=n_workers, logging_dir=str(out / "logs")).run()
    seconds = time.perf_counter() - begin
    return seconds, sum(path.stat().st_size for path in (out / "tokens").glob("*.ds")) // 2


def with_minillm(lines: list[Path], tokenizer: Path, out: Path, n_workers: int) -> tuple[float, int]:
    begin = time.perf_counter()
    vocab_size = load_tokenizer(tokenizer, sys.maxsize).vocab_size
    prepare(Plan(tuple(find_sources(lines)), tokenizer, vocab_size), out / "data", n_workers=n_workers)
    data = PreparedData(out / "data", None)
    return time.perf_counter() - begin, sum(data.n_tokens(split) for split in SPLITS)


def loading_rates(lines: list[Path], tokenizer: Path, out: Path, n_workers: int) -> dict[str, float]:
    """Million tokens per second of batches of 64 x 512, read from prepared data; medians of 5, after one to warm up."""
    with_minillm(lines, tokenizer, out, n_workers)
    shutil.copytree(out / "data", out / "more")
    rates = {}
    for name, mask in (("one folder", False), ("mixture of two folders, document mask", True)):
        parts = {part: PreparedData(out / part, None, document_mask=mask) for part in ("data", "more")}
        data: TrainingData = Mixture(parts, [Phase(0, shares_of([0.7, 0.3]))]) if mask else parts["data"]
        found, n_steps = [], 300
        for repeat in range(6):
            begin = time.perf_counter()
            for step in range(repeat * n_steps, (repeat + 1) * n_steps):
                data.batch(step, *LOADED, seed=0)
            found.append(n_steps * math.prod(LOADED) / (time.perf_counter() - begin) / 1e6)
        rates[name] = statistics.median(found[1:])
    return rates


def serve(way: Way, lines: list[Path], tokenizer: Path, n_workers: int) -> None:
    """For every line on stdin, does the work once and prints its seconds and tokens."""
    work = {
        "sentencepiece": with_sentencepiece,
        "nanogpt": with_nanogpt,
        "datatrove": with_datatrove,
        "minillm": with_minillm,
    }[way]
    answers, sys.stdout = sys.stdout, sys.stderr  # the packages print
    for _ in sys.stdin:
        with tempfile.TemporaryDirectory() as out:
            print(*work(lines, tokenizer, Path(out), n_workers), file=answers, flush=True)


def main(
    inputs: tyro.conf.Positional[tuple[str, ...]],
    *,
    tokenizer: str,
    separator: str = "\f",
    workers: int = 2,
    rounds: int = 3,
    way: Way | None = None,
) -> None:
    """Compares the speed of the preparation of data with other ways.

    Args:
        inputs: files, folders or patterns, as for `prepare_data.py`.
        tokenizer: a tokenizer.model of SentencePiece, with at most 65,536 pieces.
        separator: what stands between two documents of a text file.
        workers: processes of every way except `sentencepiece`.
        rounds: how often each way is timed.
        way: only serve one way, controlled over stdin and stdout; by default, all run and are compared.
    """
    if way:
        return serve(way, sorted(map(Path, inputs)), user_path(tokenizer), workers)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "tokenizer").mkdir()
        collect_tokenizer(user_path(tokenizer), home / "tokenizer")
        if not (home / "tokenizer" / TOKENIZER_MODEL).is_file():
            raise InputError("not a SentencePiece tokenizer", expected=TOKENIZER_MODEL, where=tokenizer)
        content = (home / "tokenizer" / TOKENIZER_MODEL).read_bytes()
        (home / "json").mkdir()
        converted = json.dumps(sentencepiece_to_json(content, adds_bos=True))
        (home / "json" / TOKENIZER_JSON).write_text(converted, encoding="utf-8")
        n_bytes = write_lines(inputs, Format(separator=separator.encode()), home / "lines", workers)
        lines = sorted(map(str, (home / "lines").iterdir()))
        ways = [name for name in WAYS if name != "datatrove" or importlib.util.find_spec("datatrove")]
        times: dict[str, list[float]] = {name: [] for name in ways}
        tokens = dict.fromkeys(ways, 0)
        processes = {}
        for name in ways:
            own = str(home / ("json" if name == "datatrove" else "tokenizer"))
            options = ["--tokenizer", own, "--workers", str(workers), "--way", name]
            processes[name] = subprocess.Popen(
                [sys.executable, __file__, *lines, *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=(home / f"{name}.log").open("w"),
                encoding="utf-8",
            )
        for number in range(rounds):
            for name, process in processes.items():
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write("\n")
                process.stdin.flush()
                answer = process.stdout.readline().split()
                if len(answer) != 2:
                    said = (home / f"{name}.log").read_text(encoding="utf-8", errors="replace")
                    raise InputError(f"{name} failed", found=said[-2000:])
                seconds, n_tokens = answer
                times[name].append(float(seconds))
                tokens[name] = int(n_tokens)
                say(f"round {number + 1}, {name}: {float(seconds):.1f} s")
        for process in processes.values():
            process.communicate()
        loading = loading_rates([Path(line) for line in lines], home / "tokenizer", home / "loading", workers)
    print(f"{n_bytes:,} bytes of text, {workers} workers\n")
    print("| way | tokens | million token/s, median (range) | times minillm, median of rounds |\n|---|---|---|---|")
    for name in ways:
        rates = [tokens[name] / t / 1e6 for t in times[name]]
        ratio = statistics.median(ours / t for ours, t in zip(times["minillm"], times[name], strict=True))
        low, high, middle = min(rates), max(rates), statistics.median(rates)
        print(f"| {name} | {tokens[name]:,} | {middle:.2f} ({low:.2f} to {high:.2f}) | {ratio:.2f} |")
    print("\n| batches of 64 x 512 from | million token/s |\n|---|---|")
    for name, rate in loading.items():
        print(f"| {name} | {rate:.0f} |")
    return None


if __name__ == "__main__":
    run(lambda: parse(main), as_script=True)
