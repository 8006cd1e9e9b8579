"""A corpus is what is in it: found by any path, refused when it has changed, and read whole, whatever its lines."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minillm_core.config import DataConfig
from minillm_core.data import corpus as corpus_module
from minillm_core.data import run_data as prepare_module
from minillm_core.data.corpus import list_documents
from minillm_core.data.pieces import text_chunks
from minillm_core.data.prepared import PreparedData
from minillm_core.data.run_data import open_or_prepare, prepare_data
from minillm_core.data.sources import Source
from minillm_core.errors import InputError
from parity_tests.conftest import TINY

SPEECH = "The state of the Union is strong, and caf\u00e9s \u20ac 1 "


def text_of(documents: list[Source], split: str) -> str:
    return "".join(text for document in documents if document.split == split for text in text_chunks(document))


@pytest.fixture
def home(corpus: Path, data_config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """A copy of the small corpus and its prepared data, by absolute paths, in the working folder."""
    for name in ("corpus", "prepared"):
        (tmp_path / name).mkdir()
    for source, target in ((corpus, "corpus"), (Path(data_config.dir), "prepared")):
        for path in source.iterdir():
            if path.is_file():
                (tmp_path / target / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    return replace(data_config, corpus=str(tmp_path / "corpus"), dir=str(tmp_path / "prepared"))


@pytest.mark.parametrize("spelling", ["corpus", "./corpus/", "corpus/../corpus", "linked", "moved"])
def test_the_same_text_is_found_by_any_path(spelling: str, home: DataConfig) -> None:
    Path("linked").symlink_to("corpus")
    if spelling == "moved":
        Path("corpus").rename("moved")
    assert not prepare_data(replace(home, corpus=spelling), TINY.vocab_size)


def test_a_corpus_that_is_gone(home: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
    meta = json.loads(Path("prepared/index.json").read_text(encoding="utf-8"))
    assert not prepare_data(replace(home, corpus=meta["corpus"]), TINY.vocab_size)
    for path in Path("corpus").iterdir():
        path.unlink()
    Path("corpus").rmdir()
    Path("prepared/index.json").write_text(json.dumps(meta | {"corpus": home.corpus}), encoding="utf-8")
    assert not prepare_data(home, TINY.vocab_size)
    assert "is not there any more" in caplog.text
    with pytest.raises(InputError, match="the corpus does not exist"):
        prepare_data(replace(home, corpus="elsewhere"), TINY.vocab_size)


def as_version_0_1(folder: Path) -> None:
    """Rewrites prepared data in the format of that version, which has no hash of the text."""
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    meta = {name: index[name] for name in ("corpus", "holdout_every", "vocab_size", "dtype", "tokenizer_sha256")}
    for split in ("train", "val"):
        (shard,) = index[split]["shards"]
        (folder / shard["name"]).rename(folder / f"{split}.bin")
        meta[split] = {name: index[split][name] for name in ("n_tokens", "n_bytes")} | {"sha256": shard["sha256"]}
        (folder / f"{split}.documents").unlink()
    (folder / "meta.json").write_text(json.dumps({"format_version": 1} | meta), encoding="utf-8")
    (folder / "index.json").unlink()


@pytest.mark.parametrize("with_hash", [True, False])
@pytest.mark.parametrize("what", ["longer", "one letter", "one file less"])
def test_an_edited_corpus_is_refused(
    what: str, with_hash: bool, home: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also data of version 0.1, which has no hash of the text, if the number of bytes differs."""
    if not with_hash:
        as_version_0_1(Path("prepared"))
    assert not prepare_data(home, TINY.vocab_size)
    with monkeypatch.context() as patch:
        if with_hash:  # files that were not changed since are not read again
            patch.setattr(prepare_module, "digest_of_text", None)
        assert not prepare_data(home, TINY.vocab_size)
    path = sorted(Path("corpus").iterdir())[3]
    content = path.read_bytes()
    if what == "one file less":
        path.unlink()
    else:
        before = path.stat()
        path.write_bytes(content + b"x" if what == "longer" else content.replace(b"e", b"a", 1))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `cp -p` or `touch -r` do
    if what == "one letter" and not with_hash:
        assert not prepare_data(home, TINY.vocab_size), "nothing in such data tells the texts apart"
        return
    with pytest.raises(InputError, match="the corpus has changed since"):
        open_or_prepare(home, TINY.vocab_size)
    if what != "one file less":
        path.write_bytes(content)  # the same text at another time
        assert not prepare_data(home, TINY.vocab_size)


