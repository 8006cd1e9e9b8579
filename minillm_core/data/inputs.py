"""The inputs of a preparation: files, folders, patterns and datasets, as a list of files whose format is known."""

import glob
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from minillm_core.data.hub import HUB, dataset_sources
from minillm_core.data.sources import Source, source_of
from minillm_core.errors import InputError
from minillm_core.files import user_path

logger = logging.getLogger(__name__)

ENDINGS = "files that end in .txt, .md, .jsonl (also with .gz, .xz or .zst), .parquet or .arrow"


def find_sources(inputs: Sequence[str | Path], *, subset: str | None = None, split: str | None = None) -> list[Source]:
    """The files of all inputs, in their order; those of one folder or pattern in the order of their paths.

    Args:
        inputs: files, folders (with their subfolders), patterns such as `books/*.txt`, and datasets of the Hugging Face
            Hub such as `hf://datasets/OWNER/NAME`.
        subset: the configuration of the datasets.
        split: the split of the datasets; by default `train`.

    Raises:
        InputError: an input does not exist, has no file that can be read, or gives a file that was given before.
    """
    sources: list[Source] = []
    is_hub = [str(given).startswith(HUB) for given in inputs]
    if (subset or split) and not any(is_hub):
        raise InputError("--subset and --split are only for datasets of the Hugging Face Hub", expected=f"{HUB}...")
    for given, is_dataset in zip(inputs, is_hub, strict=True):
        if is_dataset:
            sources += dataset_sources(str(given), subset, split)
            continue
        path = user_path(given)
        if path.is_dir():
            found = _in_folder(path)
        elif path.is_file():
            found = [source_of(path) or Source(path, "text")]
        elif path.exists():
            raise InputError("the input is neither a file nor a folder", where=path, hint="give a file or a folder")
        else:
            found = _matching(str(path))
        if not found:
            raise InputError("nothing to read in this input", expected=ENDINGS, where=path, hint="check the path")
        sources += found
    seen: dict[str, Path] = {}
    for source in sources:
        real = os.path.realpath(source.path)
        if real in seen:
            found_twice, hint = f"{seen[real]} and {source.path}", "give each file once"
            raise InputError("an input file is given twice", found=found_twice, where=real, hint=hint)
        seen[real] = source.path
    return sources


def _matching(pattern: str) -> list[Source]:
    if pattern.startswith(("https:/huggingface.co/datasets/", "http:/huggingface.co/datasets/")):
        hint = f"{HUB}datasets/{pattern.partition('datasets/')[2]}"
        raise InputError("a page of the Hugging Face Hub", where=pattern, hint=f"give the dataset as {hint}")
    if not re.search(r"[*?\[]", pattern):
        raise InputError(
            "the input does not exist", expected="a file, a folder or a pattern", where=pattern, hint="check the path"
        )
    paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
    sources = {path: source_of(path) for path in paths if path.is_file()}
    _say_left_out(pattern, [path for path in paths if sources.get(path) is None])
    return [source for source in sources.values() if source is not None]


def _say_left_out(place: object, paths: Sequence[Path]) -> None:
    if paths:
        example = min(paths)
        logger.warning(f"left out {len(paths)} path(s) of {place} that are not {ENDINGS}; for example {example}")


def walk_folder(folder: Path) -> Iterator[Path]:
    """Every entry in a folder and its subfolders that is not a folder, also behind symbolic links; each folder once."""

    def unreadable(error: OSError) -> None:
        raise error

    seen = set()
    for place, subfolders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()  # of two links to one folder, always the same one is taken
        yield from (Path(place) / name for name in sorted(names))


def _in_folder(folder: Path) -> list[Source]:
    """
    Raises:
        InputError: something with the name of an input is not a file, or a link leads nowhere.
    """
    found, others = [], []
    for path in walk_folder(folder):
        source = source_of(path)
        if source is None:
            others += [path] * (not path.name.startswith("."))
        elif path.is_file():
            found.append(source)
        else:
            raise not_a_file(path)
    _say_left_out(folder, others)
    return sorted(found, key=lambda source: source.path)


def not_a_file(path: Path) -> InputError:
    hint = "remove it from the folder, or replace it by a file"
    return InputError(
        "not a text file", expected="a file", found="a pipe, a device or a broken link", where=path, hint=hint
    )
