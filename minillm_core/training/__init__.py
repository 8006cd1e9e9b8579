"""The training loop and the files it writes: checkpoints, run directory, metrics, plots."""
