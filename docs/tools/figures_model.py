"""The figures of the pages on the tokenizer, tied weights, RMSNorm and SwiGLU."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from drawing import BLUE, GREEN, GREY, MINI, RED, figure, finish
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn import functional as F

from minillm_core.config import load_config
from minillm_core.data.corpus import list_documents
from minillm_core.model.params import init_param, init_params, param_table
from minillm_core.text.samples import SAMPLES
from minillm_core.text.tokenizer import ModelProto, Tokenizer
from minillm_core.text.train_tokenizer import train_tokenizer
from minillm_torch import trace
from minillm_torch.layers import MLP, RMSNorm


@figure
def tokenizer(canvas: Figure) -> None:
    """Left: the merges of one word. Right: bytes per token of three kinds of text, by the size of the vocabulary."""
    merges, sizes = canvas.subplots(1, 2, gridspec_kw={"wspace": 0.1})
    documents = list_documents(load_config("mini-llm-50m").data)
    speeches = [document.path.read_text(encoding="utf-8") for document in documents if document.split == "train"]
    held_out = next(document.path.read_text(encoding="utf-8") for document in documents if document.split == "val")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        train_tokenizer(speeches, MINI.vocab_size, path)
        model = ModelProto.FromString(path.read_bytes())
        merged = [piece for piece in model.pieces if piece.type == piece.NORMAL and len(piece.piece) > 1]
        others = [piece for piece in model.pieces if piece.type != piece.NORMAL or len(piece.piece) == 1]
        _draw_merges(merges, " Congress", {piece.piece: piece.score for piece in merged})
        vocab_sizes = [*(2**i for i in range(9, 15)), MINI.vocab_size]
        kinds = {"speeches": held_out, "source code": SAMPLES["code"], "Russian": SAMPLES["Russian"]}
        bytes_per_token: dict[str, list[float]] = {kind: [] for kind in kinds}
        for size in vocab_sizes:  # a smaller vocabulary is the one after fewer merges
            smaller = ModelProto(trainer_spec=model.trainer_spec, normalizer_spec=model.normalizer_spec)
            smaller.pieces.extend([*others, *merged[: size - len(others)]])
            path.write_bytes(smaller.SerializeToString())
            encode = Tokenizer(path).encode
            for kind, text in kinds.items():
                bytes_per_token[kind].append(len(text.encode()) / len(encode(text)))
    for (kind, values), colour in zip(bytes_per_token.items(), (BLUE, GREEN, RED), strict=True):
        sizes.plot(vocab_sizes, values, "o-", markersize=3, color=colour, label=kind)
    sizes.set_xscale("log", base=2)
    sizes.set_xticks(vocab_sizes, ["512", "1k", "2k", "4k", "8k", "16k", "32k"])
    sizes.set(ylim=(0, None))
    finish(sizes, xlabel="pieces in the vocabulary", ylabel="bytes per token", title="more pieces, fewer tokens")


def _draw_merges(axes: Axes, text: str, scores: dict[str, float]) -> None:
    """One row of boxes for the pieces after each merge."""
    pieces, rows = list(text.replace(" ", "\u2581")), []
    while True:
        rows.append(pieces)
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]
        if not pairs:
            break
        i = -max(pairs)[1]
        pieces = [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]]
    for y, row in enumerate(rows):
        x = 0
        for piece in row:
            is_new = y > 0 and piece not in rows[y - 1]
            face = "#dbe4ff" if is_new else "none"
            axes.add_patch(Rectangle((x + 0.05, y), len(piece) - 0.1, 0.8, facecolor=face, edgecolor=GREY))
            axes.text(x + len(piece) / 2, y + 0.42, piece, ha="center", va="center", family="monospace", size=8)
            x += len(piece)
    axes.set(xlim=(0, len(text)), ylim=(len(rows), -0.2), title="the merges of one word, from the top")
    axes.set_axis_off()


@figure
def tied_weights(canvas: Figure) -> None:
    """Left: the loss of one token. Right: the gradient of each row of the matrix, from its two uses."""
    losses, gradients = canvas.subplots(1, 2)
    p = np.geomspace(1e-5, 1, 200)
    losses.plot(p, -np.log(p), color=BLUE)
    notes = (
        (1 / MINI.vocab_size, "guessing: ln 32,000 = 10.4", (7, 4), "left"),
        (0.5, "p = 1/2: 0.69", (-8, -5), "right"),
    )
    for at, words, offset, align in notes:
        losses.plot(at, -np.log(at), "o", color=RED)
        losses.annotate(words, (at, -np.log(at)), offset, textcoords="offset points", ha=align)
    losses.set_xscale("log")
    losses.set(ylim=(-0.6, 12.9))
    finish(losses, xlabel="probability of the token that follows", ylabel="loss in nats", title="loss of one token")

    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    small = replace(MINI, vocab_size=512, n_layers=2, tie_embeddings=False)
    weights = init_params(small, seed=0)
    shares = 1 / np.arange(1, small.vocab_size + 1)
    tokens = np.random.default_rng(0).choice(small.vocab_size, (4, 128), p=shares / shares.sum())
    found = trace(small, weights | {head: weights[embedding]}, tokens, "float32").gradients
    for name, label, colour in (
        (head, "as output head: every row", BLUE),
        (embedding, "as embedding: rows of the inputs", RED),
    ):
        norms = np.linalg.norm(found[name], axis=1)
        gradients.plot(np.flatnonzero(norms), norms[norms > 0], ".", markersize=4, color=colour, label=label)
    gradients.set_yscale("log")
    gradients.set(ylim=(None, 3e1))
    finish(
        gradients,
        xlabel="row of the matrix, frequent tokens first",
        ylabel="norm of its gradient",
        title="gradients of a tied matrix",
    )


def _mlp() -> MLP:
    """The MLP of the first layer of `mini-llm-50m`, with its initial weights."""
    mlp = MLP(MINI, param_dtype=torch.float32, compute_dtype=torch.float32).requires_grad_(False)
    table = param_table(MINI)
    for name, weight in mlp.named_parameters():
        weight.copy_(torch.tensor(init_param(table[f"model.layers.0.mlp.{name}"], seed=0)))
    return mlp


def _inputs(rows: int) -> Tensor:
    return torch.tensor(np.random.default_rng(0).standard_normal((1, rows, MINI.width)), dtype=torch.float32)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@figure
def rmsnorm(canvas: Figure) -> None:
    """Left: the size of an MLP's output, with and without a norm before it. Right: the effect of eps."""
    outputs, floors = canvas.subplots(1, 2)
    mlp, x = _mlp(), _inputs(32)
    scales = np.geomspace(1e-2, 1e2, 30)

    def norm(eps: float) -> RMSNorm:
        return RMSNorm(MINI.width, eps=eps, param_dtype=torch.float32).requires_grad_(False)

    outputs.loglog(scales, [_rms(mlp(scale * x)) for scale in scales], color=RED, label="without a norm")
    outputs.loglog(
        scales, [_rms(mlp(norm(MINI.norm_eps)(scale * x))) for scale in scales], color=BLUE, label="with RMSNorm"
    )
    finish(outputs, xlabel="RMS of the residual stream", ylabel="RMS of the MLP's output", title="output of an MLP")
    scales = np.geomspace(1e-4, 1e-1, 60)
    for eps, colour in (("1e-6", BLUE), ("1e-5", RED)):
        floors.semilogx(
            scales, [_rms(norm(float(eps))(scale * x)) for scale in scales], color=colour, label=f"eps = {eps}"
        )
    floors.axvline(MINI.init_std, color=GREY, linestyle=":", label="initial embeddings")
    finish(floors, xlabel="RMS of the input", ylabel="RMS of the output", title="small inputs stay small")


