"""Cross-entropy. Shapes: B batch, T time, V vocabulary."""

import jax
import jax.numpy as jnp

from minillm_jax.layers import at_least_float32


def token_losses(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target in nats, (B, T), in at least float32."""
    logits_BTV = logits_BTV.astype(at_least_float32(logits_BTV.dtype))
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT
