"""The figures of attention, masks, KV cache and sampling."""

import jax.numpy as jnp
import numpy as np
from figures import BLUE, GREY, RED, figure
from figures import _finish as finish
from matplotlib.figure import Figure

from minillm_core.config import load_config


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
