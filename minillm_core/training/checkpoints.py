"""The checkpoint format that both frameworks share: how checkpoints are written, verified, listed and found.

    <run>/<framework>/checkpoints/<step>/
        checkpoint.json     framework, step, the whole run configuration, hashes of the data
        tokenizer.model     for an imported model: its tokenizer files, such as tokenizer.json
        manifest.json       size and SHA-256 of every other file
        ...                 the payload: Orbax (jax) or safetensors (torch)

A checkpoint is written under a hidden name, hashed, flushed to disk and then renamed. So a folder whose name is a
number is complete. A folder whose name starts with a dot is being written or removed. `<step>.damaged` is a damaged
checkpoint that the run has replaced.
"""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm_core.config import RUN_RECORD, RunConfig, run_config_from_dict, to_dict
from minillm_core.errors import InputError
from minillm_core.files import (
    commit_folder,
    first_bytes,
    hash_files,
    is_disk_full,
    make_folder,
    real_path,
    remove_folder,
    user_path,
)
from minillm_core.tensors import Tensors
from minillm_core.text.tokenizer import copy_tokenizer
from minillm_core.version import __version__

FORMAT_VERSION = 1
FRAMEWORKS = ("jax", "torch")


@dataclass(frozen=True)
class CheckpointInfo:
    """The content of checkpoint.json."""

    framework: str
    step: int
    """Batches seen: the position in the data and in the learning-rate schedule."""
    updates: int
    """Adam's count: less than `step` if updates were skipped (`train.nonfinite`) or the moments were reset."""
    config: RunConfig
    data_hashes: dict[str, str]
    converted_from: str | None = None

    @property
    def has_data(self) -> bool:
        """Whether it was trained here. An imported model has hashes of its tokenizer and its weights only."""
        return any(name.partition(" of ")[0] == "train" for name in self.data_hashes)


@dataclass(frozen=True)
class TrainingState:
    """The content of a checkpoint, without framework types. `exp_avg` and `exp_avg_sq` may be empty (weights only)."""

    weights: Tensors
    exp_avg: Tensors
    exp_avg_sq: Tensors


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the committed checkpoints in a `checkpoints` folder, ascending."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal() and path.is_dir())


def find_checkpoint(path: str | Path, framework: str) -> Path:
    """The checkpoint at a path, or the newest one of a run (`runs/x`) or of a run's framework folder (`runs/x/jax`).

    Raises:
        InputError: there is none, or it belongs to the other framework.
    """
    path = user_path(path)
    if (path / "checkpoint.json").is_file():
        found = real_path(path)  # its name is its step, and its parents are those of the run
    else:
        for folder in (path / "checkpoints", path / framework / "checkpoints"):
            if steps := checkpoint_steps(folder):
                found = folder / str(steps[-1])
                break
        else:
            raise _none_found(path, framework)
    info = read_info(found)
    if info.framework != framework:
        raise InputError(
            f"a {info.framework} checkpoint where a {framework} one is needed",
            where=found,
            hint=f"convert it with {info.framework}->{framework}",
            command=("convert", f"{info.framework}->{framework}", str(found)),
        )
    return found


def _none_found(path: Path, framework: str) -> InputError:
    """The error for a path without a checkpoint of `framework`; it says what is there instead, and what to do."""
    other = next(name for name in FRAMEWORKS if name != framework)
    found, hint = "no complete checkpoint", "check the path, or train first"
    command: tuple[str, ...] = ("train", "--backend", framework, "--train.out_dir", str(path))
    if checkpoint_steps(path / other / "checkpoints"):
        found, hint = f"only {other} checkpoints", f"convert it with {other}->{framework}"
        command = ("convert", f"{other}->{framework}", str(path))
    elif (kind := foreign_kind(path)) is not None:
        found, hint = f"a checkpoint in {kind} format", f"convert it to a run first, with {kind}->{framework}"
        command = ("convert", f"{kind}->{framework}", str(path), "RUN")
    elif path.parent.name == "checkpoints":
        steps = ", ".join(map(str, checkpoint_steps(path.parent)))
        found, hint, command = (
            f"complete checkpoints of the steps: {steps or 'none'}",
            "name one of these, or the run",
            (),
        )
    elif run := next((folder for folder in path.absolute().parents if (folder / RUN_RECORD).is_file()), None):
        found, hint, command = "a part of a run", f"name the run, {run}, or one of its checkpoints", ()
    expected = "a run, a run's framework folder, or one checkpoint folder"
    return InputError(
        f"no {framework} checkpoint", expected=expected, found=found, where=path, hint=hint, command=command
    )


