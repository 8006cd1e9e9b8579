"""Reads and writes Hugging Face checkpoints of the Llama architecture: safetensors (one file or shards), tokenizers.

hf_config.py reads and writes config.json.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minillm_core.config import ModelConfig
from minillm_core.errors import InputError
from minillm_core.interop.hf_config import from_hf_config
from minillm_core.interop.safetensors_files import (
    DTYPES,
    checked_weight,
    numpy_dtype,
    read_tensor,
    safetensors_layout,
    stream_safetensors,
)
from minillm_core.model.params import check_shapes, count_params, param_table
from minillm_core.model.rope import inverse_frequencies
from minillm_core.progress import progress
from minillm_core.text.tokenizer import (
    GENERATION_CONFIG,
    check_special_ids,
    copy_tokenizer,
    read_generation_config,
)

logger = logging.getLogger(__name__)

FREQUENCIES = "rotary_emb.inv_freq"
"""The end of the names of buffers that old versions of transformers wrote."""

SHARD_BYTES = 5_000_000_000
"""The largest file of an export, as in transformers. A single larger tensor gets its own file."""


@dataclass(frozen=True)
class HFCheckpoint:
    """A folder that has been checked, and whose weights have not been read yet."""

    folder: Path
    config: ModelConfig
    places: dict[str, tuple[Path, str]]
    """Parameter -> the file that holds it and its name there, in the order of the table of parameters."""

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every parameter, one at a time. float64 is kept; smaller types become float32, which is exact.

        Raises:
            InputError: a tensor has values that are not finite, or a file is damaged.
        """
        for name, (path, stored) in self.places.items():
            yield name, checked_weight(read_tensor(path, stored), stored, path)

    def write_tokenizer(self, folder: Path) -> None:
        """Copies the tokenizer's files. Special ids in config.json become a generation_config.json if there is none."""
        copy_tokenizer(self.folder, folder)
        config = _read_json(self.folder / "config.json")
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
        if ids and not (folder / GENERATION_CONFIG).is_file():
            (folder / GENERATION_CONFIG).write_text(json.dumps(ids) + "\n", encoding="utf-8")


