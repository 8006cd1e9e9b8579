"""The rotary table that both frameworks share, compared with the published formula in 50 digits."""

import mpmath
import numpy as np
import pytest

from minillm_core.config import ModelConfig, RopeScaling
from minillm_core.model.rope import inverse_frequencies, rope_table

_SHAPE = {"vocab_size": 8, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "hidden": 8, "width": 8}
LLAMAS = {
    "Llama 2": ModelConfig(**_SHAPE, context_length=4096, head_dim=128, rope_theta=10_000.0),
    "Llama 3.1": ModelConfig(
        **_SHAPE,
        context_length=131_072,
        head_dim=128,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    ),
    "Llama 3.2": ModelConfig(
        **_SHAPE,
        context_length=131_072,
        head_dim=64,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
    ),
}


def exact_frequencies(config: ModelConfig) -> list[mpmath.mpf]:
    """The frequencies of Meta's `apply_scaling`, case by case."""
    found = []
    for i in range(config.resolved_head_dim // 2):
        frequency = mpmath.mpf(config.rope_theta) ** (-mpmath.mpf(2 * i) / config.resolved_head_dim)
        if (scaling := config.rope_scaling) is not None:
            wavelength, length = 2 * mpmath.pi / frequency, scaling.original_context_length
            if wavelength > length / mpmath.mpf(scaling.low_freq_factor):
                frequency /= scaling.factor
            elif wavelength >= length / mpmath.mpf(scaling.high_freq_factor):
                smooth = (length / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        found.append(frequency)
    return found


@pytest.mark.parametrize("name", LLAMAS)
def test_rotary_table(name: str) -> None:
    """Frequencies to a relative error of 5e-16; cosines and sines to 3e-16 times the angle (at least 3e-16).
    Measured: 2.3e-16, and 2.3e-16 times the angle."""
    config = LLAMAS[name]
    with mpmath.workdps(50):
        frequencies = exact_frequencies(config)
        errors = [float(abs(f / x - 1)) for f, x in zip(inverse_frequencies(config).tolist(), frequencies, strict=True)]
        assert max(errors) <= 5e-16
        cos_SH, sin_SH = rope_table(config)
        for position in (0, 1, 639, 1023, 1024, 4095, 8192, 100_003, 131_071):
            if position < config.context_length:
                for i, frequency in enumerate(frequencies):
                    angle = position * frequency
                    bound = 3e-16 * max(1.0, float(angle))
                    assert abs(cos_SH[position, i] - mpmath.cos(angle)) <= bound, (position, i)
                    assert abs(sin_SH[position, i] - mpmath.sin(angle)) <= bound, (position, i)
    assert np.isfinite(cos_SH).all()
