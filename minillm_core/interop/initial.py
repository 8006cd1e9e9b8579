"""The checkpoint that a run starts from, in the framework that trains it."""

import logging
from dataclasses import replace
from pathlib import Path

from minillm_core.config import RunConfig
from minillm_core.files import user_path
from minillm_core.interop.conversion import convert
from minillm_core.training.backend import Backend
from minillm_core.training.checkpoints import FRAMEWORKS, checkpoint_steps, foreign_kind

logger = logging.getLogger(__name__)


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
    source, copy = user_path(init_from), out_dir.with_name(f"{out_dir.name}-init")
    other = next(name for name in FRAMEWORKS if name != own)
    has = {name: bool(checkpoint_steps(source / name / "checkpoints")) for name in FRAMEWORKS}
    kind = other if has[other] and not has[own] else foreign_kind(source)
    if kind is None:
        return config
    if not checkpoint_steps(copy / own / "checkpoints"):
        convert(f"{kind}->{own}", source, copy)
    logger.info(f"the initial checkpoint {init_from} was converted: it is in {copy}")
    return replace(config, train=replace(config.train, init_from=str(copy)))