def open_hf(folder: Path) -> HFCheckpoint:
    """Reads the configuration and the headers of a checkpoint's files, and checks every name, shape and dtype.

    Raises:
        InputError: the folder is not a checkpoint, is damaged, or has features that this architecture cannot express.
    """
    if not folder.exists():
        raise InputError("no such folder", expected="a Hugging Face checkpoint", where=folder, hint="check the path")
    if not (folder / "config.json").is_file():
        hint = "give the folder of a downloaded checkpoint (config.json, *.safetensors)"
        raise InputError("not a Hugging Face checkpoint", expected="config.json", where=folder, hint=hint)
    data = _read_json(folder / "config.json")
    config = from_hf_config(data, folder / "config.json")
    read_generation_config(folder)
    check_special_ids(data, folder / "config.json")
    layout: dict[str, tuple[tuple[int, ...], str]] = {}
    places: dict[str, tuple[Path, str]] = {}
    for path, expected in _shards(folder).items():
        found = safetensors_layout(path)
        if lost := (expected or set()) - found.keys():
            problem, hint = "a shard lacks tensors that the index lists for it", "get the shard and the index again"
            raise InputError(problem, found=sorted(lost)[:5], where=path, hint=hint)
        unlisted = set() if expected is None else found.keys() - expected
        if more := [name for name in unlisted if not name.endswith(FREQUENCIES)]:
            problem, hint = "a shard has tensors that the index does not list", "get the shard and the index again"
            raise InputError(problem, found=sorted(more)[:5], where=path, hint=hint)
        for name in sorted(found):
            layout[name], places[name] = found[name], (path, name)
    if "embed_tokens.weight" in layout and "model.embed_tokens.weight" not in layout:  # saved without the head
        for name in [name for name in layout if f"model.{name}" not in layout and not name.startswith("lm_head.")]:
            layout[f"model.{name}"], places[f"model.{name}"] = layout.pop(name), places.pop(name)
    if wrong := [f"{name}: {dtype}" for name, (_, dtype) in layout.items() if dtype not in DTYPES]:
        problem = "quantised or integer weights are not supported:\n  " + "\n  ".join(wrong[:8])
        raise InputError(
            problem, expected=", ".join(DTYPES), where=folder, hint="use the original checkpoint, before quantisation"
        )
    if config.n_layers > len(layout):  # before a table of that size is built
        hint = "get config.json and the weights of the same model again"
        raise InputError("more layers than tensors", expected=f"{config.n_layers} layers", where=folder, hint=hint)
    _drop_redundant(config, layout, places, folder)
    check_shapes(config, {name: shape for name, (shape, _) in layout.items()}, folder)
    return HFCheckpoint(folder, config, {name: places[name] for name in param_table(config)})


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """File of the checkpoint -> the tensors that the index lists for it (None: there is no index)."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        if index.is_file():
            logger.warning(f"{folder} also has an index of shards: using model.safetensors, as transformers does")
        return {folder / "model.safetensors": None}
    if not index.is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
        hint = "save the weights as safetensors; pickled weights (*.bin, *.pt) can run code and are not read"
        raise InputError("no weights", expected="*.safetensors", found=found, where=folder, hint=hint)
    data = _read_json(index)
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError("damaged index", expected="weight_map: tensor -> file", where=index, hint="get the file again")
    by_file: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        file = os.path.normpath(file)
        if file.startswith(("..", "/")) or not file.endswith(".safetensors"):
            expected = "names of *.safetensors files in the folder"
            hint = "do not trust this checkpoint; get it again from its source"
            raise InputError(
                "the index points outside the folder", expected=expected, found=file[:200], where=index, hint=hint
            )
        by_file.setdefault(folder / file, set()).add(name)
    if missing := [path.name for path in by_file if not path.is_file()]:
        raise InputError("shards are missing", found=", ".join(missing), where=folder, hint="get the missing files")
    return {**by_file}


def _drop_redundant(
    config: ModelConfig, layout: dict[str, Any], places: dict[str, tuple[Path, str]], where: Path
) -> None:
    """Removes redundant tensors: the copy of a tied model's head, buffers of rotary frequencies, biases of zero.

    Raises:
        InputError: the copy differs from the embedding, or the frequencies contradict the configuration.
    """
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_embeddings and head in layout and layout[head] == layout.get(embedding):
        if not np.array_equal(read_tensor(*places[head]), read_tensor(*places[embedding])):
            hint = 'set "tie_word_embeddings": false in config.json if the model has its own head'
            raise InputError("the model is tied, but its head differs from its embedding", where=where, hint=hint)
        del layout[head]
    table = param_table(config)
    for name in [name for name in layout if name.endswith("_proj.bias")]:
        spec = table.get(name.removesuffix("bias") + "weight")
        if spec is not None and layout[name][0] == spec.shape[:1] and not read_tensor(*places[name]).any():
            del layout[name]
    for name in [name for name in layout if name.endswith(FREQUENCIES)]:
        own = read_tensor(*places[name]).astype(np.float64)
        expected = inverse_frequencies(config)
        if own.shape != expected.shape or not np.allclose(own, expected, rtol=1e-2):
            hint = "correct rope_theta or rope_scaling in config.json"
            raise InputError(
                "the rotary frequencies of the file contradict config.json", found=name, where=where, hint=hint
            )
        del layout[name]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        hint = "check its permissions" if isinstance(error, PermissionError) else "get the file again"
        raise InputError("damaged JSON", found=str(error)[:200], where=path, hint=hint) from error


def write_hf_weights(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the weights, rounded to `dtype`, in files of at most `shard_bytes` (unless one tensor is larger)."""
    shards: list[dict[str, tuple[tuple[int, ...], str]]] = []
    room, itemsize = 0, numpy_dtype(dtype).itemsize
    for name, spec in param_table(config).items():
        size = math.prod(spec.shape) * itemsize
        if not shards or size > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = (spec.shape, dtype)
        room -= size
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = ["model.safetensors"] if len(shards) == 1 else names
    with progress("writing the weights", count_params(config), "value") as work:
        for file, layout in zip(names, shards, strict=True):
            stream_safetensors(folder / file, layout, ((name, weights[name]) for name in layout), work.advance)
    if len(shards) > 1:
        total = sum(math.prod(spec.shape) for spec in param_table(config).values()) * itemsize
        weight_map = {name: file for file, layout in zip(names, shards, strict=True) for name in layout}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
