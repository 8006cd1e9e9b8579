"""A Hugging Face checkpoint of the Llama architecture: config.json, safetensors in shards or not, tokenizer files.

What the architecture here cannot express is refused by name: nothing in a config.json is passed over unless it is known
to change no logits.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minillm_core.config import ModelConfig, RopeScaling
from minillm_core.errors import InputError, listed
from minillm_core.interchange import (
    DTYPES,
    checked_weight,
    numpy_dtype,
    read_tensor,
    safetensors_layout,
    stream_safetensors,
)
from minillm_core.params import check_shapes, param_table
from minillm_core.rope import inverse_frequencies
from minillm_core.tokenizer import (
    BOS_ID,
    EOS_ID,
    GENERATION_CONFIG,
    PAD_ID,
    check_special_ids,
    copy_tokenizer,
    read_generation_config,
)

SHARD_BYTES = 5_000_000_000
"""Largest file of an export, as in transformers; a single tensor may be larger."""

HARMLESS = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "id2label",
        "initializer_range",
        "intermediate_size",
        "is_decoder",
        "is_llama_config",
        "label2id",
        "max_length",
        "max_position_embeddings",
        "max_sequence_length",
        "model_type",
        "name_or_path",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "pad_token_id",
        "pretraining_tp",
        "rms_norm_eps",
        "return_dict",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
        "vocab_size",
    }
)
"""Keys of config.json that are read here, or change no logits. Others are refused unless they are null or OFF."""

OFF = frozenset(
    {
        "attention_bias",
        "mlp_bias",
        "output_attentions",
        "output_hidden_states",
        "rope_interleaved",
        "use_sliding_window",
    }
)
"""Keys that change nothing if they are false; others may: `is_causal`."""

LARGEST = 1 << 24
"""Of any size or count; the rotary table alone would take gigabytes."""

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def from_hf_config(data: Any, where: object) -> ModelConfig:
    """The ModelConfig of a `config.json`; what it leaves out has the default of transformers' LlamaConfig.

    Raises:
        InputError: naming everything that is missing, mistyped, or not in this architecture.
    """
    if not isinstance(data, dict):
        found, do = type(data).__name__, "get the file again"
        raise InputError("not a configuration", expected="a JSON object", found=found, where=where, do=do)
    problems = [f"missing: {key}" for key in REQUIRED if key not in data]
    if data.get("model_type") != "llama":
        problems.append(f"model_type: expected 'llama', found {data.get('model_type')!r}")
    if data.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act: expected 'silu', found {data['hidden_act']!r}")
    for key in sorted(data.keys() - HARMLESS):
        value = data[key]
        all_full = key == "layer_types" and isinstance(value, list) and all(x == "full_attention" for x in value)
        if not (value is None or all_full or (value is False and key in OFF) or (value is True and key == "is_causal")):
            problems.append(f"{key[:60]}: {str(data[key])[:60]} is not in this architecture")
    theta, scaling = _rope(data, problems)

    def number(key: str, default: Any, kind: type) -> Any:
        value = default if data.get(key) is None else data[key]
        fits: bool = isinstance(value, (int, float) if kind is float else kind)
        if isinstance(value, bool) is not (kind is bool) or not fits:
            if key in data:  # otherwise it is missing, which has been said
                problems.append(f"{key}: expected {kind.__name__}, found {repr(value)[:60]}")
            return kind(1)
        if kind is int and value > LARGEST:
            problems.append(f"{key}: expected at most {LARGEST}, found {str(value)[:60]}")
        if kind is float and not abs(value) <= sys.float_info.max:
            problems.append(f"{key}: expected a finite number")
            return 1.0
        return kind(value)

    fields = {
        "vocab_size": number("vocab_size", None, int),
        "context_length": number("max_position_embeddings", 2048, int),
        "width": number("hidden_size", None, int),
        "n_layers": number("num_hidden_layers", None, int),
        "n_heads": number("num_attention_heads", None, int),
        "n_kv_heads": number("num_key_value_heads", data.get("num_attention_heads"), int),
        "head_dim": number("head_dim", 0, int) or None,
        "hidden": number("intermediate_size", None, int),
        "tie_embeddings": number("tie_word_embeddings", False, bool),
        "norm_eps": number("rms_norm_eps", 1e-6, float),
        "init_std": number("initializer_range", 0.02, float),
    }
    if problems:
        do = "only models of the Llama architecture can be read; correct config.json if it says otherwise of one"
        raise InputError(listed("cannot be read as a Llama model", problems), where=where, do=do)
    try:
        return ModelConfig(**fields, rope_theta=theta, rope_scaling=scaling)
    except InputError as error:
        raise InputError(str(error), where=where) from error


def _rope(data: dict[str, Any], problems: list[str]) -> tuple[float, RopeScaling | None]:
    """rope_theta and rope_scaling as transformers 4 writes them, or rope_parameters as 5 does; both if they agree."""
    found: list[tuple[float, RopeScaling | None]] = []
    old, new = data.get("rope_scaling"), data.get("rope_parameters")
    for key, rope in (("rope_scaling", old), ("rope_parameters", new)):
        if rope is None and (key == "rope_parameters" or new is not None):
            continue
        rope = {} if rope is None else rope
        if not isinstance(rope, dict):
            problems.append(f"{key}: expected an object, found {rope!r}")
            continue
        kind = next((rope[key] for key in ("rope_type", "type") if rope.get(key) is not None), "default")
        thetas = [x for x in (rope.get("rope_theta"), data.get("rope_theta")) if x is not None] or [10_000.0]
        theta = thetas[0]
        if thetas[-1] != theta:
            problems.append(f"rope_theta: {data['rope_theta']!r}, but {theta!r} in {key}")
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        values = [theta, *(rope.get(name) for name in names if kind == "llama3")]
        if kind not in ("default", "llama3"):
            problems.append(f"{key}: rope_type {kind!r} is not in this architecture (default or llama3)")
        elif any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in values):
            problems.append(f"{key}: expected numbers for rope_theta{' and ' + ', '.join(names) * (kind == 'llama3')}")
        elif not all(0 < x <= sys.float_info.max for x in values) or (kind == "llama3" and not values[2] < values[3]):
            problems.append(f"{key}: expected numbers above 0, low_freq_factor < high_freq_factor, found {values}")
        elif kind == "llama3" and values[4] != int(values[4]):
            problems.append(f"{key}: expected a whole original_max_position_embeddings, found {values[4]}")
        else:
            factor, low, high, length = values[1:] or (0, 0, 0, 0)
            scaling = RopeScaling(factor, low, high, int(length)) if kind == "llama3" else None
            found.append((float(theta), scaling))
        for name in sorted(rope.keys() - {"rope_type", "type", "rope_theta", *(names if kind == "llama3" else ())}):
            if rope[name] is not None and not (name == "partial_rotary_factor" and rope[name] == 1):
                problems.append(f"{key}.{name}: {rope[name]!r} is not in this architecture")
    if len(set(found)) > 1:
        problems.append(f"rope_scaling and rope_parameters differ: {found[0]} and {found[1]}")
    return found[0] if found else (1.0, None)


@dataclass(frozen=True)
class HFCheckpoint:
    """A folder that has been looked at, but whose weights have not been read."""

    folder: Path
    config: ModelConfig
    files: dict[str, Path]
    """Where each parameter is, in the order of the table."""

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every parameter, one at a time: float64 as it is, smaller types as float32, which holds them exactly.

        Raises:
            InputError: a tensor has numbers that are not finite, or a file is damaged.
        """
        for name, path in self.files.items():
            yield name, checked_weight(read_tensor(path, name), name, path)

    def write_tokenizer(self, folder: Path) -> None:
        """Copies the tokenizer's files; special ids that only config.json has become a generation_config.json."""
        copy_tokenizer(self.folder, folder)
        config = _read_json(self.folder / "config.json")
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
        if ids and not (folder / GENERATION_CONFIG).is_file():
            (folder / GENERATION_CONFIG).write_text(json.dumps(ids) + "\n")


