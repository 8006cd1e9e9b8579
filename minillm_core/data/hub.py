"""Datasets of the Hugging Face Hub as sources: the package `datasets` loads them, in any format that it knows."""

import importlib
import re
import urllib.parse
from pathlib import Path

from minillm_core.data.sources import Source
from minillm_core.errors import InputError, missing_package

HUB = "hf://"
DATASET = re.compile(
    r"hf://datasets/(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(?P<files>.+))?"
)


def dataset_sources(url: str, subset: str | None = None, split: str | None = None) -> list[Source]:
    """Downloads one split of a dataset, unless it is in the cache of `datasets`, and returns its Arrow files.

    Args:
        url: `hf://datasets/OWNER/NAME`, also with `@REVISION`, and with a path or pattern of its files.
        subset: the configuration of the dataset, if it has several.
        split: by default `train`.

    Raises:
        InputError: there is no such dataset, subset or split, or it cannot be reached or read; `datasets` is missing.
    """
    split = split or "train"
    found = DATASET.fullmatch(url)
    if not found:
        raise InputError("not a dataset of the Hugging Face Hub", expected="hf://datasets/OWNER/NAME", where=url)
    if not re.fullmatch(r"[\w.-]+", split):
        raise InputError("--split takes the name of one split", expected="for example train", found=split)
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise missing_package(error, "data", where=url) from error
    revision = found["revision"] and urllib.parse.unquote(found["revision"])
    try:
        loaded = datasets.load_dataset(
            found["name"], subset, revision=revision, data_files=found["files"], split=split, keep_in_memory=False
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            "the dataset cannot be loaded",
            found=" ".join(str(error).split())[:300],
            where=url,
            hint="check the name, --subset, --split, and the connection to the Hugging Face Hub",
        ) from error
    if not loaded.cache_files:
        raise InputError("the dataset is empty", where=url)
    files = [Path(file["filename"]) for file in loaded.cache_files]
    commit = files[0].parent.name  # of a dataset of the Hub, the cache is named by it
    origin = f"hf://datasets/{found['name']}@{commit}, {loaded.info.config_name}, {split}"
    return [Source(path, "arrow", origin=origin) for path in files]
