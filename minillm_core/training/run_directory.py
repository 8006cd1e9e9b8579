"""The run directory: `runs/<name>/` with config.yaml, run.json, tokenizer.model, and a folder for each framework."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from minillm_core.config import RUN_RECORD, ComputeDtype, RunConfig, config_differences, dump_config, read_config
from minillm_core.errors import InputError
from minillm_core.files import lock, make_folder, real_path, replace_file
from minillm_core.text.tokenizer import TOKENIZER_FILES
from minillm_core.version import __version__

FORMAT_VERSION = 1
CONFIG = "config.yaml"


@dataclass(frozen=True)
class RunDirectory:
    """A run: where it lives, and its configuration."""

    path: Path
    config: RunConfig

    @contextmanager
    def opened(self, tokenizer: Path, data_hashes: dict[str, str]) -> Iterator[None]:
        """Creates the directory, or checks that it belongs to this run. Only one process at a time can open it.

        Args:
            tokenizer: the folder of the tokenizer's files, which are copied into a new run.
            data_hashes: PreparedData.hashes().

        Raises:
            InputError: it belongs to a run with a different tokenizer, data or configuration (every differing field is
                named), was written by a different version, is in use, or is not a run directory.
        """
        run = self.path
        _require_run_or_nothing(run)
        make_folder(run)
        with lock(run / ".lock"):
            recorded, known = known_hashes(run / RUN_RECORD), saved_config(run)
            if recorded is not None:
                require_same_data(recorded, data_hashes, run)
            if known is not None:
                require_same_config(self.config, known, run)
            record = {"format_version": FORMAT_VERSION, "version": __version__, "data_hashes": data_hashes}
            files: dict[str, str | bytes] = {
                CONFIG: dump_config(self.config),
                RUN_RECORD: json.dumps(record, indent=1) + "\n",
            }
            files |= {name: (tokenizer / name).read_bytes() for name in TOKENIZER_FILES if (tokenizer / name).is_file()}
            for name, content in files.items():
                if not (run / name).exists():
                    replace_file(run / name, content)
            yield


def find_run(config: RunConfig, auto_dtype: str) -> RunDirectory:
    """The run that a configuration trains, in `train.out_dir`; nothing is written yet.

    Args:
        auto_dtype: what `compute_dtype: auto` means for a new run on this device; an existing run keeps its own.

    Raises:
        InputError: the directory belongs to a run with a different configuration (every differing field is named), was
            written by a different version, is not a run directory, or holds an imported model, which has no training
            data.
    """
    path = Path(config.train.out_dir)
    _require_run_or_nothing(path)
    if "weights" in (known_hashes(path / RUN_RECORD) or {}):
        hint = f"train a new run (--train.out_dir) that starts from it: --train.init_from {path}"
        raise InputError("the run holds an imported model", where=path, hint=hint)
    known = saved_config(path)
    config = resolve_compute_dtype(config, known, auto_dtype)
    if known is not None:
        require_same_config(config, known, path)
    return RunDirectory(path, config)


def run_name(run: str | Path) -> str:
    """The name of a run: that of its folder, however its path is spelt."""
    return real_path(Path(run)).name or "model"


def resolve_compute_dtype(config: RunConfig, known: RunConfig | None, auto_dtype: str) -> RunConfig:
    """The configuration with `compute_dtype: auto` replaced by the dtype of the known run, or else by `auto_dtype`."""
    if config.train.compute_dtype != "auto":
        return config
    dtype = cast(ComputeDtype, auto_dtype) if known is None else known.train.compute_dtype
    return replace(config, train=replace(config.train, compute_dtype=dtype))


def _require_run_or_nothing(path: Path) -> None:
    """Raises InputError if something that is not a run is there already."""
    if path.exists() and not path.is_dir():
        raise InputError("not a directory", where=path, hint="use a different run directory (--train.out_dir)")
    is_empty = not path.exists() or all(item.name.startswith(".") for item in path.iterdir())
    if not is_empty and not (path / CONFIG).exists():
        raise InputError("not empty and not a run directory", expected=f"{CONFIG} in it", where=path)


def saved_config(run: Path) -> RunConfig | None:
    """The configuration of a run; None if there is no run."""
    return read_config(run / CONFIG) if (run / CONFIG).exists() else None


def known_hashes(path: Path) -> dict[str, str] | None:
    """The data hashes that run.json records; None if there is no such file.

    Raises:
        InputError: the file is damaged, or was written by a different version.
    """
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version, known = record["format_version"], dict(record["data_hashes"])
    except (ValueError, KeyError, TypeError) as error:
        hint = "restore the file, or use a different run directory (--train.out_dir)"
        raise InputError("damaged file of the run", found=repr(error), where=path, hint=hint) from error
    if version != FORMAT_VERSION:
        raise InputError(
            "the run directory was written by a different version",
            expected=f"format {FORMAT_VERSION}",
            found=f"format {version}, written by version {record.get('version')}",
            where=path,
            hint="install that version of the project",
        )
    return known


def require_same_config(config: RunConfig, known: RunConfig, where: Path) -> None:
    """
    Raises:
        InputError: there are fields that differ but must not; every such field is named.
    """
    if differences := config_differences(config, known):
        raise InputError(
            "the run directory belongs to a different configuration:\n  " + "\n  ".join(differences),
            where=where,
            hint="use that run's configuration, or a different run directory (--train.out_dir)",
        )


def require_same_past(config: RunConfig, known: RunConfig, step: int, where: Path) -> None:
    """
    Raises:
        InputError: the mixture of the data differs in a step before `step`.
    """
    before = [{s: w for s, w in (c.data.mixture_changes or {}).items() if s < step} for c in (config, known)]
    if before[0] != before[1]:
        raise InputError(
            "data.mixture_changes differs in steps that were trained already",
            expected=f"before step {step}: {before[1]}",
            found=before[0],
            where=where,
            hint=f"change the weights from step {step} on, or start a new run (--train.out_dir)",
        )


def require_same_data(known: dict[str, str], found: dict[str, str], where: Path) -> None:
    """
    Raises:
        InputError: the hashes differ. The message names what differs: the tokenizer, the training text, the held-out
            text; for an imported model its tokenizer files or weights.
    """
    names = {"train": "a different training text", "val": "a different held-out text", "weights": "different weights"}
    differing = [key for key in known | found if known.get(key) != found.get(key)]
    if differing and ("weights" in known) != ("weights" in found):
        kinds = ["an imported model" if "weights" in hashes else "a model trained here" for hashes in (known, found)]
        hint = "use a different run directory: imported and trained models cannot share one"
        raise InputError(f"the run holds {kinds[0]}", expected=kinds[0], found=kinds[1], where=where, hint=hint)
    if differing:
        raise InputError(
            f"the run uses {' and '.join(names.get(key, f'a different {key}') for key in differing)}",
            expected=", ".join(f"{key} {known.get(key)}" for key in differing),
            found=", ".join(f"{key} {found.get(key)}" for key in differing),
            where=where,
            hint="use a different run directory, or remove this one if an import into it was never finished"
            if "weights" in known
            else "use the data of that run (--data.dir), or a different run directory (--train.out_dir)",
        )
