"""The outer form of a checkpoint, the same for both frameworks: committed whole, listed, hashed, found.

    <run>/<framework>/checkpoints/<step>/
        checkpoint.json     framework, step, the whole run configuration, hashes of the data
        tokenizer.model     of an imported model perhaps tokenizer.json and tokenizer_config.json
        manifest.json       size and SHA-256 of every other file
        ...                 the payload: Orbax (jax) or safetensors (torch)

A checkpoint is written aside, hashed, flushed to disk and then renamed: a folder with a number for its name is whole.
Names that start with a dot are being written or removed; `<step>.damaged` is a checkpoint that its run has replaced.
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

from minillm_core.config import RunConfig, run_config_from_dict, to_dict
from minillm_core.errors import InputError
from minillm_core.files import commit_folder, first_bytes, hash_file, is_disk_full, make_folder, remove_folder
from minillm_core.tensors import Tensors
from minillm_core.text.tokenizer import copy_tokenizer
from minillm_core.version import __version__

FORMAT_VERSION = 1
FRAMEWORKS = ("jax", "torch")


@dataclass(frozen=True)
class CheckpointInfo:
    """What checkpoint.json says."""

    framework: str
    step: int
    """Batches seen: the place in the data and in the schedule."""
    updates: int
    """Adam's count: less than `step` where updates were skipped (`train.nonfinite`) or the moments began anew."""
    config: RunConfig
    data_hashes: dict[str, str]
    converted_from: str | None = None


@dataclass(frozen=True)
class TrainingState:
    """The framework-free content of a checkpoint; an Adam moment group is empty if the checkpoint has weights alone."""

    weights: Tensors
    exp_avg: Tensors
    exp_avg_sq: Tensors


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the committed checkpoints in a `checkpoints` folder, ascending."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal() and path.is_dir())


def find_checkpoint(path: str | Path, framework: str) -> Path:
    """The checkpoint meant by a path: itself, or the newest of a run (`runs/x`) or of its framework (`runs/x/jax`).

    Raises:
        InputError: there is none, or it belongs to the other framework.
    """
    path = Path(path)
    if (path / "checkpoint.json").is_file():
        found = path
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
    """There is no checkpoint of a framework at a path: what is there instead, and what to do."""
    other = next(name for name in FRAMEWORKS if name != framework)
    found, hint = "no committed checkpoint", "check the path, or train first"
    command: tuple[str, ...] = ("train", "--backend", framework)
    if checkpoint_steps(path / other / "checkpoints"):
        found, hint = f"only {other} checkpoints", f"convert it with {other}->{framework}"
        command = ("convert", f"{other}->{framework}", str(path))
    elif (kind := foreign_kind(path)) is not None:
        found, hint = f"a checkpoint of the kind {kind}", f"make it a run first, with {kind}->{framework}"
        command = ("convert", f"{kind}->{framework}", str(path), "RUN")
    expected = "a run, a run's framework folder, or one checkpoint folder"
    return InputError(
        f"no {framework} checkpoint", expected=expected, found=found, where=path, hint=hint, command=command
    )


