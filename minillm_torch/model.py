"""The language model: embedding, blocks, final norm, output head.

Shapes: B batch, T query time, D width, H head dim, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minillm_core.config import ModelConfig
from minillm_core.errors import InputError
from minillm_core.model.mask import AttentionMask, effective_window
from minillm_torch.attention import Attention, PositionContext, lower
from minillm_torch.kv_cache import KVCache, LayerCache, append_segments, check_room, slots, writable
from minillm_torch.layers import MLP, Embedding, Linear, RMSNorm, matmul, rotation
from minillm_torch.precision import at_least_float32, cast


class RopeTable(nn.Buffer):
    """Cosines or sines of every position: constant, not trained, not saved."""


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, *, param_dtype: torch.dtype, compute_dtype: torch.dtype):
        super().__init__()
        dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        self.input_layernorm = RMSNorm(config.width, eps=config.norm_eps, param_dtype=param_dtype)
        self.self_attn = Attention(config, **dtypes)
        self.post_attention_layernorm = RMSNorm(config.width, eps=config.norm_eps, param_dtype=param_dtype)
        self.mlp = MLP(config, **dtypes)

    def forward(
        self, x_BTD: Tensor, positions: PositionContext, cache: LayerCache | None
    ) -> tuple[Tensor, LayerCache | None]:
        attended_BTD, cache = self.self_attn(self.input_layernorm(x_BTD), positions, cache)
        x_BTD = x_BTD + attended_BTD
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), cache


class Decoder(nn.Module):
    """Everything below the output head."""

    def __init__(self, config: ModelConfig, *, param_dtype: torch.dtype, compute_dtype: torch.dtype):
        super().__init__()
        dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        self.embed_tokens = Embedding(config.vocab_size, config.width, **dtypes)
        self.layers = nn.ModuleList([Block(config, **dtypes) for _ in range(config.n_layers)])
        self.norm = RMSNorm(config.width, eps=config.norm_eps, param_dtype=param_dtype)
        self.head_dim, self.window = config.resolved_head_dim, config.sliding_window
        shape = (config.context_length, config.resolved_head_dim // 2)
        cos_SH, sin_SH = (torch.zeros(shape, dtype=at_least_float32(compute_dtype)) for _ in range(2))
        self.cos_SH, self.sin_SH = RopeTable(cos_SH, persistent=False), RopeTable(sin_SH, persistent=False)

    def forward(
        self,
        tokens_BT: Tensor,
        cache: KVCache | None,
        valid_B: Tensor | None = None,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        remat: bool = False,
    ) -> tuple[Tensor, KVCache | None]:
        """The output of the final norm (B, T, D), and the cache. `remat` recomputes each block in the backward pass
        instead of keeping its activations; without a cache only."""
        _, T = tokens_BT.shape
        index_BT = torch.arange(T, device=tokens_BT.device)[None]
        if cache is not None:
            index_BT = index_BT + cache.length_B[:, None].to(tokens_BT.device, non_blocking=True)
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
        cos_BT1H, sin_BT1H = rotation(self.cos_SH[position_BT], self.sin_SH[position_BT])
        positions = PositionContext(
            cos_BT1H=cos_BT1H,
            sin_BT1H=sin_BT1H,
            mask=mask,
            bias_BTS=lower(mask, T, n_keys, self.head_dim, x_BTD.dtype, x_BTD.device),
            slots=None if cache is None else slots(cache, index_BT),
        )
        layer_caches: list[LayerCache] = []
        for i, block in enumerate(self.layers):
            if remat:
                x_BTD, _ = checkpoint(block, x_BTD, positions, None, use_reentrant=False, preserve_rng_state=False)
                continue
            x_BTD, layer_cache = block(x_BTD, positions, None if cache is None else cache.layers[i])
            if layer_cache is not None:
                layer_caches.append(layer_cache)
        if cache is not None:
            length_B = cache.length_B + (T if valid_B is None else valid_B)
            cache.written_B.copy_(length_B)
            cache = KVCache(tuple(layer_caches), length_B, cache.written_B, cache.segments_BS)
        return self.norm(x_BTD), cache


class MiniLLM(nn.Module):
    """A Llama-style language model. Its initial weights and rotary tables are placeholders; weights.py sets them."""

    def __init__(self, config: ModelConfig, *, param_dtype: torch.dtype, compute_dtype: torch.dtype):
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}
        self.model = Decoder(config, **dtypes)
        self.lm_head = None if config.tie_embeddings else Linear(config.width, config.vocab_size, **dtypes)

    def forward(
        self,
        tokens_BT: Tensor,
        cache: KVCache | None = None,
        valid_B: Tensor | None = None,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
    ) -> tuple[Tensor, KVCache | None]:
        """Logits of the next token at every position.

        Args:
            tokens_BT: token ids, any integer dtype.
            cache: from `init_cache` or an earlier call; it stays valid and may be continued again.
            valid_B: integers on the host, the number of real tokens in each row (default: all T). The tokens to the
                right of them are padding; their logits are meaningless.
            positions_BT: integers, the position of each token in its document. By default 0 to T - 1; with a cache,
                each row continues at its length.
            segments_BT: integers, if several documents share a row: the document of each token. Tokens of one row that
                are in different segments do not see each other.

        Returns:
            logits (B, T, V) in compute_dtype, and the cache with the real tokens added (None without one).

        Raises:
            InputError: more tokens than the context or the cache holds, a token id outside the vocabulary, a position
                outside the context, or arrays of different shapes (only shapes are checked on a GPU).
        """
        tokens_BT = check_tokens(self.config, tokens_BT)
        positions_BT = check_like(tokens_BT, "positions_BT", positions_BT, self.config.context_length)
        segments_BT = check_like(tokens_BT, "segments_BT", segments_BT, None)
        if cache is not None:
            check_room(cache, tokens_BT, valid_B, segments_BT)
            cache = writable(cache)
        elif valid_B is not None:
            raise InputError(
                "valid_B needs a cache", hint="omit it: padding on the right does not affect the tokens before it"
            )
        x_BTD, cache = self.model(tokens_BT, cache, valid_B, positions_BT, segments_BT)
        return self.head(x_BTD), cache

    def head(self, x_BTD: Tensor) -> Tensor:
        """Logits (B, T, V) from the decoder's output."""
        dtype = self.compute_dtype
        return matmul(cast(x_BTD, dtype), cast(self.head_weight(), dtype))

    def head_weight(self) -> Tensor:
        """The output head's weights (V, D): those of the embedding if the two are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight


def check_tokens(config: ModelConfig, tokens_BT: Tensor) -> Tensor:
    """The tokens as int64.

    Raises:
        InputError: not integers (B, T), too many tokens, or ids outside the vocabulary (if the values are known).
    """
    if tokens_BT.ndim != 2 or tokens_BT.is_floating_point() or tokens_BT.dtype == torch.bool:
        found = f"{tokens_BT.dtype} {tuple(tokens_BT.shape)}"
        raise InputError("tokens are not a batch of ids", expected="integers (B, T)", found=found)
    if tokens_BT.shape[1] > config.context_length:
        found = f"{tokens_BT.shape[1]} tokens"
        raise InputError("more tokens than the context", expected=f"at most {config.context_length}", found=found)
    if _has_values(tokens_BT):
        low, high = int(tokens_BT.min()), int(tokens_BT.max())
        if low < 0 or high >= config.vocab_size:
            found = f"ids from {low} to {high}"
            raise InputError("token id outside the vocabulary", expected=f"0 to {config.vocab_size - 1}", found=found)
    return tokens_BT.long()


def check_like(tokens_BT: Tensor, name: str, array_BT: Tensor | None, limit: int | None) -> Tensor | None:
    """Positions or segments as int64.

    Raises:
        InputError: not integers, not the shape of the tokens, or not from 0 to limit - 1 (if the values are known).
    """
    if array_BT is None:
        return None
    if array_BT.shape != tokens_BT.shape or array_BT.is_floating_point() or array_BT.dtype == torch.bool:
        found = f"{array_BT.dtype} {tuple(array_BT.shape)}"
        raise InputError(f"{name} does not fit the tokens", expected=f"integers {tuple(tokens_BT.shape)}", found=found)
    if limit is not None and _has_values(array_BT):
        low, high = int(array_BT.min()), int(array_BT.max())
        if low < 0 or high >= limit:
            raise InputError(f"{name} is out of range", expected=f"0 to {limit - 1}", found=f"{low} to {high}")
    return array_BT.long()


def _has_values(array_BT: Tensor) -> bool:
    """Whether the values can be checked: reading them from a GPU would wait for it, and a compiler has none."""
    return array_BT.device.type == "cpu" and not torch.compiler.is_compiling() and array_BT.numel() > 0


def abstract_model(config: ModelConfig) -> MiniLLM:
    """A float32 model of any size, whose arrays have shapes and dtypes but no memory."""
    with torch.device("meta"):
        return MiniLLM(config, param_dtype=torch.float32, compute_dtype=torch.float32)
