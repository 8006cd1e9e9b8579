"""A GPU from its published figures: a device that JAX can compile for but not run on.

The figures of each card are in `cards/`, in the format that XLA defines for its compiler
(`stream_executor.GpuTargetConfigProto`). They are those of NVIDIA's data sheets.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental import topologies

from minillm_core.errors import InputError, missing_package
from minillm_jax.device import compiling_for

FIGURES = Path(__file__).parent / "cards"
CARDS = tuple(sorted(path.stem for path in FIGURES.glob("*.txtpb")))
"""The cards that programs can be compiled for."""

CUDNN = 91000
"""Version 9.10.0, as in the figures of every card."""


def card_device(card: str) -> jax.Device:
    """The device of a card.

    Raises:
        InputError: an unknown card, or JAX's CUDA compiler is not installed or was not loaded.
    """
    if card not in CARDS:
        raise InputError("unknown card", expected=" or ".join(CARDS), found=repr(card))
    figures = (FIGURES / f"{card}.txtpb").read_text(encoding="utf-8")
    try:
        with _without_version_check():
            topology = topologies.get_topology_desc(platform="cuda", target_config=figures, topology="1x1x1")
    except NotImplementedError as error:
        if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
            missing = ModuleNotFoundError("JAX's CUDA compiler", name="jax[cuda13]")
            raise missing_package(missing, "cuda", where="compiling for a GPU") from error
        hint = "start a new process with JAX_PLATFORMS=cpu, or compile before JAX is used for anything else"
        raise InputError("JAX has not loaded its CUDA compiler", hint=hint) from error
    return topology.devices[0]


@contextmanager
def _without_version_check() -> Iterator[None]:
    """Lets JAX load its CUDA compiler on a machine without a GPU, where its check of the installed versions fails."""
    name = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def standing_in_for(device: jax.Device) -> Iterator[None]:
    """Everything that asks for the GPU while a program is traced and lowered gets answers for this device.

    Our own code asks `target_device`. JAX's cuDNN attention asks the driver of this machine, in three functions that
    have no public switch; they are replaced here and restored afterwards.
    """
    import jax._src.cudnn.fused_attention_stablehlo as attention

    def version(capability: str) -> tuple[int, ...]:
        return tuple(map(int, capability.split(".")))

    here = version(device.compute_capability)
    answers = {
        "check_cudnn_version": lambda: CUDNN,
        "check_compute_capability": lambda capability: here >= version(capability),
        "is_cuda_compute_capability_equal": lambda capability: here == version(capability),
    }
    if missing := [name for name in answers if not hasattr(attention, name)]:
        found, hint = f"JAX {jax.__version__} without {', '.join(missing)}", "install JAX 0.10 (constraints.txt)"
        raise InputError("this version of JAX cannot compile for a GPU that is not there", found=found, hint=hint)
    originals = {name: getattr(attention, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(attention, name, answer)
        with compiling_for(device):
            yield
    finally:
        for name, original in originals.items():
            setattr(attention, name, original)
