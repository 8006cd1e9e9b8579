"""Documents, tokenizers and folders that a preparation cannot use."""

import gzip
import json
import lzma
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard

from minillm_core.data import prepare
from minillm_core.data.assemble import Holdout
from minillm_core.data.merge import merge
from minillm_core.errors import InputError
from minillm_core.text.tokenizer import ModelProto, Tokenizer
from parity_tests.test_prepare import _interrupted, documents_of, files_of, plan_for, small, texts, write_inputs

__all__ = ["small", "texts"]  # fixtures


BAD = {
    "latin.txt": (b"caf\xe9", "not UTF-8", "line 1"),
    "zero.txt": (b"a\fb\n\0c", "a NUL byte", "line 1"),
    "empty.md": (b"", "empty", "line 1"),
    "empty.jsonl.gz": (gzip.compress(b""), "empty", "line 1"),
    "empty.txt.xz": (lzma.compress(b""), "empty", "line 1"),
    "last.jsonl.zst": (zstandard.compress(b'{"text": "a"}\n\n\n5'), "no field", "line 4"),
    "x.jsonl": (b'{"text": "a"}\n\n{"body": "a"}', "no field `text`", "line 3"),
    "y.jsonl": (b'{"text": "a"}\n{"text": "a', "not JSON", "line 2"),
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", BAD)
def test_documents_that_cannot_be_used(name: str, texts: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in", texts)
    content, problem, where = BAD[name]
    (tmp_path / "in" / name).write_bytes(content)
    plan = plan_for(inputs, tokenizer, holdout=Holdout(share=0.2))
    for _ in range(2):  # the block of the document is not taken for a good one by the second call
        with pytest.raises(InputError, match=f"(?s)cannot be used.*{problem}.*{name}, {where}.*--skip-bad"):
            prepare.prepare(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    prepare.prepare(replace(plan, skip_bad=True), tmp_path / "out")  # what the message says to do
    skipped = json.loads((tmp_path / "out" / "index.json").read_text())["skipped"]
    assert skipped["n_documents"] == 1
    assert skipped["listed"][0]["where"].endswith(f"{name}, {where}")
    found = [text for split in ("train", "val") for text in documents_of(tmp_path / "out", split, tokenizer)]
    assert set(texts) <= {*found}


@pytest.mark.usefixtures("small")
def test_a_corrected_command(
    texts: list[str], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was encoded is used again if it can be; otherwise the work begins again, without a complaint."""
    inputs = write_inputs(tmp_path / "in", texts)
    (tmp_path / "in" / "x.jsonl").write_text("{\n", encoding="utf-8")
    plan = plan_for(inputs, tokenizer, holdout=Holdout(share=0.2))
    with pytest.raises(InputError, match="cannot be used"):
        prepare.prepare(plan, tmp_path / "out")
    blocks = [*(tmp_path / ".out.partial").glob("blocks-*")]
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "assemble_data", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(replace(plan, skip_bad=True), tmp_path / "out")
    assert [*(tmp_path / ".out.partial").glob("blocks-*")] == blocks
    with pytest.raises(InputError, match="cannot be used"):
        prepare.prepare(plan, tmp_path / "out")
    (tmp_path / "in" / "x.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    prepare.prepare(plan_for(inputs, tokenizer, holdout=Holdout(share=0.2)), tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.usefixtures("small")
def test_a_source_that_changes_while_it_is_read(
    texts: list[str], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(write_inputs(tmp_path / "in", texts), tokenizer)

    encode_tasks = prepare.encode_tasks

    def change(*arguments: Any) -> Any:
        with (tmp_path / "in" / "a.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"text": "more"}\n')
        return encode_tasks(*arguments)

    monkeypatch.setattr(prepare, "encode_tasks", change)
    with pytest.raises(InputError, match=r"(?s)changed while it was read.*a\.jsonl"):
        prepare.prepare(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small")
def test_what_is_counted(texts: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A long bad document counts once, and so does a document whose end was never read; neither is a duplicate."""
    inputs = write_inputs(tmp_path / "in", texts)
    (tmp_path / "in" / "latin.txt").write_bytes(b"caf\xe9 " * 500)
    data = gzip.compress(random.Random(1).randbytes(3000).hex().encode())
    (tmp_path / "in" / "cut.txt.gz").write_bytes(data[:-500])
    plan = plan_for(inputs, tokenizer, holdout=Holdout(share=0.3), skip_bad=True, drop_duplicates=True)
    prepare.prepare(plan, tmp_path / "out")
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert index["duplicates"] == 0
    assert index["skipped"]["n_documents"] == 2
    assert [Path(entry["where"].split(",")[0]).name for entry in index["skipped"]["listed"]] == ["latin.txt"]
    assert [Path(entry["where"]).name for entry in index["skipped"]["sources"]] == ["cut.txt.gz"]
    assert index["train"]["n_documents"] + index["val"]["n_documents"] == len(texts)
    for i in range(3):
        prepare.prepare(replace(plan, part=(i, 3)), tmp_path / f"part{i}")
    merge([tmp_path / f"part{i}" for i in (1, 2, 0)], tmp_path / "merged")
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "out")


@pytest.mark.usefixtures("small")
def test_nothing_is_left(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("{\n" * 50)
    plan = plan_for([tmp_path / "in.jsonl"], tokenizer, skip_bad=True)
    with pytest.raises(InputError, match=r"(?s)no document is left.*50 document\(s\): .*50 unusable"):
        prepare.prepare(plan, tmp_path / "out")
    with pytest.raises(InputError, match="no input"):
        prepare.prepare(replace(plan, sources=()), tmp_path / "out")


@pytest.mark.usefixtures("small")
def test_a_folder_that_exists_is_not_touched(
    texts: list[str], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is unfinished work beside it."""
    plan = plan_for(write_inputs(tmp_path / "in", texts), tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "assemble_data", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(plan, tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="the destination exists"):
        prepare.prepare(plan, tmp_path / "out")
    (tmp_path / "out").rmdir()
    assert sorted(tmp_path.rglob("*")) == before
    prepare.prepare(plan, tmp_path / "out")


def test_tokenizers_that_cannot_be_used(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("text", encoding="utf-8")
    proto = ModelProto.FromString(tokenizer.content)
    proto.trainer_spec.eos_id = -1
    for piece in proto.pieces:
        piece.type = 1 if piece.piece == "</s>" else piece.type
    (tmp_path / "no end").mkdir()
    (tmp_path / "no end" / "tokenizer.model").write_bytes(proto.SerializeToString())
    plan = plan_for([tmp_path / "in.txt"], tokenizer)
    for wrong in (replace(plan, tokenizer=tmp_path / "no end"), replace(plan, vocab_size=100)):
        with pytest.raises(InputError, match="the tokenizer cannot be used"):
            prepare.prepare(wrong, tmp_path / "out")