def open_hf(folder: Path) -> HFCheckpoint:
    """Reads the configuration and the headers of a checkpoint's files, and compares every name, shape and dtype.

    Raises:
        InputError: it is no such folder, or damaged, or has what this architecture cannot express.
    """
    if not folder.exists():
        raise InputError("no such folder", expected="a Hugging Face checkpoint", where=folder, do="check the path")
    if not (folder / "config.json").is_file():
        do = "give the folder of a downloaded checkpoint (config.json, *.safetensors)"
        raise InputError("not a Hugging Face checkpoint", expected="config.json", where=folder, do=do)
    data = _read_json(folder / "config.json")
    config = from_hf_config(data, folder / "config.json")
    read_generation_config(folder)
    check_special_ids(data, folder / "config.json")
    layout: dict[str, tuple[tuple[int, ...], str]] = {}
    files: dict[str, Path] = {}
    for path, expected in _shards(folder).items():
        found = safetensors_layout(path)
        if lost := (expected or set()) - found.keys():
            problem, do = "a shard lacks tensors that the index says are in it", "get the shard and the index again"
            raise InputError(problem, found=sorted(lost)[:5], where=path, do=do)
        if expected is not None and (more := found.keys() - expected):
            problem, do = "a shard has tensors that the index does not name", "get the shard and the index again"
            raise InputError(problem, found=sorted(more)[:5], where=path, do=do)
        for name in sorted(found):
            layout[name], files[name] = found[name], path
    if wrong := [f"{name}: {dtype}" for name, (_, dtype) in layout.items() if dtype not in DTYPES]:
        problem = "quantised or integer weights are not in this architecture:\n  " + "\n  ".join(wrong[:8])
        raise InputError(problem, expected=", ".join(DTYPES), where=folder, do="use the checkpoint's 16-bit original")
    if config.n_layers > len(layout):  # before tables of that size are made
        do = "get config.json and the weights again, of one model"
        raise InputError("more layers than tensors", expected=f"{config.n_layers} layers", where=folder, do=do)
    _drop_redundant(config, layout, files, folder)
    check_shapes(config, {name: shape for name, (shape, _) in layout.items()}, folder)
    return HFCheckpoint(folder, config, {name: files[name] for name in param_table(config)})


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """The files of a checkpoint, and what the index expects in each (None: there is no index)."""
    index = folder / "model.safetensors.index.json"
    if index.is_file() and (folder / "model.safetensors").is_file():
        do = "remove the one that is out of date"
        raise InputError("both an index of shards and a model.safetensors", where=folder, do=do)
    if not index.is_file():
        if (folder / "model.safetensors").is_file():
            return {folder / "model.safetensors": None}
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
        do = "pickled weights (*.bin, *.pt) may run code: save them as safetensors"
        raise InputError("no weights", expected="*.safetensors", found=found, where=folder, do=do)
    data = _read_json(index)
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError("damaged index", expected="weight_map: tensor -> file", where=index, do="get the file again")
    by_file: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            expected = "names of *.safetensors files in this folder"
            do = "do not trust this checkpoint; get it again from its source"
            raise InputError("the index leads elsewhere", expected=expected, found=file[:200], where=index, do=do)
        by_file.setdefault(folder / file, set()).add(name)
    if missing := [path.name for path in by_file if not path.is_file()]:
        raise InputError("missing shards", found=", ".join(missing), where=folder, do="download the rest")
    return {**by_file}