def read_info(checkpoint: Path) -> CheckpointInfo:
    """Reads checkpoint.json.

    Raises:
        InputError: the file is missing, damaged, or was written by a different version.
    """
    path = checkpoint / "checkpoint.json"
    if not path.is_file():
        raise InputError("not a checkpoint", expected="checkpoint.json", where=checkpoint, hint="check the path")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("damaged checkpoint", found=repr(error), where=path, hint="choose a different one") from error
    if version != FORMAT_VERSION:
        raise InputError(
            "checkpoint with a different format version",
            expected=FORMAT_VERSION,
            found=f"{version}, written by version {data.get('version')}",
            where=path,
            hint="install the version of the project that wrote it",
        )
    try:
        return CheckpointInfo(
            framework=data["framework"],
            step=int(data["step"]),
            updates=int(data.get("updates", data["step"])),
            config=run_config_from_dict(data["config"], path),
            data_hashes=dict(data["data_hashes"]),
            converted_from=data["converted_from"],
        )
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("damaged checkpoint", found=repr(error), where=path, hint="choose a different one") from error


def foreign_kind(path: Path) -> str | None:
    """Guesses the format of a foreign checkpoint: `gguf`, `minillm` (the original Mini-LLM), `hf`, or None. The name
    of a folder says nothing."""
    suffix = "" if path.is_dir() else path.suffix.lower()
    if suffix == ".gguf" or first_bytes(path, 4) == b"GGUF":
        return "gguf"
    if suffix == ".pt" or (path / "ckpt.pt").is_file():
        return "minillm"
    if not (path / "config.json").is_file():
        return None
    try:
        model_type = json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        model_type = None  # the function that reads the file reports the problem
    return "minillm" if model_type == "mini-llm" else "hf"


def payload_bytes(*groups: Tensors) -> int:
    """Upper bound for the disk space that the tensors take."""
    return sum(array.nbytes for group in groups for array in group.values()) + (1 << 20)


