"""The figures of attention, RoPE, masks, KV cache and sampling."""

import jax
import jax.numpy as jnp
import numpy as np
from drawing import BLUE, GREEN, GREY, MINI, RED, figure, finish
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from minillm_core.config import ModelConfig, load_config
from minillm_core.decoding.sampling import Filters, SamplingConfig
from minillm_core.model.mask import AttentionMask
from minillm_core.model.params import forward_flops, init_params
from minillm_core.model.rope import inverse_frequencies, rope_table


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


@figure
def kv_cache(canvas: Figure) -> None:
    """Left: operations for each new token. Right: the slots of a cache with two rows, after prefill and four tokens."""
    from minillm_jax.kv_cache import init_cache
    from minillm_jax.weights import build_model

    work, slots = canvas.subplots(1, 2)
    lengths = np.array([1, *range(64, MINI.context_length + 1, 64)])
    matrices = forward_flops(MINI, 1, 1) - 4 * MINI.n_layers * MINI.n_heads * MINI.resolved_head_dim
    without = np.array([forward_flops(MINI, 1, int(length)) for length in lengths])
    with_cache = matrices + 4 * MINI.n_layers * MINI.n_heads * MINI.resolved_head_dim * lengths
    work.semilogy(lengths, without, color=RED, label="everything again")
    work.semilogy(lengths, with_cache, color=BLUE, label="with a cache")
    finish(work, xlabel="tokens so far", ylabel="operations (FLOPs)", title="one new token, mini-llm-50m")

    config = ModelConfig(vocab_size=16, context_length=12, width=8, n_layers=1, n_heads=1, n_kv_heads=1, hidden=8)
    float32 = {"param_dtype": jnp.float32, "compute_dtype": jnp.float32}
    model = build_model(config, init_params(config, seed=0), **float32)
    _, cache = model(jnp.ones((2, 6), int), init_cache(config, 2, 12, jnp.float32), jnp.array([6, 3]))
    prompt_B = np.asarray(cache.length_B)
    kinds = {"prompt": BLUE, "new": GREEN, "padding": RED, "empty": "white"}
    for column, n_new in enumerate((0, 4)):
        for _ in range(n_new):
            _, cache = model(jnp.ones((2, 1), int), cache)
        written_BS = np.abs(np.asarray(cache.layers[0].k_BKSH)).sum(axis=(1, 3)) > 0
        for row, place in np.ndindex(written_BS.shape):
            kind = "prompt" if place < prompt_B[row] else "new" if place < cache.length_B[row] else "padding"
            kind = kind if written_BS[row, place] else "empty"
            at = (place, 1 - row + 3 * (1 - column))
            slots.add_patch(Rectangle(at, 0.94, 0.9, facecolor=kinds[kind], edgecolor=GREY, linewidth=0.5))
        slots.text(0, 3 * (1 - column) + 2.1, ("after prefill", f"after {n_new} new tokens")[column], fontsize=8)
    for i, (kind, color) in enumerate(kinds.items()):
        slots.add_patch(Rectangle((3.1 * i, -1.4), 0.8, 0.8, facecolor=color, edgecolor=GREY, linewidth=0.5))
        slots.text(3.1 * i + 1, -1, kind, va="center", fontsize=8)
    slots.set(xlim=(-0.1, 12.3), ylim=(-1.6, 6), title="slots of a cache, two rows")
    slots.axis("off")


