"""The language model: embedding, blocks, final norm, output head.

Shapes: B batch, T query time, D width, H head dim, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from minillm_core.config import ModelConfig
from minillm_core.errors import InputError
from minillm_core.model.mask import AttentionMask, effective_window
from minillm_jax.attention import Attention, PositionContext, lower
from minillm_jax.kv_cache import KVCache, LayerCache, append_segments, check_room, slots
from minillm_jax.layers import MLP, Embedding, Linear, RMSNorm, matmul, rotation
from minillm_jax.precision import at_least_float32


class RopeTable(nnx.Variable):
    """Cosines or sines of every position: constant, not trained, not saved."""


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, *, param_dtype: DTypeLike, compute_dtype: DTypeLike):
        dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        self.input_layernorm = RMSNorm(config.width, eps=config.norm_eps, param_dtype=param_dtype)
        self.self_attn = Attention(config, **dtypes)
        self.post_attention_layernorm = RMSNorm(config.width, eps=config.norm_eps, param_dtype=param_dtype)
        self.mlp = MLP(config, **dtypes)

    def __call__(
        self, x_BTD: jax.Array, positions: PositionContext, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        attended_BTD, cache = self.self_attn(self.input_layernorm(x_BTD), positions, cache)
        x_BTD = x_BTD + attended_BTD
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), cache


class Decoder(nnx.Module):
    """Everything below the output head. With `scan_layers`, `layers` is one block with the arrays of all (L, ...)."""

    def __init__(
        self, config: ModelConfig, *, scan_layers: bool = False, param_dtype: DTypeLike, compute_dtype: DTypeLike
    ):
        dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        self.embed_tokens = Embedding(config.vocab_size, config.width, **dtypes)
        blocks = [Block(config, **dtypes) for _ in range(1 if scan_layers else config.n_layers)]
        self.layers = blocks[0] if scan_layers else nnx.List(blocks)
        self.norm = RMSNorm(config.width, eps=config.norm_eps, param_dtype=param_dtype)
        self.head_dim, self.window = config.resolved_head_dim, config.sliding_window
        shape = (config.context_length, config.resolved_head_dim // 2)
        cos_SH, sin_SH = (jnp.zeros(shape, dtype=at_least_float32(compute_dtype)) for _ in range(2))
        self.cos_SH, self.sin_SH = RopeTable(cos_SH), RopeTable(sin_SH)

    def __call__(
        self,
        tokens_BT: jax.Array,
        cache: KVCache | None,
        valid_B: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        remat: bool = False,
    ) -> tuple[jax.Array, KVCache | None]:
        """The output of the final norm (B, T, D), and the cache. `remat` recomputes each block in the backward pass
        instead of keeping its activations; without a cache only."""
        _, T = tokens_BT.shape
        index_BT = jnp.arange(T)[None] + (0 if cache is None else cache.length_B[:, None])
        position_BT = index_BT if positions_BT is None else positions_BT
        x_BTD = self.embed_tokens(tokens_BT)
        if cache is None:
            mask = AttentionMask(effective_window(self.window, T), None, segments_BT, segments_BT)
        else:
            assert not remat
            cache = append_segments(cache, segments_BT, index_BT)
            window = effective_window(self.window, cache.capacity)
            mask = AttentionMask(window, index_BT, segments_BT, cache.segments_BS)
        n_keys = T if cache is None else cache.capacity
        cos_BT1H, sin_BT1H = rotation(self.cos_SH[...][position_BT], self.sin_SH[...][position_BT])
        positions = PositionContext(
            cos_BT1H=cos_BT1H,
            sin_BT1H=sin_BT1H,
            mask=mask,
            bias_BTS=lower(mask, T, n_keys, self.head_dim, x_BTD.dtype),
            slots=None if cache is None else slots(cache, index_BT),
        )
        if isinstance(self.layers, Block):
            assert cache is None  # decoding uses the unstacked model
            return self.norm(_scan_blocks(self.layers, x_BTD, positions, remat=remat)), None
        layer_caches: list[LayerCache] = []
        for i, block in enumerate(self.layers):
            if remat:
                x_BTD = jax.checkpoint(lambda x_BTD, block=block: block(x_BTD, positions, None)[0])(x_BTD)
                continue
            x_BTD, layer_cache = block(x_BTD, positions, None if cache is None else cache.layers[i])
            if layer_cache is not None:
                layer_caches.append(layer_cache)
        if cache is not None:
            length_B = cache.length_B + (T if valid_B is None else valid_B)
            cache = KVCache(tuple(layer_caches), length_B, cache.segments_BS)
        return self.norm(x_BTD), cache


def _scan_blocks(stacked: Block, x_BTD: jax.Array, positions: PositionContext, *, remat: bool) -> jax.Array:
    """The output of all blocks, computed in a loop, so that the compiler sees one block, however many there are.

    Args:
        stacked: a block whose arrays are those of all blocks, (L, ...).
    """
    graphdef, arrays = nnx.split(stacked)

    def step(x_BTD: jax.Array, layer: nnx.State) -> tuple[jax.Array, None]:
        return nnx.merge(graphdef, layer)(x_BTD, positions, None)[0], None

    return jax.lax.scan(jax.checkpoint(step, prevent_cse=False) if remat else step, x_BTD, arrays)[0]


class MiniLLM(nnx.Module):
    """A Llama-style language model. Its initial weights and rotary tables are placeholders; weights.py sets them."""

    def __init__(
        self, config: ModelConfig, *, scan_layers: bool = False, param_dtype: DTypeLike, compute_dtype: DTypeLike
    ):
        self.config = config
        self.compute_dtype = compute_dtype
        dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        self.model = Decoder(config, **dtypes, scan_layers=scan_layers)
        self.lm_head = None if config.tie_embeddings else Linear(config.width, config.vocab_size, **dtypes)

    def __call__(
        self,
        tokens_BT: jax.Array,
        cache: KVCache | None = None,
        valid_B: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Logits of the next token at every position.

        Args:
            tokens_BT: token ids, any integer dtype.
            cache: from `init_cache` or an earlier call; it stays valid and may be continued again.
            valid_B: integers, the number of real tokens in each row (default: all T). The tokens to the right of them
                are padding; their logits are meaningless.
            positions_BT: integers, the position of each token in its document. By default 0 to T - 1; with a cache,
                each row continues at its length.
            segments_BT: integers, if several documents share a row: the document of each token. Tokens of one row that
                are in different segments do not see each other.

        Returns:
            logits (B, T, V) in compute_dtype, and the cache with the real tokens added (None without one).

        Raises:
            InputError: more tokens than the context or the cache holds, a token id outside the vocabulary, a position
                outside the context, or arrays of different shapes (only shapes are checked under jit).
        """
        tokens_BT = check_tokens(self.config, tokens_BT)
        positions_BT = check_like(tokens_BT, "positions_BT", positions_BT, self.config.context_length)
        segments_BT = check_like(tokens_BT, "segments_BT", segments_BT, None)
        if cache is not None:
            check_room(cache, tokens_BT, valid_B, segments_BT)
        elif valid_B is not None:
            raise InputError(
                "valid_B needs a cache", hint="omit it: padding on the right does not affect the tokens before it"
            )
        x_BTD, cache = self.model(tokens_BT, cache, valid_B, positions_BT, segments_BT)
        return self.head(x_BTD), cache

    def head(self, x_BTD: jax.Array) -> jax.Array:
        """Logits (B, T, V) from the decoder's output."""
        dtype = self.compute_dtype
        return matmul(x_BTD.astype(dtype), self.head_weight().astype(dtype).T)

    def head_weight(self) -> jax.Array:
        """The output head's weights (V, D): those of the embedding if the two are tied."""
        return self.model.embed_tokens.embedding[...] if self.lm_head is None else self.lm_head.kernel[...].T


