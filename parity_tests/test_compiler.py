"""JAX's CPU compiler: jaxlib 0.10.2 computes a sum of squares wrongly for some shapes (jax-ml/jax#39103)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity_tests.conftest import Tier


@pytest.mark.parametrize("width", range(2, 9))
def test_vmapped_sum_of_squares(float64: Tier, width: int) -> None:
    """On a processor with AVX-512, 0.10.2 is wrong for widths 3, 5, 6 and 7: by 24 % of the largest sum for 3."""
    rng = np.random.default_rng(0)
    matrix, rows = rng.standard_normal((width, width)), rng.standard_normal((16_385, width))
    ours = jax.jit(jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2)))(rows)
    expected = ((rows @ matrix.T) ** 2).sum(axis=1)
    error = np.abs(np.asarray(ours) - expected).max() / expected.max()
    assert error <= 1e-14, (
        f"jax {jax.__version__} computes wrong numbers here (relative error {error:.1e}): use a different version"
    )
