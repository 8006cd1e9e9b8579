"""The checkpoint that a run starts from, in the framework that trains it."""

import contextlib
import hashlib
import logging
from dataclasses import replace
from pathlib import Path

from minillm_core.config import RunConfig
from minillm_core.errors import InputError
from minillm_core.files import make_folder, replace_file, user_path
from minillm_core.interop.conversion import convert
from minillm_core.training.backend import Backend
from minillm_core.training.checkpoints import FRAMEWORKS, checkpoint_steps, find_checkpoint, foreign_kind

logger = logging.getLogger(__name__)


def _identity(source: Path) -> str:
    """A hash of the names, sizes and times of the files of a checkpoint."""
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    stats = [(path.relative_to(source).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stats).encode("utf-8", "surrogateescape")).hexdigest()


def _kind_and_place(path: Path, own: str) -> tuple[str, Path]:
    """The format of a checkpoint, and its place if it is that of a run; the framework that trains is preferred."""
    for framework in sorted(FRAMEWORKS, key=lambda name: name != own):
        with contextlib.suppress(InputError):
            return framework, find_checkpoint(path, framework)
    return foreign_kind(path) or own, path  # if there is nothing, training says so


def with_initial_checkpoint(config: RunConfig, backend: Backend) -> RunConfig:
    """The configuration with a `train.init_from` that this framework can read.

    A checkpoint of the other framework or of another project is first converted into the run `OUT_DIR-init`. Nothing is
    done if there is no `train.init_from`, or if the run has a checkpoint already.

    Raises:
        InputError: the checkpoint cannot be converted.
    """
    out_dir, init_from, own = Path(config.train.out_dir), config.train.init_from, backend.FRAMEWORK
    if init_from is None or checkpoint_steps(out_dir / own / "checkpoints"):
        return config
    copy = out_dir.with_name(f"{out_dir.name}-init")
    kind, source = _kind_and_place(user_path(init_from), own)
    if kind == own:
        return config
    identity, record = _identity(source), copy / ".source"
    if copy.exists() and (not record.is_file() or record.read_text(encoding="utf-8") != identity):
        hint = "remove it, or use a different --train.out_dir"
        problem = "the folder for the converted initial checkpoint holds something different"
        raise InputError(problem, expected=f"the conversion of {init_from}", where=copy, hint=hint)
    if not checkpoint_steps(copy / own / "checkpoints"):
        make_folder(copy)
        replace_file(record, identity)
        convert(f"{kind}->{own}", source, copy)
    logger.info(f"the initial checkpoint {init_from} was converted: it is in {copy}")
    return replace(config, train=replace(config.train, init_from=str(copy)))
