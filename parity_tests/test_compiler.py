"""JAX's CPU compiler: jaxlib 0.10.2 miscompiles this sum, with an error of 0.8 % (jax-ml/jax#39103)."""

import jax
import jax.numpy as jnp
import numpy as np

from parity_tests.conftest import Tier


def test_vmapped_sum_of_squares(float64: Tier) -> None:
    rng = np.random.default_rng(0)
    matrix, rows = rng.standard_normal((8, 8)), rng.standard_normal((16_385, 8))
    ours = jax.jit(jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2)))(rows)
    expected = ((rows @ matrix.T) ** 2).sum(axis=1)
    error = np.abs(np.asarray(ours) - expected).max() / expected.max()
    assert error <= 1e-14, (
        f"jax {jax.__version__} computes wrong numbers here (relative error {error:.1e}): use a different version"
    )
