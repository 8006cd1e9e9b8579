"""Parameters, operations and memory of a configuration of any size, without allocating its arrays."""

import importlib.util

import tyro

from minillm_cli.backends import load_backend
from minillm_core.config import load_config, preset_names
from minillm_core.errors import InputError
from minillm_core.model.params import count_params, forward_flops
from minillm_core.training.checkpoints import FRAMEWORKS


def main() -> None:
    tyro.cli(plan)


def plan(names: tyro.conf.Positional[tuple[str, ...]] = ()) -> None:
    """Prints one line per configuration. Each installed framework builds an abstract model, whose counts must agree.

    GFLOP/token is for training one token (forward and backward). Training memory is float32 weights, gradients and two
    moments, without activations. The KV cache holds one full context in bfloat16.

    Args:
        names: presets or .yaml files (default: every preset).
    """
    frameworks = [name for name in FRAMEWORKS if importlib.util.find_spec(name)]
    print(
        f"{'configuration':<16} {'parameters':>15} {'GFLOP/token':>12} "
        f"{'weights':>12} {'training':>12} {'KV cache':>12}"
    )
    for name in names or preset_names():
        config = load_config(name)
        model, seq_len = config.model, config.train.seq_len
        counted = count_params(model), forward_flops(model, 1, seq_len)
        for framework in frameworks:
            backend = load_backend(framework)
            found = backend.count_params(model), backend.count_forward_flops(model, 1, seq_len)
            if found != counted:
                raise InputError(f"the counts of {framework} differ", expected=counted, found=found, where=name)
        cache = 2 * 2 * model.n_layers * model.n_kv_heads * model.resolved_head_dim * model.context_length
        sizes = " ".join(f"{size / 1e9:>9,.2f} GB" for size in (4 * counted[0], 16 * counted[0], cache))
        print(f"{name:<16} {counted[0]:>15,} {3 * counted[1] / seq_len / 1e9:>12,.3f} {sizes}")
    print(f"parameters and operations agree with: {', '.join(frameworks)}")
