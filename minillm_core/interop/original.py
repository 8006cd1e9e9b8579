"""Reads a checkpoint of the original Mini-LLM (github.com/Ashx098/Mini-LLM): its ckpt.pt, or its safetensors.

The original's RoPE rotates neighbouring channels, while this project rotates channel i with channel i + H/2: rows of q
and k are reordered. The original's table of rotations is checked and not imported. The imported model reproduces the
original's logits without a cache. (With a cache, the original aligns the causal mask of its single query to the top
left, so the query sees only the first key.)
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minillm_core.config import ModelConfig
from minillm_core.errors import InputError
from minillm_core.interop.safetensors_files import checked_weight, read_tensor, safetensors_layout
from minillm_core.model.params import check_shapes, param_table
from minillm_core.model.rope import half_split, inverse_frequencies
from minillm_core.text.tokenizer import TOKENIZER_JSON, TOKENIZER_MODEL, copy_tokenizer

NAMES = {
    "model.embed_tokens": "tok_embeddings.emb",
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "model.norm": "norm",
    "model.layers": "layers",
}
"""Part of a canonical name -> the same part in the original."""

HEAD, ROTATIONS = "output.weight", "rope.freqs_cis"


@dataclass(frozen=True)
class OriginalCheckpoint:
    """A checkpoint that has been checked, and whose weights have not been read yet."""

    folder: Path
    config: ModelConfig
    read: Callable[[str], np.ndarray]
    """Name in the original -> tensor."""

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every parameter by canonical name, one at a time. float64 is kept; smaller types become float32.

        Raises:
            InputError: a tensor has values that are not finite, or the file is damaged.
        """
        for name in param_table(self.config):
            array = checked_weight(self.read(original_name(name)), original_name(name), self.folder)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                array = half_split(array, self.config.resolved_head_dim)
            yield name, array

    def write_tokenizer(self, folder: Path) -> None:
        """Copies the tokenizer's files, but no tokenizer.model if there is a tokenizer.json: in the original the two
        give different ids, and the model was trained with tokenizer.json."""
        copy_tokenizer(self.folder, folder)
        if (folder / TOKENIZER_JSON).is_file():
            (folder / TOKENIZER_MODEL).unlink(missing_ok=True)


def original_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `layers.3.attention.wq.weight`."""
    for ours, theirs in NAMES.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}(?=\.)", rf"\g<1>{theirs}", name)
    return name


def open_original(path: Path) -> OriginalCheckpoint:
    """Reads the configuration of a ckpt.pt, or of a folder with the original's model.safetensors and config.json, and
    checks the name and shape of every tensor. No code in the pickle is executed.

    Raises:
        InputError: the path is neither, or is damaged, or holds a different kind of model.
    """
    if path.is_dir() and (path / "model.safetensors").is_file():
        file = path / "model.safetensors"
        shapes = {name: shape for name, (shape, _) in safetensors_layout(file).items()}
        arguments = _read_arguments(path / "config.json")

        def read(name: str) -> np.ndarray:
            return read_tensor(file, prefix + name)
    else:
        from minillm_core.interop.torch_pickle import ModelArgs, PickledTensor, read_pickled

        file = path / "ckpt.pt" if path.is_dir() else path
        pickled = read_pickled(file)
        tensors, arguments = pickled.get("model"), pickled.get("model_args")
        if not isinstance(tensors, Mapping) or not all(isinstance(x, PickledTensor) for x in tensors.values()):
            expected, hint = "a dict with 'model' and 'model_args'", "use a checkpoint saved by the original Mini-LLM"
            raise InputError("not a checkpoint of the original Mini-LLM", expected=expected, where=file, hint=hint)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        arguments = vars(arguments) if isinstance(arguments, ModelArgs) else arguments

        def read(name: str) -> np.ndarray:
            array: np.ndarray = tensors[prefix + name].read()
            return array

    prefix = "_orig_mod." if f"_orig_mod.{HEAD}" in shapes else ""  # prefix of a compiled model
    config = _config(arguments, file)
    if config.n_layers > len(shapes):  # before a table of that size is built
        hint = "get the file again"
        raise InputError("more layers than tensors", expected=f"{config.n_layers} layers", where=file, hint=hint)
    shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    back = {original_name(name): name for name in param_table(config)}
    constant = {name for name in (HEAD, ROTATIONS) if name in shapes}
    check_shapes(config, {back.get(n, n): shape for n, shape in shapes.items() if n not in constant}, file)
    if HEAD in constant and not np.array_equal(read(HEAD), read(original_name("model.embed_tokens.weight"))):
        hint = "use a checkpoint saved by the original Mini-LLM"
        raise InputError("the head differs from the embedding, but the original ties them", where=file, hint=hint)
    if ROTATIONS in constant:
        angles = np.arange(config.context_length)[:, None] * inverse_frequencies(config)
        found = read(ROTATIONS)
        if found.shape != angles.shape or not np.allclose(found, np.exp(1j * angles), atol=2e-3):
            hint = "use a checkpoint saved by the original Mini-LLM"
            raise InputError(
                "the RoPE rotations differ from those of the original", found=ROTATIONS, where=file, hint=hint
            )
    return OriginalCheckpoint(file.parent, config, read)


def _read_arguments(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        hint = "put the original's config.json next to its model.safetensors"
        raise InputError("missing or damaged configuration", found=str(error)[:200], where=path, hint=hint) from error


def _config(arguments: Any, where: Path) -> ModelConfig:
    """Converts the original's ModelArgs to a ModelConfig. Its rope_theta and norm_eps are constants in its code."""
    fields = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len")
    values: list[Any] = [arguments.get(field) for field in fields] if isinstance(arguments, dict) else [None]
    if not all(type(value) is int and 0 < value < 1 << 24 for value in values):
        expected, hint = (
            f"whole numbers {fields}",
            "use a checkpoint saved by the original Mini-LLM ('hf->jax' reads Hugging Face folders)",
        )
        kinds = [type(value).__name__ for value in values]  # the values may be deeply nested
        raise InputError(
            "these are not the model_args of the original Mini-LLM",
            expected=expected,
            found=kinds,
            where=where,
            hint=hint,
        )
    dim, n_layers, n_heads, n_kv_heads, vocab_size, multiple_of, max_seq_len = values
    return ModelConfig(
        vocab_size=vocab_size,
        context_length=max_seq_len,
        width=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        hidden=-(-4 * dim // multiple_of) * multiple_of,
        tie_embeddings=True,
        rope_theta=10_000.0,
        norm_eps=1e-6,
    )
