"""The payload of a checkpoint: `model.safetensors` and `config.json`, which transformers loads, and
`optimizer.safetensors`.

core's checkpoints.py commits, lists and verifies; here tensors are written and read.
"""

from collections.abc import Callable
from pathlib import Path

from minillm_core.checkpoints import LazyTensors, TrainingState, find_checkpoint, read_info, verify_checkpoint
from minillm_core.config import RunConfig
from minillm_core.hf import write_hf_config
from minillm_core.interchange import read_safetensors, read_tensor, safetensors_layout, write_safetensors
from minillm_core.params import check_shapes, param_table
from minillm_torch.model import MiniLLM
from minillm_torch.train import TrainState, default_device, export_state, resolve_dtype
from minillm_torch.weights import build_model

FRAMEWORK = "torch"


def start_payload(folder: Path, config: RunConfig, state: TrainState) -> Callable[[], None]:
    """Copies the state off the device; the returned function writes it."""
    snapshot = export_state(config, state)
    if default_device().type == "cpu":  # then these arrays are the parameters' own memory, which steps change in place
        groups = (snapshot.weights, snapshot.exp_avg, snapshot.exp_avg_sq)
        snapshot = TrainingState(*({name: array.copy() for name, array in group.items()} for group in groups))
    return lambda: write_payload(folder, config, snapshot)


def write_payload(folder: Path, config: RunConfig, state: TrainingState) -> None:
    """Writes framework-free tensors, bit for bit; an empty moment group is left out."""
    write_safetensors(folder / "model.safetensors", state.weights)
    dtype = next(iter(state.weights.values())).dtype.name
    write_hf_config(folder / "config.json", config.model, dtype)
    if state.exp_avg:
        moments = {f"exp_avg.{name}": array for name, array in state.exp_avg.items()}
        moments |= {f"exp_avg_sq.{name}": array for name, array in state.exp_avg_sq.items()}
        write_safetensors(folder / "optimizer.safetensors", moments)


def read_payload(checkpoint: Path, config: RunConfig) -> TrainingState:
    """A checkpoint's tensors, framework-free; of an imported one there are no moments.

    Raises:
        InputError: the payload is missing or damaged, or does not fit `config`, every differing tensor named.
    """
    state = TrainingState(dict(read_safetensors(checkpoint / "model.safetensors")), {}, {})
    if (checkpoint / "optimizer.safetensors").is_file():
        groups = {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
        for key, array in read_safetensors(checkpoint / "optimizer.safetensors"):
            group, _, name = key.partition(".")
            groups[group][name] = array
    for tensors in (state.weights, state.exp_avg, state.exp_avg_sq):
        if tensors:
            check_shapes(config.model, {name: array.shape for name, array in tensors.items()}, checkpoint)
    return state


def open_weights(checkpoint: Path, config: RunConfig) -> LazyTensors:
    """A checkpoint's weights, framework-free, each read when it is asked for.

    Raises:
        InputError: the payload is missing or damaged, or does not fit `config`, every differing tensor named.
    """
    file = checkpoint / "model.safetensors"
    check_shapes(config.model, {name: shape for name, (shape, _) in safetensors_layout(file).items()}, checkpoint)
    return LazyTensors(param_table(config.model), lambda name: read_tensor(file, name))


def load(path: str | Path, dtype: str = "float32") -> MiniLLM:
    """Loads the model of a checkpoint for inference.

    Args:
        path: a run (`runs/quickstart`), its framework folder (`runs/quickstart/torch`): the newest checkpoint; or one
            checkpoint folder.
        dtype: of parameters and computation: float32, bfloat16 or float64.

    Raises:
        InputError: there is no checkpoint of this framework, or it is damaged.
    """
    checkpoint = find_checkpoint(path, FRAMEWORK)
    verify_checkpoint(checkpoint)
    config = read_info(checkpoint).config
    weights = dict(open_weights(checkpoint, config))
    compute_dtype = resolve_dtype(dtype)
    model = build_model(
        config.model, weights, param_dtype=compute_dtype, compute_dtype=compute_dtype, device=default_device()
    )
    return model.requires_grad_(False)
