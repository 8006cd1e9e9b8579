"""A run, from its configuration to its final checkpoint."""

from dataclasses import replace
from pathlib import Path

from minillm_core.config import RunConfig
from minillm_core.data.run_data import open_or_prepare
from minillm_core.training.backend import Backend, load_backend
from minillm_core.training.checkpoints import checkpoint_steps, find_checkpoint, read_info, verify_checkpoint
from minillm_core.training.loop import run_to_end
from minillm_core.training.run_directory import find_run, saved_config


def train(config: RunConfig, backend: Backend | str) -> Path:
    """Prepares the data if needed, then trains to the end, from the newest good checkpoint or the initial weights.

    A new run starts with the model, the weights and the tokenizer of `train.init_from`, if it is given.

    Progress is logged to the loggers of `minillm_core`. On SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C the run saves
    before it ends.

    Args:
        backend: the framework's package, `minillm_jax` or `minillm_torch`; or its name, `jax` or `torch`.

    Returns:
        the final checkpoint.

    Raises:
        InputError: the data or the run directory does not belong to this configuration, a second process is using the
            run directory, the disk is full, or the loss is not finite.
        Interrupted: one of these signals came; the run has been saved.
    """
    if isinstance(backend, str):
        backend = load_backend(backend)
    config, init = _with_initial_model(config, backend.FRAMEWORK)
    run = find_run(config, backend.auto_dtype())
    data = open_or_prepare(run.config.data, run.config.model.vocab_size, tokenizer=init)
    return run_to_end(run, backend, data, init)


def _with_initial_model(config: RunConfig, framework: str) -> tuple[RunConfig, Path | None]:
    """The configuration with the model of `train.init_from`, and that checkpoint; None if the weights are random, or if
    the run has a checkpoint of its own."""
    if config.train.init_from is None:
        return config, None
    out_dir = Path(config.train.out_dir)
    known = saved_config(out_dir)
    if known is not None and checkpoint_steps(out_dir / framework / "checkpoints"):
        return replace(config, model=known.model), None
    init = find_checkpoint(config.train.init_from, framework)
    verify_checkpoint(init)
    return replace(config, model=read_info(init).config.model), init
