"""The language model: embedding, blocks, final norm, output head.

Shapes: B batch, T query time, D width, H head dim, V vocabulary.
"""

import torch
from torch import Tensor, nn

from minillm_core.config import ModelConfig
from minillm_core.errors import InputError
from minillm_torch.attention import Attention, PositionContext, causal_mask
from minillm_torch.kv_cache import KVCache, LayerCache, check_room, slots, writable
from minillm_torch.layers import MLP, Embedding, Linear, RMSNorm, rotation
from minillm_torch.precision import at_least_float32


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
        shape = (config.context_length, config.resolved_head_dim // 2)
        cos_SH, sin_SH = (torch.zeros(shape, dtype=at_least_float32(compute_dtype)) for _ in range(2))
        self.cos_SH, self.sin_SH = RopeTable(cos_SH, persistent=False), RopeTable(sin_SH, persistent=False)

    def forward(
        self, tokens_BT: Tensor, cache: KVCache | None, valid_B: Tensor | None = None
    ) -> tuple[Tensor, KVCache | None]:
        _, T = tokens_BT.shape
        position_BT = torch.arange(T, device=tokens_BT.device)[None]
        if cache is not None:
            position_BT = position_BT + cache.length_B[:, None].to(tokens_BT.device, non_blocking=True)
        x_BTD = self.embed_tokens(tokens_BT)
        positions = PositionContext(
            *rotation(self.cos_SH[position_BT], self.sin_SH[position_BT]),
            causal_mask(position_BT, T if cache is None else cache.capacity, x_BTD.dtype),
            None if cache is None else slots(cache, position_BT),
        )
        layer_caches: list[LayerCache] = []
        for i, block in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[i]
            x_BTD, layer_cache = block(x_BTD, positions, layer_cache)
            if layer_cache is not None:
                layer_caches.append(layer_cache)
        if cache is not None:
            length_B = cache.length_B + (T if valid_B is None else valid_B)
            cache.written_B.copy_(length_B)
            cache = KVCache(tuple(layer_caches), length_B, cache.written_B)
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
        self, tokens_BT: Tensor, cache: KVCache | None = None, valid_B: Tensor | None = None
    ) -> tuple[Tensor, KVCache | None]:
        """Logits of the next token at every position.

        Args:
            tokens_BT: token ids, any integer dtype. Without a cache, their positions are 0 to T - 1; with a cache, each
                row continues at its length.
            cache: from `init_cache` or an earlier call; it stays valid and may be continued again.
            valid_B: integers on the host, the number of real tokens in each row (default: all T). The tokens to the
                right of them are padding; their logits are meaningless.

        Returns:
            logits (B, T, V) in compute_dtype, and the cache with the real tokens added (None without one).

        Raises:
            InputError: more tokens than the context or the cache holds, or a token id outside the vocabulary (ids
                are not checked on a GPU).
        """
        tokens_BT = check_tokens(self.config, tokens_BT)
        if cache is not None:
            check_room(cache, tokens_BT, valid_B)
            cache = writable(cache)
        elif valid_B is not None:
            raise InputError(
                "valid_B needs a cache", hint="omit it: padding on the right does not affect the tokens before it"
            )
        x_BTD, cache = self.model(tokens_BT, cache, valid_B)
        return self.head(x_BTD), cache

    def head(self, x_BTD: Tensor) -> Tensor:
        """Logits (B, T, V) from the decoder's output."""
        return self.model.embed_tokens.attend(x_BTD) if self.lm_head is None else self.lm_head(x_BTD)


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
    if tokens_BT.device.type == "cpu" and tokens_BT.numel():
        low, high = int(tokens_BT.min()), int(tokens_BT.max())
        if low < 0 or high >= config.vocab_size:
            found = f"ids from {low} to {high}"
            raise InputError("token id outside the vocabulary", expected=f"0 to {config.vocab_size - 1}", found=found)
    return tokens_BT.long()


def abstract_model(config: ModelConfig) -> MiniLLM:
    """A float32 model of any size, whose arrays have shapes and dtypes but no memory."""
    with torch.device("meta"):
        return MiniLLM(config, param_dtype=torch.float32, compute_dtype=torch.float32)
