"""Conversions between the frameworks and the formats of other projects: Hugging Face, GGUF, the original Mini-LLM."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minillm_core.interop.conversion import Conversion, convert

__all__ = ["Conversion", "convert"]


def __getattr__(name: str) -> Any:
    """Imports the conversions when they are first used: PyTorch checkpoints need the file formats alone."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("minillm_core.interop.conversion"), name)