def _drop_redundant(config: ModelConfig, layout: dict[str, Any], files: dict[str, Path], where: Path) -> None:
    """Leaves out a tied model's copy of its head, and buffers of the rotary frequencies, if they are what they must be.

    Raises:
        InputError: they are not.
    """
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_embeddings and head in layout and layout[head] == layout.get(embedding):
        if not np.array_equal(read_tensor(files[head], head), read_tensor(files[embedding], embedding)):
            do = 'set "tie_word_embeddings": false in config.json if the head is its own'
            raise InputError("a tied model whose head differs from its embedding", where=where, do=do)
        del layout[head]
    for name in [name for name in layout if name.endswith("rotary_emb.inv_freq")]:
        own = read_tensor(files[name], name).astype(np.float64)
        expected = inverse_frequencies(config)
        if own.shape != expected.shape or not np.allclose(own, expected, rtol=1e-2):
            do = "correct rope_theta or rope_scaling in config.json"
            raise InputError(
                "the file's rotary frequencies are not those of its config", found=name, where=where, do=do
            )
        del layout[name]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        do = "check its permissions" if isinstance(error, PermissionError) else "get the file again"
        raise InputError("damaged JSON", found=str(error)[:200], where=path, do=do) from error


def write_hf_weights(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the weights, rounded to `dtype`, in files of at most shard_bytes."""
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
    for file, layout in zip(names, shards, strict=True):
        stream_safetensors(folder / file, layout, ((name, weights[name]) for name in layout))
    if len(shards) > 1:
        total = sum(math.prod(spec.shape) for spec in param_table(config).values()) * itemsize
        weight_map = {name: file for file, layout in zip(names, shards, strict=True) for name in layout}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def to_hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` with which `transformers` builds the same model (LlamaForCausalLM)."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_context_length,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.resolved_head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # read by transformers 4
        "rope_scaling": rope if config.rope_scaling is not None else None,
        "rope_parameters": rope,  # read by transformers 5
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": config.init_std,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "dtype": dtype,
        "torch_dtype": dtype,  # read by transformers 4
    }


def write_hf_config(path: Path, config: ModelConfig, dtype: str) -> None:
    path.write_text(json.dumps(to_hf_config(config, dtype), indent=1) + "\n")
