"""A run, from its configuration to its final checkpoint."""

from pathlib import Path

from minillm_core.config import RunConfig
from minillm_core.data.run_data import open_or_prepare
from minillm_core.training.backend import Backend, load_backend
from minillm_core.training.loop import run_to_end
from minillm_core.training.run_directory import find_run


def train(config: RunConfig, backend: Backend | str) -> Path:
    """Prepares the data if needed, then trains to the end, from the newest good checkpoint or the initial weights.

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
    run = find_run(config, backend.auto_dtype())
    data = open_or_prepare(run.config.data, run.config.model.vocab_size)
    return run_to_end(run, backend, data)
