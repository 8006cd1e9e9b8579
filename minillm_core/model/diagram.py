"""A picture of the architecture of a configuration, as SVG: every layer with its parameters, every edge with the name
and the shape of its tensor.

Names are those of the code: B rows of a micro-batch, T time, D width, F hidden, N query heads, K key/value heads, H
head dim, V vocabulary.
"""

import html
import math
from collections.abc import Sequence

from minillm_core.config import RunConfig
from minillm_core.model.params import count_params, param_table

WIDTH, MIDDLE = 900, 450
BOX_W, BOX_H = 200, 40
LEFT, RIGHT = 200, 700
"""The centres of the columns of q and v, of gate and up."""

DIAGRAM_BEGINS = "<!-- architecture of a Mini-LLM configuration -->\n"
"""The first characters of every diagram."""

STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1d2430; text-anchor: middle }
.name { font-weight: 600 } .small { font-size: 11px; fill: #495057 } .tiny { font-size: 9.5px }
.title { font-size: 15px; font-weight: 600 }
.shape { font: 11px ui-monospace, monospace; fill: #1c4f9c; text-anchor: start }
.weights { fill: #e7f0fe; stroke: #3b5bdb } .plain { fill: #f8f9fa; stroke: #868e96 }
.frame { fill: none; stroke: #adb5bd; stroke-dasharray: 5 4 } .edge { fill: none; stroke: #495057; stroke-width: 1.2 }
"""


class _Drawing:
    """Boxes and arrows, from top to bottom; coordinates in pixels."""

    def __init__(self, config: RunConfig):
        model, c = config.model, config.train
        self.sizes = {
            "B": c.batch_size // c.grad_accum,
            "T": c.seq_len,
            "D": model.width,
            "F": model.hidden,
            "N": model.n_heads,
            "K": model.n_kv_heads,
            "H": model.resolved_head_dim,
            "V": model.vocab_size,
        }
        self.table = param_table(model)
        self.items: list[str] = []

    def text(self, x: float, y: float, text: str, style: str = "") -> None:
        self.items.append(f'<text x="{x:g}" y="{y:g}" class="{style}">{html.escape(text)}</text>')

    def box(self, x: float, y: float, name: str, does: str = "", weight: str = "") -> None:
        """A box around (x, y). One with a weight (the end of a parameter's name) shows its shape and size."""
        if weight:
            shape = next(spec.shape for spec in self.table.values() if spec.name.endswith(f"{weight}.weight"))
            does = (
                f"{' × '.join(f'{n:,}' for n in shape)} = {math.prod(shape):,}" if len(shape) > 1 else f"{shape[0]:,}"
            )
            does += " parameters" if len(shape) == 1 else ""
        corner = f'x="{x - BOX_W / 2:g}" y="{y - BOX_H / 2:g}" width="{BOX_W}" height="{BOX_H}" rx="5"'
        self.items.append(f'<rect {corner} class="{"weights" if weight else "plain"}"/>')
        self.text(x, y - 4 if does else y + 4, name, "name")
        if does:
            self.text(x, y + 12, does, "small" if len(does) < 32 else "small tiny")

    def edge(self, points: Sequence[tuple[float, float]], tensor: str = "", *, at: float | None = None) -> None:
        """An arrow through points, with the name and the shape of its tensor beside its last part, or at a height."""
        path = " L".join(f"{x:g},{y:g}" for x, y in points)
        self.items.append(f'<path d="M{path}" class="edge" marker-end="url(#head)"/>')
        if tensor:
            x, y = (points[-1][0], (points[-2][1] + points[-1][1]) / 2) if at is None else (points[0][0], at)
            self.tensor(x + 6, y + 3, tensor)

    def tensor(self, x: float, y: float, name: str) -> None:
        """The name and the shape of a tensor; its shape is in its name."""
        shape = " × ".join(f"{self.sizes[letter]:,}" for letter in name.rpartition("_")[2])
        self.text(x, y, f"{name} {shape}", "shape")


def diagram(config: RunConfig) -> str:
    """The architecture of a configuration as an SVG picture. B is a micro-batch of its training, T its seq_len."""
    model = config.model
    d = _Drawing(config)
    half, gap = BOX_H / 2, 34
    y: float = 24
    d.text(MIDDLE, y, f"{count_params(model):,} parameters", "title")
    sizes = {"B": "rows", "T": "tokens", "D": "width", "F": "hidden", "N": "heads", "K": "KV heads", "H": "head dim"}
    sizes["V"] = "tokens in the vocabulary"
    d.text(MIDDLE, y + 20, " · ".join(f"{k} = {d.sizes[k]:,} {word}" for k, word in sizes.items()), "small")
    y += 72
    d.box(MIDDLE, y, "Embedding", weight="embed_tokens")
    d.edge([(MIDDLE, y - half - gap + 8), (MIDDLE, y - half)], "tokens_BT")
    top = y + half + 14
    split = top + 18
    y = split + gap + half
    d.edge([(MIDDLE, top - 14), (MIDDLE, y - half)], "x_BTD", at=split + gap / 2)
    d.box(MIDDLE, y, "RMSNorm", weight="input_layernorm")
    fork = y + half + 14
    d.edge([(MIDDLE, y + half), (MIDDLE, fork), (MIDDLE, fork + gap)], "x_BTD")
    y = fork + gap + half
    for x, letter, heads in ((LEFT, "q", "N"), (MIDDLE, "k", "K"), (RIGHT, "v", "K")):
        if x != MIDDLE:
            d.edge([(MIDDLE, fork), (x, fork), (x, y - half)], "x_BTD")
        d.box(x, y, f"{letter}_proj", weight=f"{letter}_proj")
        below = y + half + gap + half
        if letter != "v":
            d.edge([(x, y + half), (x, below - half)], f"{letter}_BT{heads}H")
            d.box(x, below, "RoPE", "rotate by the position")
    attention = below + half + gap + half
    d.edge([(LEFT, below + half), (LEFT, attention), (MIDDLE - BOX_W / 2, attention)], "q_BTNH", at=below + half + 17)
    d.edge([(MIDDLE, below + half), (MIDDLE, attention - half)], "k_BTKH")
    d.edge([(RIGHT, y + half), (RIGHT, attention), (MIDDLE + BOX_W / 2, attention)], "v_BTKH", at=y + half + 17)
    window = "" if model.sliding_window is None else f", window {model.sliding_window:,}"
    d.box(MIDDLE, attention, f"Attention{window}", f"softmax(q kᵀ / √{d.sizes['H']} + mask) v")
    y = attention + half + gap + half
    d.edge([(MIDDLE, attention + half), (MIDDLE, y - half)], "out_BTNH")
    d.box(MIDDLE, y, "o_proj", weight="o_proj")
    y = _residual(d, y, split)
    split = y + 26
    y = split + gap + half
    d.edge([(MIDDLE, y - gap - half - 16), (MIDDLE, y - half)], "x_BTD")
    d.box(MIDDLE, y, "RMSNorm", weight="post_attention_layernorm")
    fork = y + half + 14
    product = fork + gap + 2 * half + gap + half
    d.items.append(f'<path d="M{MIDDLE},{y + half:g} L{MIDDLE},{fork:g}" class="edge"/>')
    for x, name in ((LEFT + 60, "gate_proj"), (RIGHT - 60, "up_proj")):
        d.edge([(MIDDLE, fork), (x, fork), (x, fork + gap)], "x_BTD")
        d.box(x, fork + gap + half, name, weight=name)
        side = MIDDLE + math.copysign(BOX_W / 2, x - MIDDLE)
        below = fork + gap + 2 * half
        tensor = name.replace("_proj", "_BTF")
        d.edge([(x, below), (x, product), (side, product)], tensor, at=below + 17)
    d.box(MIDDLE, product, "SwiGLU", "silu(gate) × up")
    y = product + half + gap + half
    d.edge([(MIDDLE, product + half), (MIDDLE, y - half)], "h_BTF")
    d.box(MIDDLE, y, "down_proj", weight="down_proj")
    y = _residual(d, y, split)
    bottom = y + 22
    d.items.append(f'<rect x="14" y="{top:g}" width="{WIDTH - 28}" height="{bottom - top:g}" rx="8" class="frame"/>')
    d.text(WIDTH - 90, bottom - 12, f"{model.n_layers:,} such block{'s' if model.n_layers > 1 else ''}", "name")
    y += 26 + gap + half
    d.edge([(MIDDLE, y - half - gap - 16), (MIDDLE, y - half)], "x_BTD")
    d.box(MIDDLE, y, "RMSNorm", weight="model.norm")
    y += 2 * half + gap
    d.edge([(MIDDLE, y - half - gap), (MIDDLE, y - half)], "x_BTD")
    if model.tie_embeddings:
        d.box(MIDDLE, y, "Output head", "the embedding again, transposed")
    else:
        d.box(MIDDLE, y, "Output head", weight="lm_head")
    d.edge([(MIDDLE, y + half), (MIDDLE, y + half + gap)], "logits_BTV")
    height = math.ceil(y + half + gap + 12)
    return (
        f'{DIAGRAM_BEGINS}<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}">\n'
        f"<style>{STYLE}</style>\n"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#495057"/></marker></defs>\n'
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>\n' + "\n".join(d.items) + "\n</svg>\n"
    )


def _residual(d: _Drawing, y: float, start: float) -> float:
    """The sum with the residual stream, which leaves the main path at `start`. Returns the y of the sum."""
    plus, side = y + BOX_H / 2 + 34 + 9, 34
    d.edge([(MIDDLE, y + BOX_H / 2), (MIDDLE, plus - 9)], "x_BTD")
    d.edge([(MIDDLE, start), (side, start), (side, plus), (MIDDLE - 9, plus)])
    d.tensor(side + 6, plus - 8, "x_BTD")
    d.items.append(f'<circle cx="{MIDDLE}" cy="{plus:g}" r="9" class="plain"/>')
    d.text(MIDDLE, plus + 4, "+", "name")
    return plus
