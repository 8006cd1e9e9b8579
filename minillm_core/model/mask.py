"""The attention mask as a description: which keys a query may see.

A mask is never an array that is passed through the model. Each framework turns a description into what its kernels
understand, in one function (`lower` in attention.py); a kernel that cannot express a mask refuses it.
"""

from dataclasses import dataclass

from minillm_core.errors import InputError
from minillm_core.tensors import Array


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """A query sees the keys at its own index in the row and before it. `window` and the segments hide further keys.

    The index of a token is its place in the row or in the cache; it differs from its position (the RoPE angle) if
    several documents share a row.
    """

    window: int | None
    """Only the nearest `window` keys, the query's own included (sliding window)."""
    query_index_BT: Array | None = None
    """The index of every query, integers (B, T) or (1, T). None: 0 to T - 1, the indices of the keys."""
    query_segments_BT: Array | None = None
    key_segments_BS: Array | None = None
    """The document of every query and key, integers: a query sees only keys of its own segment. Both or neither."""

    def __post_init__(self) -> None:
        if (self.query_segments_BT is None) != (self.key_segments_BS is None):
            expected, found = "segments of the queries and of the keys, or neither", "only one of the two"
            raise InputError("incomplete attention mask", expected=expected, found=found)


def effective_window(window: int | None, n_keys: int) -> int | None:
    """The window of a mask over `n_keys` keys: None if it hides none of them."""
    return None if window is None or window >= n_keys else window


def kernel_limit(compute_capability: float | None, dtype: str, head_dim: int, n_queries: int) -> str | None:
    """Why no fused kernel is used for these inputs, whatever the mask; None if one is.

    These are conditions under which the kernels of both frameworks can be used. Each accepts some more inputs, but both
    frameworks take the same path.

    Args:
        compute_capability: of the GPU; None if the device is not a GPU.
        dtype: name of the dtype of the queries.
    """
    if compute_capability is None:
        return "the device is not a GPU"
    if compute_capability < 8.0:
        return "the GPU is older than Ampere"
    if dtype != "bfloat16":
        return f"the dtype is {dtype}, not bfloat16"
    if head_dim % 8 or head_dim > 128:
        return f"head_dim {head_dim} is not a multiple of 8 up to 128"
    return f"the length {n_queries} is odd" if n_queries % 2 else None