def read_info(checkpoint: Path) -> CheckpointInfo:
    """Reads checkpoint.json.

    Raises:
        InputError: missing, damaged, or written by a newer version.
    """
    path = checkpoint / "checkpoint.json"
    if not path.is_file():
        raise InputError("not a checkpoint", expected="checkpoint.json", where=checkpoint, hint="check the path")
    try:
        data = json.loads(path.read_text())
        version = data["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("damaged checkpoint", found=repr(error), where=path, hint="use another checkpoint") from error
    if version != FORMAT_VERSION:
        raise InputError(
            "checkpoint of another format version",
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
        raise InputError("damaged checkpoint", found=repr(error), where=path, hint="use another checkpoint") from error


def foreign_kind(path: Path) -> str | None:
    """Which other project's checkpoint seems to be at a path: `gguf`, `minillm`, `hf`, or none."""
    if path.suffix == ".gguf" or first_bytes(path, 4) == b"GGUF":
        return "gguf"
    if path.suffix == ".pt" or (path / "ckpt.pt").is_file():
        return "minillm"
    if not (path / "config.json").is_file():
        return None
    try:
        model_type = json.loads((path / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        model_type = None  # whoever reads it says what is wrong
    return "minillm" if model_type == "mini-llm" else "hf"


def payload_bytes(*groups: Tensors) -> int:
    """How much tensors will take on the disk, at most."""
    return sum(array.nbytes for group in groups for array in group.values()) + (1 << 20)


def verify_checkpoint(checkpoint: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        InputError: naming every file that is missing, truncated or changed. (Further files do no harm.)
    """
    path = checkpoint / "manifest.json"
    try:
        manifest: dict[str, dict[str, Any]] = json.loads(path.read_text())
        problems = []
        for name, entry in manifest.items():
            file = checkpoint / name
            if not file.is_file():
                problems.append(f"missing: {name}")
            elif file.stat().st_size != entry["size"]:
                problems.append(f"size: {name}: expected {entry['size']} bytes, found {file.stat().st_size}")
            elif hash_file(file) != entry["sha256"]:
                problems.append(f"content changed: {name}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems = [f"manifest.json: {error!r}"]
        manifest = {}
    if not problems and "checkpoint.json" not in manifest:
        problems.append("manifest.json: checkpoint.json is not in it")
    if problems:
        raise InputError(
            "damaged checkpoint:\n  " + "\n  ".join(problems),
            where=checkpoint,
            hint="use another checkpoint of the run, by its folder",
        )


class CheckpointWriter:
    """Commits checkpoints into one folder, in the background, one at a time, and removes old ones.

    One process may hold one; leaving its context waits for the save under way.
    """

    def __init__(self, folder: Path, keep_last: int = 0):
        """
        Args:
            keep_last: good checkpoints that a commit leaves, besides the best; 0: all.
        """
        self.folder, self.keep_last = folder, keep_last
        self.damaged: dict[int, InputError] = {}
        """Steps passed over by `newest_good`, and why. They stay where they are until their step is saved again."""
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
        """The newest checkpoint whose files are whole; None if there is no checkpoint at all.

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
                hint="restore one from a backup; or, to train from the beginning, give another --train.out_dir",
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
        """Starts saving; the caller may change its state as soon as this returns.

        Args:
            tokenizer: the folder of the tokenizer's files.
            start_payload: given the folder to write into, takes a snapshot of the state and returns the function that
                finishes writing it, which then runs in the background.
            best: step of a checkpoint to keep however old it is.
            n_bytes: of the payload; if they are not free, nothing is begun.

        Raises:
            InputError: the disk is full: for this save or for the one before.
            whatever else made the save before fail.
        """
        self.wait()
        partial = self.folder / f".{info.step}.partial"
        with _cleaned_up(partial):
            make_folder(partial)
            if shutil.disk_usage(partial).free < n_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # before a library is in the midst of writing
            finish_payload = start_payload(partial)
        self._pending = self._thread.submit(self._commit, partial, info, tokenizer, finish_payload, best)

    def _commit(
        self, partial: Path, info: CheckpointInfo, tokenizer: Path, finish_payload: Callable[[], None], best: int | None
    ) -> None:
        final = self.folder / str(info.step)
        with _cleaned_up(partial):
            finish_payload()
            copy_tokenizer(tokenizer, partial)
            data = {"format_version": FORMAT_VERSION, "version": __version__, **dataclasses.asdict(info)}
            _write_json(partial / "checkpoint.json", data | {"config": to_dict(info.config)})
            manifest = {
                name: {"size": (partial / name).stat().st_size, "sha256": hash_file(partial / name)}
                for name in _files(partial)
            }
            _write_json(partial / "manifest.json", manifest)
            if final.exists():  # damaged
                shutil.rmtree(final.with_suffix(".damaged"), ignore_errors=True)
                final.rename(final.with_suffix(".damaged"))
            commit_folder(partial, final)
        self.damaged.pop(info.step, None)
        self.prune(info.step, best)

    def prune(self, newest: int, best: int | None) -> None:
        """Removes good checkpoints before the last `keep_last`, the one of step `best` aside."""
        steps = [step for step in self.good_steps() if step <= newest]
        for step in steps[: -self.keep_last] if self.keep_last else []:
            if step != best:
                remove_folder(self.folder / str(step))

    def wait(self) -> None:
        """Blocks until the save under way is committed; raises what made it fail."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()


@contextlib.contextmanager
def _cleaned_up(partial: Path) -> Iterator[None]:
    """Removes what a failed save leaves; a full disk is an InputError."""
    try:
        yield
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_disk_full(error):
            raise InputError(
                "the disk is full: the checkpoint was not saved, earlier ones are untouched",
                where=partial.parent,
                hint="free some space, then give the same command again",
            ) from error
        raise


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")


def _files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    )
