"""Parameters, operations and memory of a configuration of any size, without allocating its arrays."""

import dataclasses
import importlib.util
import json
import os
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from minillm_cli.backends import load_backend
from minillm_cli.console import parse, say
from minillm_core.config import load_config, preset_names
from minillm_core.errors import InputError
from minillm_core.files import output_file, replace_file
from minillm_core.model.diagram import DIAGRAM_BEGINS, diagram
from minillm_core.training.checkpoints import FRAMEWORKS
from minillm_core.training.plan import plan as compute_plan


def main() -> None:
    parse(plan)


def plan(
    names: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[PRESET|FILE.yaml ...]")]] = (),
    card: Annotated[str | None, tyro.conf.arg(name="compile", metavar="h100|h200|a100")] = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    picture: Annotated[str | None, tyro.conf.arg(name="diagram", metavar="FILE.svg")] = None,
) -> None:
    """Prints one line per configuration. Each installed framework builds an abstract model, whose counts must agree.

    GFLOP/token is for training one token (forward and backward). Training memory is float32 weights, gradients and two
    moments. Activations are what PyTorch keeps of one micro-batch in bfloat16 with fused attention. The KV cache holds
    one full context in bfloat16.

    Args:
        names: presets or .yaml files (default: every preset).
        card: instead, compile the JAX programs of each configuration for this GPU, which this machine does not need to
            have, and print what they cost (needs the extra `cuda`).
        as_json: print one JSON object, with the exact numbers by configuration.
        picture: instead, draw the architecture of one configuration, with the shape of every tensor, as an SVG file; an
            existing diagram is replaced.
    """
    if picture is not None:
        if as_json or card is not None:
            raise InputError("--diagram is given with --json or --compile", hint="give one of them")
        _draw(names, picture)
        return
    names = names or tuple(preset_names())
    if card is None:
        _print_plans(names, as_json)
    else:
        _print_programs(names, card, as_json)


def _draw(names: Sequence[str], picture: str) -> None:
    if len(names) != 1:
        raise InputError("--diagram draws one configuration", expected="one preset or .yaml file", found=names)
    if not picture.lower().endswith(".svg"):
        raise InputError("the diagram is an SVG picture", expected="a name that ends in .svg", found=picture)
    path = output_file(picture, DIAGRAM_BEGINS.encode())
    replace_file(path, diagram(load_config(names[0])))
    print(path)


def _print_plans(names: Sequence[str], as_json: bool) -> None:
    frameworks = [name for name in FRAMEWORKS if importlib.util.find_spec(name)]
    backends = [load_backend(name) for name in frameworks]
    configs = {name: load_config(name) for name in names}  # a wrong name is an error before anything is printed
    if as_json:
        plans = {name: dataclasses.asdict(compute_plan(config, backends)) for name, config in configs.items()}
        print(json.dumps(plans))
        return
    print(
        f"{'configuration':<16} {'parameters':>15} {'GFLOP/token':>12} "
        f"{'weights':>12} {'training':>12} {'activations':>12} {'KV cache':>12}"
    )
    for name, config in configs.items():
        cost = compute_plan(config, backends)
        sizes = (cost.weights_bytes, cost.training_bytes, cost.activation_bytes, cost.cache_bytes)
        columns = " ".join(f"{size / 1e9:>9,.2f} GB" for size in sizes)
        print(f"{name:<16} {cost.n_params:>15,} {cost.flops_per_token / 1e9:>12,.3f} {columns}")
    print(f"parameters and operations agree with: {', '.join(frameworks)}")


def _print_programs(names: Sequence[str], card: str, as_json: bool) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # a GPU of this machine is not used, and its absence is no error
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA warns that there is no GPU to choose kernels on
    from minillm_jax.compiled import card_device, compile_programs

    card_device(card)  # an unknown card or a missing extra is an error before anything is printed
    configs = {name: load_config(name) for name in names}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    if not as_json:
        print(
            f"{'configuration':<16} {'program':<12} {'arguments':>14} {'temporaries':>14} {'moved':>14} {'kernels':>8} "
            f"{'fused attention':>16}"
        )
    for name, config in configs.items():
        say(f"compiling {name} for {card}")
        programs = compile_programs(config, card)
        found[name] = {}
        for program, figures in vars(programs).items():
            costs = {field: value for field, value in vars(figures).items() if field != "hlo"}
            found[name][program] = costs
            if not as_json:
                sizes = (costs["arguments_bytes"], costs["temporaries_bytes"], costs["moved_bytes"])
                columns = " ".join(f"{size / 1e9:>11,.2f} GB" for size in sizes)
                calls = f"{costs['kernels']:>8,} {costs['fused_attention_calls']:>16,}"
                print(f"{name:<16} {program:<12} {columns} {calls}", flush=True)
    if as_json:
        print(json.dumps(found))
