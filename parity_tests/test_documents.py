"""Documents of every format, cut into pieces of any size."""

import gzip
import io
import json
import lzma
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minillm_core.data import chunks as chunks_module
from minillm_core.data import documents as documents_module
from minillm_core.data import pieces as pieces_module
from minillm_core.data import tables
from minillm_core.data.documents import Format, read_piece
from minillm_core.data.inputs import find_sources
from minillm_core.data.pieces import pieces_of
from minillm_core.data.sources import Source, source_of
from minillm_core.errors import InputError
from parity_tests.test_corpus import refusing

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.compress(data[: len(data) // 2]) + zstandard.compress(data[len(data) // 2 :]),
}

pytestmark = pytest.mark.extended


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 bytes, so that small documents have many."""
    for module in (chunks_module, documents_module, pieces_module):
        monkeypatch.setattr(module, "CHUNK_BYTES", 64)


def documents_of(source: Source, how: Format, size: int) -> tuple[list[str], list[str]]:
    """The documents of a source that is read in pieces, and the problems."""
    found, problems, parts = [], [], list[bytes]()
    for piece in pieces_of(0, source, how, size):
        for chunk in read_piece(piece, [source], how):
            assert chunk.begins == (not parts), "a document begins where the one before it ends"
            parts.append(chunk.data)
            if chunk.problem:
                problems.append(chunk.problem)
                parts = []
            elif chunk.ends:
                found.append(b"".join(parts).decode())
                parts = []
    assert not parts
    return found, problems


def write(folder: Path, name: str, data: bytes) -> Source:
    path = folder / name
    path.write_bytes(data)
    source = source_of(path)
    assert source is not None
    return source


TEXTS = st.lists(st.text("ab \n\u00e9\u65e5\U0001f600", min_size=1, max_size=300), min_size=1, max_size=8)
SIZES = st.sampled_from([64, 128, 192, 1024, 1 << 20])
EVERY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("compression", COMPRESS)
@EVERY
@given(texts=TEXTS, size=SIZES)
def test_lines_of_json(compression: str, texts: list[str], size: int, tmp_path: Path) -> None:
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=bool(i % 2)) for i, text in enumerate(texts)]
    lines.insert(1, "")  # an empty line is no document
    source = write(tmp_path, f"x.jsonl{compression}", COMPRESS[compression]("\n".join(lines).encode()))
    assert documents_of(source, Format(), size) == (texts, [])


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("separator", ["\f", "<|end|>", "\n\n", "aa"])
@EVERY
@given(texts=TEXTS, size=SIZES)
def test_texts_between_separators(
    compression: str, separator: str, texts: list[str], size: int, tmp_path: Path
) -> None:
    joined = separator.join(texts)
    source = write(tmp_path, f"x.txt{compression}", COMPRESS[compression](joined.encode()))
    expected = [text for text in joined.split(separator) if text]
    assert documents_of(source, Format(separator=separator.encode()), size) == (expected, [])


@pytest.mark.parametrize("compression", COMPRESS)
@EVERY
@given(text=st.text("ab \n\u00e9\u65e5\U0001f600", min_size=1, max_size=2000), size=SIZES)
def test_a_file_is_one_document(compression: str, text: str, size: int, tmp_path: Path) -> None:
    source = write(tmp_path, f"x.md{compression}", COMPRESS[compression](text.encode()))
    assert documents_of(source, Format(), size) == ([text], [])


def write_table(path: Path, columns: dict[str, Any], rows: int) -> Source:
    """A table with so many rows that are stored together."""
    table = pyarrow.table(columns)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=rows)
    else:
        new = pyarrow.ipc.new_stream if path.stem == "stream" else pyarrow.ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    source = source_of(path)
    assert source is not None
    return source


@pytest.mark.parametrize("name", ["x.parquet", "stream.arrow", "file.arrow"])
@EVERY
@given(texts=TEXTS, size=SIZES, rows=st.integers(1, 9), at_a_time=st.integers(1, 3))
def test_tables(name: str, texts: list[str], size: int, rows: int, at_a_time: int, tmp_path: Path) -> None:
    source = write_table(tmp_path / name, {"id": list(range(len(texts))), "body": texts}, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "ROWS", at_a_time)
        assert documents_of(source, Format(text_field="body"), size) == (texts, [])
    with pytest.raises(InputError, match=r"(?s)no column `text`.*id, body"):
        documents_of(source, Format(), size)


@pytest.mark.parametrize("name", ["x.parquet", "stream.arrow"])
def test_rows_that_are_stored_together(name: str, tmp_path: Path) -> None:
    """They are divided into pieces of the size that was asked for, but into few."""
    texts = [f"{i:06}" + "x" * 94 for i in range(5000)]
    source = write_table(tmp_path / name, {"text": texts}, 5000)
    for size, least, most in ((100_000, 900, 1000), (10_000, 312, 334), (1 << 20, 5000, 5000)):
        pieces = list(pieces_of(0, source, Format(), size))
        assert [pieces[0].start, pieces[-1].stop] == [0, 5000]
        assert {piece.stop - piece.start for piece in pieces} <= {*range(least, most + 1)}
        assert sum(piece.n_bytes for piece in pieces) == pytest.approx(source.n_bytes, abs=len(pieces))


def test_a_very_long_text_in_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks_module, "LONGEST_TEXT", 1000)
    source = write_table(tmp_path / "x.parquet", {"text": ["a", "b" * 3000, "c"]}, 3)
    assert documents_of(source, Format(), 64) == (["a", "c"], ["the text has more than 1,000 bytes"])


def test_a_document_longer_than_a_piece_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pieces inside a long document stop at their own end: they do not look for its end."""
    source = write(tmp_path, "x.txt", b"a\f" + b"b" * 100_000 + b"\fc")
    n_read = 0

    class Counting(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal n_read
            n_read += len(data := super().read(-1 if size is None else size))
            return data

    monkeypatch.setattr(Path, "open", lambda path, mode: Counting(path, mode))
    assert documents_of(source, Format(separator=b"\f"), 640) == (["a", "b" * 100_000, "c"], [])
    assert n_read < 250_000


@pytest.mark.parametrize("size", [64, 640])
def test_chunks_do_not_depend_on_the_pieces(size: int, tmp_path: Path) -> None:
    """The hash of a document is that of its chunks, so they must be the same however a file is read."""
    rng = random.Random(0)
    text = "".join(rng.choice("ab cd\n\u00e9") for _ in range(3000)) + "x" * 500 + "\n" + "y" * 100
    plain, packed = (write(tmp_path, f"x.txt{end}", COMPRESS[end](text.encode())) for end in ("", ".xz"))
    found = [  # without empty chunks, which only say that a document ends
        [c.data for piece in pieces_of(0, source, Format(), n) for c in read_piece(piece, [source], Format()) if c.data]
        for source, n in ((plain, size), (plain, 1 << 20), (packed, size))
    ]
    assert found[0] == found[1] == found[2]
    assert b"".join(found[0]).decode() == text
    assert all(len(chunk) <= 3 * 64 for chunk in found[0])


BAD_LINES = {
    "{": "not JSON",
    "[1]": "no field `text`, but list",
    '{"body": "x"}': "no field `text`, but body",
    '{"text": 5}': "of the type int",
    '{"text": null}': "of the type NoneType",
    '{"text": "\\ud800"}': "surrogate",
    "[" * 5000: "not JSON",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_lines(line: str, tmp_path: Path) -> None:
    source = write(tmp_path, "x.jsonl", f'{{"text": "a"}}\n{line}\n{{"text": "b"}}'.encode())
    found, problems = documents_of(source, Format(), 64)
    assert found == ["a", "b"]
    assert len(problems) == 1
    assert BAD_LINES[line] in problems[0]


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_very_long_line(compression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (documents_module, pieces_module):
        monkeypatch.setattr(module, "LONGEST_TEXT", 1000)
    lines = [json.dumps({"text": text}) for text in ("a", "b" * 3000, "c")]
    source = write(tmp_path, f"x.jsonl{compression}", COMPRESS[compression]("\n".join(lines).encode()))
    for size in (64, 1 << 20):
        found, problems = documents_of(source, Format(), size)
        assert found == ["a", "c"]
        assert problems


@pytest.mark.parametrize("name", ["x.txt.gz", "x.jsonl.gz", "x.jsonl.xz", "x.jsonl.zst", "x.txt.zst"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_damaged_compression(name: str, damage: str, tmp_path: Path) -> None:
    """The documents before the damage are read, then an error names the file."""
    rows = [json.dumps({"text": random.Random(i).randbytes(200).hex()}) for i in range(100)]
    data = COMPRESS[f".{name.rpartition('.')[2]}"]("\n".join(rows).encode())
    data = data[:-20] if damage == "cut" else data[: len(data) // 2] + bytes(100) + data[len(data) // 2 + 100 :]
    source = write(tmp_path, name, data)
    with pytest.raises(InputError, match=rf"(?s)damaged compressed file.*{name}"):
        documents_of(source, Format(separator=b"\n"), 64)


def test_damaged_parquet(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [random.Random(i).randbytes(200).hex() for i in range(100)]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=10, write_page_checksum=True)
    data = (tmp_path / "x.parquet").read_bytes()
    for damaged in (data[:-9], data[:100], b"", data[:200] + bytes(300) + data[500:]):
        source = write(tmp_path, "x.parquet", damaged)
        with pytest.raises(InputError, match=r"(?s)damaged parquet file.*x\.parquet"):
            documents_of(source, Format(), 64)


@pytest.mark.parametrize("name", ["stream.arrow", "file.arrow"])
def test_damaged_arrow(name: str, tmp_path: Path) -> None:
    texts = [f"row {i:05} " + "x" * 50 for i in range(300)]
    source = write_table(tmp_path / name, {"text": texts}, 100)
    data = source.path.read_bytes()
    offset = data.index(struct.pack("<3i", 60, 120, 180)) + 4 * 50 + 3
    flipped = data[:offset] + bytes([data[offset] ^ 0x40]) + data[offset + 1 :]
    for damaged in (flipped, data[:-9], data[: len(data) // 2], data[:100], b"x"):
        source.path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"(?s)damaged arrow file.*arrow"):
            documents_of(source, Format(), 64)
    if name == "stream.arrow":  # cut off between two batches
        write_table(tmp_path / "stream.arrow", {"text": texts[:200]}, 100)
        source.path.write_bytes(source.path.read_bytes()[:-8])
        with pytest.raises(InputError, match=r"(?s)damaged arrow file.*cut off"):
            documents_of(source, Format(), 64)


@pytest.mark.parametrize("name", ["x.parquet", "stream.arrow"])
def test_rows_without_text(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take next to no bytes in a file, but are not read all at once."""
    monkeypatch.setattr(tables, "RANGE_ROWS", 100)
    column = pyarrow.array([None] * 1000, pyarrow.string())
    source = write_table(tmp_path / name, {"text": column}, 1000)
    assert all(piece.stop - piece.start <= 101 for piece in pieces_of(0, source, Format(), 1 << 20))
    assert len(documents_of(source, Format(), 1 << 20)[1]) == 1000


def test_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b/x.txt", "b/sub/y.jsonl.gz", "b/z.JSONL", "a.parquet", "a.csv", "b/c.csv", "[x].txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("x", encoding="utf-8")

    def found(*inputs: str) -> list[Any]:
        return [(str(s.path), s.format, s.compression) for s in find_sources(inputs)]

    folder = [("b/sub/y.jsonl.gz", "jsonl", "gz"), ("b/x.txt", "text", ""), ("b/z.JSONL", "jsonl", "")]
    assert found("a.parquet", "b") == [("a.parquet", "parquet", ""), *folder]
    assert "left out 1 path(s) of b that are not files that end in .txt" in caplog.text
    assert "for example b/c.csv" in caplog.text
    assert found("b/*.txt", "a.csv") == [("b/x.txt", "text", ""), ("a.csv", "text", "")]
    assert found("b/**/*.gz") == folder[:1]
    assert found("b/*") == folder[1:]
    assert "left out 2 path(s) of b/*" in caplog.text
    assert found("[x].txt") == [("[x].txt", "text", "")]
    for inputs, message in (
        (("b", "b/x.txt"), "given twice"),
        (("nowhere",), "does not exist"),
        (("*.none",), "nothing to read"),
        (("",), "not a path"),
    ):
        with pytest.raises(InputError, match=message):
            find_sources(inputs)
    monkeypatch.setattr(os, "scandir", refusing(Path("b/sub"), os.scandir))
    with pytest.raises(PermissionError):
        find_sources(["b"])
