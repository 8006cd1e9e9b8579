"""The figures of attention, masks, KV cache and sampling."""

import jax.numpy as jnp
import numpy as np
from figures import BLUE, GREY, RED, figure
from figures import _finish as finish
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from minillm_core.config import load_config
from minillm_core.model.mask import AttentionMask


@figure
def attention(canvas: Figure) -> None:
    """Left: the largest weight of a softmax over 32 keys, with and without the scale. Right: the groups of GQA."""
    from minillm_jax.attention import attend

    sizes, groups = canvas.subplots(1, 2)
    S, heads = 32, (32, 64, 128, 256)
    for scaled, color, label in ((False, RED, "without the scale"), (True, BLUE, "divided by √H")):
        largest = []
        for H in heads:
            q, k = np.random.default_rng(0).standard_normal((2, 1, 256, 1, H))
            v = np.eye(S, H)[None, None]  # so that the output is the row of weights
            out = attend(
                jnp.asarray(q if scaled else q * H**0.5),
                jnp.asarray(k[:, :S].swapaxes(1, 2)),
                jnp.asarray(v),
                jnp.zeros((1, 256, S)),
            )
            largest.append(float(np.asarray(out).max(axis=-1).mean()))
        sizes.plot(heads, largest, "o-", color=color, label=label)
    sizes.axhline(1 / S, color=GREY, linestyle=":", label="equal weights")
    sizes.set(ylim=(0, 1.05), xticks=heads)
    finish(sizes, xlabel="channels of a head, H", ylabel="largest weight", title="softmax over 32 random keys")

    config = load_config("quickstart").model
    N, K = config.n_heads, config.n_kv_heads
    v = jnp.broadcast_to(jnp.arange(K, dtype=jnp.float32)[None, :, None, None], (1, K, 1, 2))
    read = np.asarray(attend(jnp.ones((1, 1, N, 2)), v, v, jnp.zeros((1, 1, 1))))[0, 0, :, 0].round().astype(int)
    for column, (name, kv_heads, color) in enumerate((("repeated", read, BLUE), ("tiled", np.arange(N) % K, RED))):
        left = column * (N + 0.8)
        for head, kv_head in enumerate(kv_heads):
            groups.plot([left + head, left + (kv_head + 0.5) * N / K - 0.5], [1, 0], color=color, zorder=1)
        for height, letter, places in ((1, "q", np.arange(N)), (0, "kv", (np.arange(K) + 0.5) * N / K - 0.5)):
            for i, place in enumerate(places):
                circle = {"boxstyle": "circle", "facecolor": "white", "edgecolor": color}
                groups.text(left + place, height, f"{letter}{i}", ha="center", va="center", bbox=circle, fontsize=8)
        groups.text(left + (N - 1) / 2, 1.4, name, ha="center", color=color)
    groups.set(xlim=(-0.6, 2 * N + 0.4), ylim=(-0.4, 1.65), title="which query head reads which KV head")
    groups.axis("off")


@figure
def masks(canvas: Figure) -> None:
    """Masks as matrices, from their descriptions: a row for each query, a column for each key."""
    from minillm_jax.attention import mask_bias

    T = 8
    documents = jnp.repeat(jnp.array([0, 1]), jnp.array([3, 5]))[None]
    in_cache = AttentionMask(None, jnp.arange(5, T)[None])
    panels = canvas.subplot_mosaic(
        [["causal", "window", "documents", "right"], ["causal", "window", "documents", "wrong"]]
    )
    drawings = {
        "causal": (AttentionMask(None), T, "causal", BLUE),
        "window": (AttentionMask(3), T, "sliding window of 3", BLUE),
        "documents": (AttentionMask(None, None, documents, documents), T, "two documents", BLUE),
        "right": (in_cache, 3, "3 new tokens, 5 in a cache", BLUE),
        "wrong": (AttentionMask(None), 3, "the same, aligned top left", RED),
    }
    for name, (mask, n_queries, title, color) in drawings.items():
        axes = panels[name]
        seen_TS = np.asarray(mask_bias(mask, n_queries, T, jnp.float32))[0] == 0
        axes.pcolormesh(seen_TS, cmap=ListedColormap(["white", color]), edgecolors=GREY, linewidth=0.4, vmin=0, vmax=1)
        axes.set(aspect="equal", ylim=(n_queries, 0), xticks=np.arange(T) + 0.5, yticks=np.arange(n_queries) + 0.5)
        axes.set_xticklabels(range(T))
        axes.set_yticklabels(range(T - n_queries, T))
        axes.tick_params(length=0, labelsize=7)
        axes.set_title(title, fontsize=8, color=color)
        axes.set_xlabel("key", fontsize=8)
        axes.set_ylabel("query", fontsize=8)