def verify_checkpoint(checkpoint: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        InputError: files are missing, truncated or changed; every such file is named. (Additional files are ignored.)
    """
    path = checkpoint / "manifest.json"
    try:
        manifest: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        problems, whole = [], []
        for name, entry in manifest.items():
            file = checkpoint / name
            if not file.is_file():
                problems.append(f"missing: {name}")
            elif file.stat().st_size != entry["size"]:
                problems.append(f"size: {name}: expected {entry['size']} bytes, found {file.stat().st_size}")
            else:
                whole.append(name)
        hashes = hash_files([checkpoint / name for name in whole], "checking the checkpoint")
        changed = [name for name, digest in zip(whole, hashes, strict=True) if digest != manifest[name]["sha256"]]
        problems += [f"content changed: {name}" for name in changed]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems = [f"manifest.json: {error!r}"]
        manifest = {}
    if not problems and "checkpoint.json" not in manifest:
        problems.append("manifest.json: no entry for checkpoint.json")
    if not checkpoint.is_dir():
        hint = "give the command again: a run in progress removes old checkpoints"
        raise InputError("the checkpoint was removed", where=checkpoint, hint=hint)
    if problems:
        raise InputError(
            "damaged checkpoint:\n  " + "\n  ".join(problems),
            where=checkpoint,
            hint="use a different checkpoint of the run: give the path of its folder",
        )


class CheckpointWriter:
    """Commits checkpoints into one folder, one at a time, and removes old ones.

    Only one process at a time may write to a folder. Leaving the context waits for the save in progress.
    """

    def __init__(self, folder: Path, keep_last: int = 0, *, in_background: bool = True):
        """
        Args:
            keep_last: number of good checkpoints to keep after each commit, besides the best one; 0 keeps all.
            in_background: `save` returns before the checkpoint is written, and nothing shows the progress.
        """
        self.folder, self.keep_last, self._in_background = folder, keep_last, in_background
        self.damaged: dict[int, InputError] = {}
        """Steps that `newest_good` skipped, and why. Their folders stay in place until the same step is saved again."""
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> "CheckpointWriter":
        for leftover in self.folder.glob(".*.partial"):
            shutil.rmtree(leftover)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def good_steps(self) -> list[int]:
        """Steps of the committed checkpoints that are not known to be damaged, ascending."""
        return [step for step in checkpoint_steps(self.folder) if step not in self.damaged]

    def newest_good(self) -> Path | None:
        """The newest checkpoint whose files are intact; None if there is no checkpoint at all.

        Raises:
            InputError: all are damaged.
        """
        for step in reversed(checkpoint_steps(self.folder)):
            try:
                verify_checkpoint(self.folder / str(step))
            except InputError as error:
                self.damaged[step] = error
            else:
                return self.folder / str(step)
        if self.damaged:
            raise InputError(
                "every checkpoint of the run is damaged",
                found="\n".join(str(error) for error in self.damaged.values()),
                where=self.folder,
                hint="restore one from a backup, or start a new run in a different --train.out_dir",
            )
        return None

    def save(
        self,
        info: CheckpointInfo,
        tokenizer: Path,
        start_payload: Callable[[Path], Callable[[], None]],
        best: int | None = None,
        n_bytes: int = 0,
    ) -> None:
        """Starts saving (or saves, if not in the background); the caller may change its state as soon as this returns.

        Args:
            tokenizer: the folder of the tokenizer's files.
            start_payload: given the folder to write into, takes a snapshot of the state and returns the function that
                finishes writing it, which then runs in the background.
            best: step of a checkpoint that is kept regardless of its age.
            n_bytes: size of the payload. If the disk has less free space, the save fails at once.

        Raises:
            InputError: the disk is full, in this save or the previous one.
            Exception: anything else that made the previous save fail.
        """
        self.wait()
        partial = self.folder / f".{info.step}.partial"
        with _cleaned_up(partial):
            make_folder(partial)
            if shutil.disk_usage(partial).free < n_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # fail before a library starts to write
            finish_payload = start_payload(partial)
        if self._in_background:
            self._pending = self._thread.submit(self._commit, partial, info, tokenizer, finish_payload, best)
        else:
            self._commit(partial, info, tokenizer, finish_payload, best)

    def _commit(
        self, partial: Path, info: CheckpointInfo, tokenizer: Path, finish_payload: Callable[[], None], best: int | None
    ) -> None:
        final = self.folder / str(info.step)
        with _cleaned_up(partial):
            finish_payload()
            if not _files(partial):
                raise InputError("the tensors were written to a different place", expected=partial)
            copy_tokenizer(tokenizer, partial)
            data = {"format_version": FORMAT_VERSION, "version": __version__, **dataclasses.asdict(info)}
            _write_json(partial / "checkpoint.json", data | {"config": to_dict(info.config)})
            names = _files(partial)
            hashes = hash_files([partial / name for name in names], "hashing the new checkpoint")
            manifest = {
                name: {"size": (partial / name).stat().st_size, "sha256": digest}
                for name, digest in zip(names, hashes, strict=True)
            }
            _write_json(partial / "manifest.json", manifest)
            if final.exists():  # a damaged checkpoint of this step
                shutil.rmtree(final.with_suffix(".damaged"), ignore_errors=True)
                final.rename(final.with_suffix(".damaged"))
            commit_folder(partial, final)
        self.damaged.pop(info.step, None)
        self.prune(info.step, best)

    def prune(self, newest: int, best: int | None) -> None:
        """Removes old good checkpoints; keeps the last `keep_last` up to step `newest`, and that of step `best`."""
        steps = [step for step in self.good_steps() if step <= newest]
        for step in steps[: -self.keep_last] if self.keep_last else []:
            if step != best:
                remove_folder(self.folder / str(step))

    def wait(self) -> None:
        """Waits until the save in progress is committed; raises its exception if it failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()


@contextlib.contextmanager
def _cleaned_up(partial: Path) -> Iterator[None]:
    """Removes the files of a failed save; turns the error of a full disk into an InputError."""
    try:
        yield
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_disk_full(error):
            raise InputError(
                "the disk is full: the checkpoint was not saved; earlier checkpoints are intact",
                where=partial.parent,
                hint="free some space, then run the same command again",
            ) from error
        raise


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    )
