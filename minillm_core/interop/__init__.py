"""Conversions between the frameworks and the formats of other projects: Hugging Face, GGUF, the original Mini-LLM."""

from minillm_core.interop.conversion import Conversion, convert

__all__ = ["Conversion", "convert"]
