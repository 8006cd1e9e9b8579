"""Inputs with damage of every kind: each is prepared, or refused with a message."""

import gzip
import json
import lzma
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from minillm_core.data import chunks, documents, pieces, prepare
from minillm_core.data import plan as plan_module
from minillm_core.data.assemble import Holdout
from minillm_core.data.prepared import PreparedData
from minillm_core.errors import InputError
from minillm_core.text.tokenizer import Tokenizer
from parity_tests.test_prepare import plan_for

pytestmark = pytest.mark.extended

N = 500
ODD = [b"\0", b"\xff", b"\n", b"\r", b'"', b"{", b"}", b"\\", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\f", b"", b"[" * 3000]


def originals(texts: list[str], folder: Path) -> dict[str, bytes]:
    """One small file of each format and compression."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    plain = "\f".join(texts).encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "x.parquet", row_group_size=7)
    found = {"x.jsonl": lines, "x.txt": plain, "x.parquet": (folder / "x.parquet").read_bytes()}
    for ending, compress in {"gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.compress}.items():
        found |= {f"x.jsonl.{ending}": compress(lines), f"x.txt.{ending}": compress(plain)}
    return found


def mutated(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 3)):
        at, n = rng.randrange(len(data) + 1), rng.randint(0, 40)
        odd = rng.choice(ODD)
        cut = [
            data[:at],
            data[:at] + data[at + n :],
            data[:at] + odd + data[at:],
            data[:at] + odd + data[at + len(odd) :],
        ]
        data = rng.choice([*cut, data[:at] + rng.randbytes(n) + data[at + n :]])
    return data


def test_mutations(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (chunks, documents, pieces, plan_module):
        monkeypatch.setattr(module, "CHUNK_BYTES", 64)
    monkeypatch.setattr(plan_module, "TASK_BYTES", (1024, 1024))
    rng = random.Random(0)
    texts = ["".join(rng.choice("the of and \n.\u00e9") for _ in range(rng.randint(1, 300))) for _ in range(30)]
    files = originals(texts, tmp_path)
    outcomes: Counter[str] = Counter()
    for number in range(N):
        name = list(files)[number % len(files)]
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_bytes(mutated(files[name], rng))
        skip_bad = bool(number % 2)
        plan = plan_for([folder / name], tokenizer, holdout=Holdout(every=3), skip_bad=skip_bad)
        out = folder / "out"
        try:
            prepare.prepare(plan, out)
        except InputError as error:
            outcomes["refused"] += len(str(error)) < 2000
            assert not out.exists()
            continue
        data = PreparedData(out, tokenizer.vocab_size)
        data.verify()
        for split in ("train", "val"):
            stops = np.fromfile(out / f"{split}.documents", "<u8").reshape(-1, 3)[:, 0]
            assert stops[-1] == data.n_tokens(split)
            assert (data.tokens[split][:][stops.astype(int) - 1] == tokenizer.eos_id).all()
        outcomes["left out" if data.index["skipped"]["n_documents"] else "whole"] += 1
    assert sum(outcomes.values()) == N
    assert min(outcomes["refused"], outcomes["left out"], outcomes["whole"]) > 20, outcomes
