"""Rotary position embeddings (RoPE): the table of cosines and sines that both frameworks use.

Su et al. 2021 (arXiv:2104.09864), in the half-split convention of Hugging Face: channel i is rotated together with
channel i + H/2. The table is computed once, in float64, so both frameworks use identical values.
"""

import math

import numpy as np

from minillm_core.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each channel pair, float64 (H/2,), with Llama 3's scaling if configured."""
    head_dim = config.resolved_head_dim
    frequencies = config.rope_theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    # Llama 3.1: low frequencies are divided by `factor`, high ones are kept, and those between are interpolated.
    wavelengths = 2 * math.pi / frequencies
    kept = (scaling.original_context_length / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    kept = np.clip(kept, 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def rope_table(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of every position below context_length: two float64 arrays (context_length, H/2)."""
    angles = np.arange(config.context_length, dtype=np.float64)[:, None] * inverse_frequencies(config)
    return np.cos(angles), np.sin(angles)


def half_split(weight_OI: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders the rows of a q or k projection from the interleaved convention (Meta, GGUF: channels 2i and 2i + 1 are
    rotated together) to the half-split convention (Hugging Face and this project: channels i and i + H/2)."""
    rows, width = weight_OI.shape
    heads = weight_OI.reshape(rows // head_dim, head_dim // 2, 2, width)
    return heads.swapaxes(1, 2).reshape(rows, width)


def interleaved(weight_OI: np.ndarray, head_dim: int) -> np.ndarray:
    """The inverse of `half_split`."""
    rows, width = weight_OI.shape
    heads = weight_OI.reshape(rows // head_dim, 2, head_dim // 2, width)
    return heads.swapaxes(1, 2).reshape(rows, width)
