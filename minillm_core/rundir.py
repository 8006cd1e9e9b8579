"""The run directory: `runs/<name>/` with config.yaml, run.json, tokenizer.model, and a folder for each framework."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

from minillm_core import __version__
from minillm_core.config import ComputeDtype, RunConfig, config_differences, dump_config, load_config
from minillm_core.errors import InputError
from minillm_core.files import lock, make_folder, replace_file
from minillm_core.tokenizer import TOKENIZER_FILES

FORMAT_VERSION = 1


@contextmanager
def open_run(
    run: Path, config: RunConfig, tokenizer: Path, data_hashes: dict[str, str], dtype: str
) -> Iterator[RunConfig]:
    """Creates the run directory, or checks that it is this run's; no other process can open it meanwhile.

    Args:
        tokenizer: the folder of the tokenizer's files, which are copied into a new run.
        data_hashes: PreparedData.hashes().
        dtype: what a `compute_dtype` of `auto` means for a run that begins here.

    Yields:
        the configuration with `compute_dtype` resolved: an existing run keeps its own.

    Raises:
        InputError: it belongs to a run of another configuration (every differing field named), tokenizer or data, was
            written by a newer version, is in use, or is no run directory.
    """
    if run.exists() and not run.is_dir():
        raise InputError("not a directory", where=run, do="give another run directory (--train.out_dir)")
    saved = run / "config.yaml"
    if not saved.exists() and run.exists() and any(not path.name.startswith(".") for path in run.iterdir()):
        raise InputError("not empty and not a run directory", expected="config.yaml in it", where=run)
    make_folder(run)
    with lock(run / ".lock"):
        _check_record(run / "run.json", data_hashes)
        known = load_config(str(saved)) if saved.exists() else None
        if config.train.compute_dtype == "auto":
            if known is not None and known.train.compute_dtype != "auto":
                dtype = known.train.compute_dtype
            config = replace(config, train=replace(config.train, compute_dtype=cast(ComputeDtype, dtype)))
        if known is not None:
            require_same_config(config, known, run)
        record = {"format_version": FORMAT_VERSION, "version": __version__, "data_hashes": data_hashes}
        contents: dict[str, str | bytes] = {
            "config.yaml": dump_config(config),
            "run.json": json.dumps(record, indent=1) + "\n",
        }
        contents |= {name: (tokenizer / name).read_bytes() for name in TOKENIZER_FILES if (tokenizer / name).is_file()}
        for name, content in contents.items():
            if not (run / name).exists():
                replace_file(run / name, content)
        yield config


def _check_record(path: Path, data_hashes: dict[str, str]) -> None:
    if not path.exists():
        return
    try:
        record = json.loads(path.read_text())
        version, known = record["format_version"], dict(record["data_hashes"])
    except (ValueError, KeyError, TypeError) as error:
        do = "restore the file, or give another run directory (--train.out_dir)"
        raise InputError("damaged file of the run", found=repr(error), where=path, do=do) from error
    if version != FORMAT_VERSION:
        raise InputError(
            "the run directory was written by another version",
            expected=f"format {FORMAT_VERSION}",
            found=f"format {version}, written by version {record.get('version')}",
            where=path,
            do="install that version of the project",
        )
    require_same_data(known, data_hashes, path.parent)


def require_same_config(config: RunConfig, known: RunConfig, where: Path) -> None:
    """
    Raises:
        InputError: naming every field that differs and must not.
    """
    if differences := config_differences(config, known):
        raise InputError(
            "the run directory belongs to another configuration:\n  " + "\n  ".join(differences),
            where=where,
            do="use that run's configuration, or another run directory (--train.out_dir)",
        )


def require_same_data(known: dict[str, str], found: dict[str, str], where: Path) -> None:
    """
    Raises:
        InputError: naming what differs: the tokenizer, the training text, the held-out text; of an imported model its
            files and weights.
    """
    names = {"train": "another training text", "val": "another held-out text", "weights": "other weights"}
    differing = [key for key in known | found if known.get(key) != found.get(key)]
    if differing and ("weights" in known) != ("weights" in found):
        kinds = ["an imported model" if "weights" in hashes else "a model that is trained" for hashes in (known, found)]
        do = "give another run directory: an imported model is not trained on"
        raise InputError(f"the run is that of {kinds[0]}", expected=kinds[0], found=kinds[1], where=where, do=do)
    if differing:
        raise InputError(
            f"the run belongs to {' and '.join(names.get(key, f'another {key}') for key in differing)}",
            expected=", ".join(f"{key} {known.get(key)}" for key in differing),
            found=", ".join(f"{key} {found.get(key)}" for key in differing),
            where=where,
            do="give another run directory, or remove this one if an import in it was never finished"
            if "weights" in known
            else "use the data of that run (--data.dir), or another run directory (--train.out_dir)",
        )
