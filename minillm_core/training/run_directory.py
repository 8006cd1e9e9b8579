"""The run directory: `runs/<name>/` with config.yaml, run.json, tokenizer.model, and a folder for each framework."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

from minillm_core.config import ComputeDtype, RunConfig, config_differences, dump_config, load_config
from minillm_core.errors import InputError
from minillm_core.files import lock, make_folder, replace_file
from minillm_core.text.tokenizer import TOKENIZER_FILES
from minillm_core.version import __version__

FORMAT_VERSION = 1
CONFIG = "config.yaml"


def resolve_compute_dtype(config: RunConfig, dtype: str) -> RunConfig:
    """The configuration with a `compute_dtype` of `auto` resolved: an existing run keeps its own.

    Args:
        dtype: what `auto` means for a run that begins here.
    """
    if config.train.compute_dtype != "auto":
        return config
    known = _saved_config(Path(config.train.out_dir))
    if known is not None and known.train.compute_dtype != "auto":
        dtype = known.train.compute_dtype
    return replace(config, train=replace(config.train, compute_dtype=cast(ComputeDtype, dtype)))


def refuse_imported(run: Path) -> None:
    """Raises InputError if the run holds an imported model, which has no data to be trained on."""
    if "weights" in (_known_hashes(run / "run.json") or {}):
        raise InputError(
            "the run holds an imported model, which cannot be trained further",
            where=run,
            hint="train in a different run directory (--train.out_dir)",
        )


@contextmanager
def open_run(run: Path, config: RunConfig, tokenizer: Path, data_hashes: dict[str, str]) -> Iterator[None]:
    """Creates the run directory, or checks that it is this run's; no other process can open it meanwhile.

    Args:
        config: with `compute_dtype` resolved.
        tokenizer: the folder of the tokenizer's files, which are copied into a new run.
        data_hashes: PreparedData.hashes().

    Raises:
        InputError: it belongs to a run of a different configuration (every differing field named), tokenizer or data,
            was written by a newer version, is in use, or is no run directory.
    """
    if run.exists() and not run.is_dir():
        raise InputError("not a directory", where=run, hint="give another run directory (--train.out_dir)")
    if not (run / CONFIG).exists() and run.exists() and any(not path.name.startswith(".") for path in run.iterdir()):
        raise InputError("not empty and not a run directory", expected=f"{CONFIG} in it", where=run)
    make_folder(run)
    with lock(run / ".lock"):
        recorded = _known_hashes(run / "run.json")
        if recorded is not None:
            require_same_data(recorded, data_hashes, run)
        known = _saved_config(run)
        if known is not None:
            require_same_config(config, known, run)
        record = {"format_version": FORMAT_VERSION, "version": __version__, "data_hashes": data_hashes}
        contents: dict[str, str | bytes] = {
            CONFIG: dump_config(config),
            "run.json": json.dumps(record, indent=1) + "\n",
        }
        contents |= {name: (tokenizer / name).read_bytes() for name in TOKENIZER_FILES if (tokenizer / name).is_file()}
        for name, content in contents.items():
            if not (run / name).exists():
                replace_file(run / name, content)
        yield


def _saved_config(run: Path) -> RunConfig | None:
    return load_config(str(run / CONFIG)) if (run / CONFIG).exists() else None


def _known_hashes(path: Path) -> dict[str, str] | None:
    """The data hashes that run.json records; None if there is no such file.

    Raises:
        InputError: the file is damaged, or was written by a newer version.
    """
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        version, known = record["format_version"], dict(record["data_hashes"])
    except (ValueError, KeyError, TypeError) as error:
        hint = "restore the file, or give another run directory (--train.out_dir)"
        raise InputError("damaged file of the run", found=repr(error), where=path, hint=hint) from error
    if version != FORMAT_VERSION:
        raise InputError(
            "the run directory was written by another version",
            expected=f"format {FORMAT_VERSION}",
            found=f"format {version}, written by version {record.get('version')}",
            where=path,
            hint="install that version of the project",
        )
    return known


def require_same_config(config: RunConfig, known: RunConfig, where: Path) -> None:
    """
    Raises:
        InputError: naming every field that differs and must not.
    """
    if differences := config_differences(config, known):
        raise InputError(
            "the run directory belongs to another configuration:\n  " + "\n  ".join(differences),
            where=where,
            hint="use that run's configuration, or another run directory (--train.out_dir)",
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
        hint = "give another run directory: an imported model is not trained on"
        raise InputError(f"the run is that of {kinds[0]}", expected=kinds[0], found=kinds[1], where=where, hint=hint)
    if differing:
        raise InputError(
            f"the run belongs to {' and '.join(names.get(key, f'another {key}') for key in differing)}",
            expected=", ".join(f"{key} {known.get(key)}" for key in differing),
            found=", ".join(f"{key} {found.get(key)}" for key in differing),
            where=where,
            hint="give another run directory, or remove this one if an import in it was never finished"
            if "weights" in known
            else "use the data of that run (--data.dir), or another run directory (--train.out_dir)",
        )