@figure
def sampling(canvas: Figure) -> None:
    """Left: probabilities at three temperatures. Right: a draw by inverse CDF, from all tokens and from top_p 0.9."""
    from minillm_jax.sampling import draw, filter_logits

    def probabilities(logits_V: np.ndarray, **options: float) -> np.ndarray:
        seen_1V, filters = jnp.zeros((1, len(logits_V)), bool), Filters.of([SamplingConfig(**options)], len(logits_V))
        return np.asarray(jax.nn.softmax(filter_logits(jnp.asarray(logits_V[None]), seen_1V, filters, greedy=False)))[0]

    by_rank, cdf = canvas.subplots(1, 2)
    logits_V = 2 * np.sort(np.random.default_rng(0).standard_normal(32_000).astype(np.float32))[::-1]
    ranks = np.unique(np.geomspace(1, len(logits_V), 300).astype(int))
    for temperature, color in ((0.5, GREEN), (1.0, BLUE), (2.0, RED)):
        probs_V = probabilities(logits_V, temperature=temperature, top_p=1.0)
        n_kept = int((probabilities(logits_V, temperature=temperature, top_p=0.9) > 0).sum())
        by_rank.plot(
            ranks, np.cumsum(probs_V)[ranks - 1], color=color, label=f"{temperature:g}: {n_kept:,} tokens have 90 %"
        )
    by_rank.axhline(0.9, color=GREY, linestyle=":")
    by_rank.set(xscale="log", ylim=(0, 1.6), yticks=np.linspace(0, 1, 6))
    finish(by_rank, xlabel="the n most likely tokens", ylabel="their probability", title="temperature")
    by_rank.legend(fontsize=8, loc="upper left")

    few_V = np.array([1.0, 3.0, 0.0, 2.5, -1.0, 2.0], np.float32)
    number = 0.62
    for options, color, label in (({"top_p": 1.0}, BLUE, "all tokens"), ({"top_p": 0.9}, RED, "top_p 0.9")):
        probs_V = probabilities(few_V, temperature=1.0, **options)
        cdf.stairs(np.cumsum(probs_V), np.arange(len(few_V) + 1) - 0.5, baseline=None, color=color, label=label)
    token = int(draw(jnp.log(probabilities(few_V, temperature=1.0, top_p=0.9))[None], jnp.array([number]))[0])
    cdf.annotate("", (token, number), (-0.5, number), arrowprops={"arrowstyle": "->", "color": GREY})
    cdf.annotate("", (token, 0), (token, number), arrowprops={"arrowstyle": "->", "color": GREY})
    cdf.text(-0.4, number + 0.03, f"u = {number}", color=GREY, fontsize=8)
    cdf.set(xlim=(-0.5, len(few_V) - 0.5), ylim=(0, 1.05))
    finish(cdf, xlabel="token id", ylabel="cumulative probability", title="a draw")
    cdf.legend(fontsize=8, loc="lower right")


@figure
def rope(canvas: Figure) -> None:
    """Left: the angles of some channel pairs. Right: the error of scores with the wrong layout, by distance."""
    from minillm_jax.layers import apply_rope, rotation

    angles, scores = canvas.subplots(1, 2)
    positions = np.arange(64)
    frequencies = inverse_frequencies(MINI)
    for pair in (0, 4, 8, 16):
        angles.plot(positions, np.cos(positions * frequencies[pair]), label=f"pair {pair}")
    finish(angles, xlabel="position", ylabel="cosine of the angle", title="each pair turns at its own speed")
    cos, sin = (table[:64].astype(np.float32)[None] for table in rope_table(MINI))
    factors = rotation(jnp.asarray(cos), jnp.asarray(sin))
    H, T = MINI.resolved_head_dim, len(positions)
    q_BT1H, k_BT1H = np.random.default_rng(0).standard_normal((2, 256, 1, 1, H)).astype(np.float32).repeat(T, axis=2)
    as_stored = np.arange(H).reshape(2, -1).T.reshape(-1)  # channels i and i + H/2 become neighbours
    right, wrong = (
        np.einsum("BH,BTH->BT", *(np.asarray(apply_rope(x[..., order], *factors))[:, rows, 0] for x, rows in calls))
        for order in (np.arange(H), as_stored)
        for calls in [((q_BT1H, 0), (k_BT1H, slice(None)))]
    )
    error_T = np.sqrt(np.mean((wrong - right) ** 2, axis=0) / np.mean(right**2))
    scores.plot(positions, error_T, color=RED)
    scores.set(ylim=(0, None))
    finish(scores, xlabel="distance in tokens", ylabel="relative error", title="scores with the wrong layout")
