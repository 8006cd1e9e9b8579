"""Parameters, operations and memory of a configuration of any size, without allocating its arrays."""

import importlib.util
from typing import Annotated

import tyro

from minillm_cli.backends import load_backend
from minillm_core.config import load_config, preset_names
from minillm_core.training.checkpoints import FRAMEWORKS
from minillm_core.training.plan import plan as compute_plan


def main() -> None:
    tyro.cli(plan)


def plan(
    names: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[PRESET|FILE.yaml ...]")]] = (),
) -> None:
    """Prints one line per configuration. Each installed framework builds an abstract model, whose counts must agree.

    GFLOP/token is for training one token (forward and backward). Training memory is float32 weights, gradients and two
    moments. Activations are what PyTorch keeps of one micro-batch in bfloat16 with fused attention. The KV cache holds
    one full context in bfloat16.

    Args:
        names: presets or .yaml files (default: every preset).
    """
    frameworks = [name for name in FRAMEWORKS if importlib.util.find_spec(name)]
    backends = [load_backend(name) for name in frameworks]
    print(
        f"{'configuration':<16} {'parameters':>15} {'GFLOP/token':>12} "
        f"{'weights':>12} {'training':>12} {'activations':>12} {'KV cache':>12}"
    )
    for name in names or preset_names():
        cost = compute_plan(load_config(name), backends)
        sizes = (cost.weights_bytes, cost.training_bytes, cost.activation_bytes, cost.cache_bytes)
        columns = " ".join(f"{size / 1e9:>9,.2f} GB" for size in sizes)
        print(f"{name:<16} {cost.n_params:>15,} {cost.flops_per_token / 1e9:>12,.3f} {columns}")
    print(f"parameters and operations agree with: {', '.join(frameworks)}")
