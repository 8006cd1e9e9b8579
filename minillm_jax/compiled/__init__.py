"""Compiles the train step, prefill and decoding for an NVIDIA GPU that this machine does not need to have, and reads
from the compiled programs what they cost. Needs the `cuda` extra."""

from minillm_jax.compiled.card import CARDS, card_device
from minillm_jax.compiled.hlo import materialised
from minillm_jax.compiled.programs import (
    Program,
    Programs,
    compile_decode_step,
    compile_prefill,
    compile_programs,
    compile_train_step,
)

__all__ = [
    "CARDS",
    "Program",
    "Programs",
    "card_device",
    "compile_decode_step",
    "compile_prefill",
    "compile_programs",
    "compile_train_step",
    "materialised",
]