def check_tokens(config: ModelConfig, tokens_BT: jax.Array) -> jax.Array:
    """The tokens as int32.

    Raises:
        InputError: not integers (B, T), too many tokens, or ids outside the vocabulary (if the values are known).
    """
    if tokens_BT.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
        raise InputError("tokens are not a batch of ids", expected="integers (B, T)", found=jax.typeof(tokens_BT))
    if tokens_BT.shape[1] > config.context_length:
        found = f"{tokens_BT.shape[1]} tokens"
        raise InputError("more tokens than the context", expected=f"at most {config.context_length}", found=found)
    if not isinstance(tokens_BT, jax.core.Tracer) and tokens_BT.size:
        low, high = int(np.min(tokens_BT)), int(np.max(tokens_BT))
        if low < 0 or high >= config.vocab_size:
            found = f"ids from {low} to {high}"
            raise InputError("token id outside the vocabulary", expected=f"0 to {config.vocab_size - 1}", found=found)
    return jnp.asarray(tokens_BT, jnp.int32)


def check_like(tokens_BT: jax.Array, name: str, array_BT: jax.Array | None, limit: int | None) -> jax.Array | None:
    """Positions or segments as int32.

    Raises:
        InputError: not integers, not the shape of the tokens, or not from 0 to limit - 1 (if the values are known).
    """
    if array_BT is None:
        return None
    if array_BT.shape != tokens_BT.shape or not jnp.issubdtype(array_BT.dtype, jnp.integer):
        found = f"{array_BT.dtype} {array_BT.shape}"
        raise InputError(f"{name} does not fit the tokens", expected=f"integers {tokens_BT.shape}", found=found)
    if limit is not None and not isinstance(array_BT, jax.core.Tracer) and array_BT.size:
        low, high = int(np.min(array_BT)), int(np.max(array_BT))
        if low < 0 or high >= limit:
            raise InputError(f"{name} is out of range", expected=f"0 to {limit - 1}", found=f"{low} to {high}")
    return jnp.asarray(array_BT, jnp.int32)


def abstract_model(config: ModelConfig) -> MiniLLM:
    """A float32 model of any size, whose arrays have shapes and dtypes but no memory."""
    return nnx.eval_shape(lambda: MiniLLM(config, param_dtype=jnp.float32, compute_dtype=jnp.float32))
