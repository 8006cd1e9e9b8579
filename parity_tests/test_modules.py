"""Every submodule by name, the same inputs, both frameworks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from minillm_core.rope import rope_table
from minillm_jax import layers as jax_layers
from minillm_torch import layers as torch_layers
from parity_tests.conftest import Pair, assert_close, random_tokens, to_numpy, to_torch

LENGTH = 300


def both(pair: Pair, *shape: int, seed: int = 0) -> tuple[jax.Array, torch.Tensor]:
    array = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(array, pair.tier.jax), to_torch(array, pair.tier.torch)


def positions(module_pair: Pair) -> tuple[list[jax.Array], list[torch.Tensor]]:
    cos, sin = (table[None, :LENGTH] for table in rope_table(module_pair.config))
    position = np.arange(LENGTH)[None]
    ours = [jnp.asarray(cos, module_pair.tier.jax), jnp.asarray(sin, module_pair.tier.jax), jnp.asarray(position)]
    return ours, [to_torch(cos, module_pair.tier.torch), to_torch(sin, module_pair.tier.torch), to_torch(position)]


def test_embedding(module_pair: Pair) -> None:
    tokens = random_tokens(module_pair.config, 2, LENGTH)
    ours = module_pair.jax.model.embed_tokens(jnp.asarray(tokens))
    assert_close("embed_tokens", to_numpy(ours), to_numpy(module_pair.torch.model.embed_tokens(to_torch(tokens))), 0.0)


@pytest.mark.parametrize("name", ["input_layernorm", "post_attention_layernorm", "mlp"])
@pytest.mark.parametrize("layer", [0, 1])
def test_pointwise(module_pair: Pair, layer: int, name: str) -> None:
    x_jax, x_torch = both(module_pair, 2, LENGTH, module_pair.config.width)
    ours = getattr(module_pair.jax.model.layers[layer], name)(x_jax)
    theirs = getattr(module_pair.torch.model.layers[layer], name)(x_torch)
    assert_close(f"layers.{layer}.{name}", to_numpy(ours), to_numpy(theirs), module_pair.tier.module)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_projection(module_pair: Pair, name: str) -> None:
    x_jax, x_torch = both(module_pair, 2, LENGTH, module_pair.config.width)
    ours = getattr(module_pair.jax.model.layers[0].self_attn, name)(x_jax)
    theirs = getattr(module_pair.torch.model.layers[0].self_attn, name)(x_torch)
    assert_close(name, to_numpy(ours), to_numpy(theirs), module_pair.tier.module)


def test_rope(module_pair: Pair) -> None:
    x_jax, x_torch = both(module_pair, 2, LENGTH, 3, module_pair.config.resolved_head_dim)
    (cos_j, sin_j, _), (cos_t, sin_t, _) = positions(module_pair)
    ours = jax_layers.apply_rope(x_jax, cos_j, sin_j)
    theirs = torch_layers.apply_rope(x_torch, cos_t, sin_t)
    assert_close("apply_rope", to_numpy(ours), to_numpy(theirs), module_pair.tier.module)
    # The complex-number form of the same rotation, from the paper, in float64.
    half = module_pair.config.resolved_head_dim // 2
    x = to_numpy(x_torch)
    cos, sin = (table[:LENGTH, None] for table in rope_table(module_pair.config))
    turned = (x[..., :half] + 1j * x[..., half:]) * (cos + 1j * sin)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    assert_close("apply_rope against complex numbers", to_numpy(ours), expected, module_pair.tier.module)


def test_attend(module_pair: Pair) -> None:
    """Against each other, and against plain loops over heads and positions in float64."""
    c = module_pair.config
    T, S, H = 5, 9, c.resolved_head_dim
    (q_j, q_t), (k_j, k_t), (v_j, v_t) = (
        both(module_pair, 2, n, heads, H, seed=i)
        for i, (n, heads) in enumerate([(T, c.n_heads), (S, c.n_kv_heads), (S, c.n_kv_heads)])
    )
    position = np.array([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]])
    ours = to_numpy(jax_layers.attend(q_j, k_j, v_j, jnp.asarray(position)))
    theirs = to_numpy(torch_layers.attend(q_t, k_t, v_t, to_torch(position)))
    assert_close("attend", ours, theirs, module_pair.tier.module)
    q, k, v = to_numpy(q_t), to_numpy(k_t), to_numpy(v_t)
    expected = np.zeros_like(q)
    for b, t, n in np.ndindex(2, T, c.n_heads):
        kv_head = n // (c.n_heads // c.n_kv_heads)
        seen = position[b, t] + 1
        scores = k[b, :seen, kv_head] @ q[b, t, n] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        expected[b, t, n] = weights / weights.sum() @ v[b, :seen, kv_head]
    assert_close("attend against loops", ours, expected, module_pair.tier.module)


def test_fused_attention_is_attention(module_pair: Pair) -> None:
    """torch's fused kernel, used on a GPU, means the same as `attend`."""
    c = module_pair.config
    q, k, v = (
        both(module_pair, 2, 64, heads, c.resolved_head_dim, seed=i)[1]
        for i, heads in enumerate([c.n_heads, c.n_kv_heads, c.n_kv_heads])
    )
    plain = torch_layers.attend(q, k, v, torch.arange(64)[None])
    assert_close("attend_fused", to_numpy(torch_layers.attend_fused(q, k, v)), to_numpy(plain), module_pair.tier.module)


@pytest.mark.parametrize("layer", [0, 1])
def test_attention_and_block(module_pair: Pair, layer: int) -> None:
    x_jax, x_torch = both(module_pair, 2, LENGTH, module_pair.config.width)
    where_jax, where_torch = positions(module_pair)
    block_jax, block_torch = module_pair.jax.model.layers[layer], module_pair.torch.model.layers[layer]
    ours, _ = block_jax.self_attn(x_jax, *where_jax, None)
    theirs, _ = block_torch.self_attn(x_torch, *where_torch, None)
    assert_close(f"layers.{layer}.self_attn", to_numpy(ours), to_numpy(theirs), module_pair.tier.module)
    ours, _ = block_jax(x_jax, *where_jax, None)
    theirs, _ = block_torch(x_torch, *where_torch, None)
    assert_close(f"layers.{layer}", to_numpy(ours), to_numpy(theirs), module_pair.tier.module)