@pytest.mark.parametrize("separator", ["\n", "\r", " ", "\u3000"])
@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
def test_lines_of_any_length(chunk: int, separator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost, no character is cut, and about a tenth is held out, whatever separates the words."""
    monkeypatch.setattr(corpus_module, "CHUNK_BYTES", chunk)
    text = SPEECH.replace(" ", separator) * 60
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8", newline="")
    documents = list_documents(DataConfig(str(path), "unused"))
    assert text_of(documents, "train") + text_of(documents, "val") == text
    assert 0.05 < len(text_of(documents, "val")) / len(text) < 0.15


@pytest.mark.parametrize(
    ("text", "held_out"),
    [
        ("ten bytes\n" * 90 + "x" * 100, 100),
        ("ten bytes\n" * 89 + "x" * 110, 110),
        ("ten bytes\n" * 20 + "x" * 800, 100),
        ("one\ntwo\n" + "word " * 2000 + "\nend", 1000),
        ("word " * 2000 + "\n\n", 1000),
        ("word " * 920 + "\n" + "word " * 1080, 1000),
    ],
)
def test_where_a_file_is_cut(text: str, held_out: int, tmp_path: Path) -> None:
    """At a line end near the last tenth, else at a space, else inside a word."""
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    documents = list_documents(DataConfig(str(path), "unused"))
    assert text_of(documents, "train") + text_of(documents, "val") == text
    assert abs(len(text_of(documents, "val")) - held_out) < 6


def test_documents_of_one_line_are_learnt_from(tmp_path: Path) -> None:
    """SentencePiece leaves out lines of more than 1 MiB; here they are given to it in parts."""
    words = np.random.default_rng(0).integers(0, 26**3, 300_000)
    line = " ".join(chr(97 + w % 26) + chr(97 + w // 26 % 26) + chr(97 + w // 676) for w in words.tolist())
    assert len(line) > 1 << 20
    for n in range(3):
        (tmp_path / f"{n}.txt").write_text(line, encoding="utf-8")
    config = DataConfig(str(tmp_path), str(tmp_path / "data"), holdout_every=3)
    assert prepare_data(config, 300)
    assert PreparedData(config.dir, 300).index["train"]["n_bytes"] == 2 * len(line)


def refusing(folder: Path, scandir: Callable[..., Any]) -> Callable[..., Any]:
    """os.scandir for a user without the permission to read a folder. (Root may read everything.)"""

    def refuse(path: Any) -> Any:
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    return refuse


def test_every_file_is_read_or_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, more = tmp_path / "folder", tmp_path / "more"
    for path in (folder / "notes.txt", more):
        path.mkdir(parents=True)
    for path in (folder / "a.txt", folder / "B.TXT", folder / "notes.txt" / "c.txt", more / "d.txt", folder / "e.md"):
        path.write_text(f"{path.name}\n", encoding="utf-8")
    (folder / "linked").symlink_to(more)
    (more / "loop").symlink_to(folder)
    (folder / "f.txt").symlink_to(more / "d.txt")
    caplog.set_level(logging.WARNING, logger="minillm_core")
    documents = list_documents(DataConfig(str(folder), "unused", holdout_every=2))
    names = ["B.TXT", "a.txt", "f.txt", "notes.txt/c.txt"]
    assert [document.path.relative_to(folder).as_posix() for document in documents] == names
    assert f"left out 1 file(s) of the corpus that are not .txt, for example {folder / 'e.md'}" in caplog.text
    assert f"that are links to others, for example {folder / 'linked/d.txt'}" in caplog.text
    monkeypatch.setattr(os, "scandir", refusing(folder / "notes.txt", os.scandir))
    with pytest.raises(PermissionError):
        list_documents(DataConfig(str(folder), "unused", holdout_every=2))


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_cannot_be_read_is_named(make: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text\n", encoding="utf-8")
    make(tmp_path / "b.txt")
    with pytest.raises(InputError, match=r"(?s)not a text file.*b\.txt"):
        list_documents(DataConfig(str(tmp_path), "unused", holdout_every=2))


@pytest.mark.parametrize("vocab_size", [270, 50_000])
def test_advice_about_the_vocabulary_works(vocab_size: int, tmp_path: Path) -> None:
    """Too few pieces for the characters, or too many for the text: the number that the message gives is enough."""
    rng = np.random.default_rng(0)
    text = "\n".join("".join(map(chr, 0x4E00 + rng.integers(0, 90, 30))) for _ in range(300))
    (tmp_path / "zh.txt").write_text(text, encoding="utf-8")
    config = DataConfig(str(tmp_path / "zh.txt"), str(tmp_path / "data"))
    with pytest.raises(InputError, match=f"cannot train {vocab_size} pieces") as refused:
        prepare_data(config, vocab_size)
    advice = str(refused.value).splitlines()[-1]
    assert ("raise" if vocab_size == 270 else "lower") in advice
    assert prepare_data(config, int("".join(filter(str.isdigit, advice))))


def test_a_file_that_shrinks_does_not_hang(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("text " * 100, encoding="utf-8")
    documents = list_documents(DataConfig(str(path), "unused"))
    path.write_text("text", encoding="utf-8")
    with pytest.raises(InputError, match="changed while it was read"):
        corpus_module.digest_of_text(documents)