@figure
def swiglu(canvas: Figure) -> None:
    """Left: three activations. Right: the error of three mistakes, by the size of the gate's output."""
    curves, errors = canvas.subplots(1, 2)
    z = torch.linspace(-5, 3, 200)
    activations: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
        "silu": (F.silu, BLUE),
        "gelu": (F.gelu, GREEN),
        "relu": (F.relu, GREY),
    }
    for name, (activation, colour) in activations.items():
        curves.plot(z, activation(z), color=colour, label=name)
    finish(curves, xlabel="input z", ylabel="output", title="activations")

    mlp, x = _mlp(), _inputs(64)
    found: dict[str, list[float]] = {"gate and up swapped": [], "relu": [], "gelu": []}
    sizes = []
    for scale in np.geomspace(0.03, 30, 30):
        gate, up = mlp.gate_proj(scale * x), mlp.up_proj(scale * x)
        sizes.append(_rms(gate))
        right = mlp(scale * x)
        for name, hidden in zip(found, (F.silu(up) * gate, F.relu(gate) * up, F.gelu(gate) * up), strict=True):
            found[name].append(float((mlp.down_proj(hidden) - right).norm() / right.norm()))
    for (name, values), colour in zip(found.items(), (RED, GREY, GREEN), strict=True):
        errors.semilogx(sizes, values, color=colour, label=name)
    finish(errors, xlabel="RMS of the gate's output", ylabel="relative error of the MLP", title="three mistakes")
    errors.set(ylim=(0, 1.2))
    errors.legend(fontsize=8, ncols=3, loc="upper center", columnspacing=1, handlelength=1.2, handletextpad=0.5)
