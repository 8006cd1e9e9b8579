"""Conversions between the two frameworks, and from and to other formats: Hugging Face, GGUF, the original Mini-LLM."""

from minillm_core.interop.conversion import Conversion, convert

__all__ = ["Conversion", "convert"]
