"""The tensors of a checkpoint on disk: safetensors files, by framework path.

model.safetensors        the parameters; with config.json beside it, `transformers` can load the folder
optimizer.safetensors    exp_avg and exp_avg_sq, absent in a checkpoint that has only weights
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from minillm_core.config import ModelConfig
from minillm_core.errors import InputError
from minillm_core.interop import safetensors_files
from minillm_core.interop.hf_config import write_hf_config
from minillm_core.progress import ignore

_LOCATIONS = {
    "weights": ("model.safetensors", ""),
    "exp_avg": ("optimizer.safetensors", "exp_avg."),
    "exp_avg_sq": ("optimizer.safetensors", "exp_avg_sq."),
}
"""Group of tensors -> the file that holds it, and the prefix of its names in that file."""


def start_writing(
    folder: Path,
    config: ModelConfig,
    groups: Mapping[str, Mapping[str, np.ndarray]],
    advance: Callable[[int], None] = ignore,
) -> Callable[[], None]:
    """Returns a function that writes the tensors. They must not change until it has returned.

    Args:
        groups: `weights` and, if training is to resume from it, `exp_avg` and `exp_avg_sq`; each by framework path.
        advance: called with the number of values that were written.
    """
    files: dict[str, dict[str, np.ndarray]] = {}
    for group, tensors in groups.items():
        file, prefix = _LOCATIONS[group]
        files.setdefault(file, {}).update({f"{prefix}{path}": array for path, array in tensors.items()})

    def write() -> None:
        for file, tensors in files.items():
            safetensors_files.write_safetensors(folder / file, tensors, advance)
        dtype = next(iter(groups["weights"].values())).dtype.name
        write_hf_config(folder / "config.json", config, dtype)

    return write


def has_group(checkpoint: Path, group: str) -> bool:
    """Whether a checkpoint has `weights`, `exp_avg` or `exp_avg_sq`."""
    return (checkpoint / _LOCATIONS[group][0]).is_file()


def saved_shapes(checkpoint: Path, group: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a group, by framework path; no tensor is read.

    Raises:
        InputError: the group is missing or damaged.
    """
    file, prefix = _LOCATIONS[group]
    layout = safetensors_files.safetensors_layout(checkpoint / file)
    known = tuple(begin for other, begin in _LOCATIONS.values() if other == file)
    if more := sorted(name for name in layout if not name.startswith(known)):
        hint = "use a different checkpoint of the run"
        raise InputError("unknown groups of tensors", found=more[:5], where=checkpoint / file, hint=hint)
    return {name.removeprefix(prefix): shape for name, (shape, _) in layout.items() if name.startswith(prefix)}


def read_tensor(checkpoint: Path, group: str, path: str) -> np.ndarray:
    """One tensor of a group.

    Raises:
        InputError: it is missing or damaged.
    """
    file, prefix = _LOCATIONS[group]
    return safetensors_files.read_tensor(checkpoint / file, f"{prefix}{path}")
