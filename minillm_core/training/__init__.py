"""The train loop and what it keeps: checkpoints, run directory, metrics, plots."""
