"""What both frameworks share: configuration, parameter table, data, tokenizer, checkpoints' outer form, the train loop.

Nothing here imports jax or torch.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("minillm")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
