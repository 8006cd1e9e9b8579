"""GGUF, the format of llama.cpp: writes Llama models, and reads them with dequantised weights.

Features that this architecture cannot express are refused by name: a `llama.` key is ignored only if it is known to
change no logits. (llama.cpp reads no other keys for the model.)
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minillm_core.config import ModelConfig, RopeScaling
from minillm_core.errors import InputError, listed
from minillm_core.interop.gguf_file import GGUFFile, gguf_package, read_gguf
from minillm_core.interop.gguf_tokenizer import tokenizer_files
from minillm_core.interop.safetensors_files import checked_weight, parts, rounded
from minillm_core.model.params import check_shapes, count_params, param_table
from minillm_core.model.rope import half_split, interleaved, inverse_frequencies
from minillm_core.progress import progress

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Part of a canonical name -> the same part in llama.cpp."""

FACTORS = "rope_freqs.weight"
"""The tensor of the factors by which Llama 3's RoPE scaling divides each frequency."""

SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_context_length")
"""The fields of this project's `minillm.rope_scaling.` keys. They cannot be recovered from the factors."""

SIZES = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count")
READ = {
    *SIZES,
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "vocab_size",
    "tensor_data_layout",
}
"""`llama.` keys that are read here, or that change no logits."""

OFF: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scale_linear": (1.0,),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.type": ("none",),
    "use_parallel_residual": (False,),
}
"""`llama.` keys that change no logits if they have one of these values."""

FILE_TYPES = {"float32": 0, "float16": 1, "q8_0": 7, "bfloat16": 32}
"""dtype of the weights -> its number in llama.cpp (`general.file_type`)."""


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`."""
    for ours, theirs in NAMES.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}(?=\.)", rf"\g<1>{theirs}", name)
    return name


@dataclass(frozen=True)
class GGUFCheckpoint:
    """A file whose header has been checked, and whose weights have not been read yet."""

    file: GGUFFile
    config: ModelConfig

    @property
    def folder(self) -> Path:
        return self.file.path.parent

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every parameter by canonical name, one at a time, as float32.

        Raises:
            InputError: a tensor has values that are not finite.
        """
        for name in param_table(self.config):
            array = checked_weight(self.file.read(gguf_name(name)), gguf_name(name), self.file.path)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                array = half_split(array, self.config.resolved_head_dim)
            yield name, array

    def write_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer's files, made from the keys of the GGUF file.

        Raises:
            InputError: the file has no tokenizer, or one of an unsupported kind.
        """
        for name, content in tokenizer_files(self.file.fields, self.file.path).items():
            (folder / name).write_bytes(content)


def open_gguf(path: Path) -> GGUFCheckpoint:
    """Reads the header of a file, and checks the name and shape of every tensor.

    Raises:
        InputError: the file is not a GGUF file, is damaged, or has features that this architecture cannot express.
    """
    if path.is_dir():
        found = ", ".join(sorted(file.name for file in path.glob("*.gguf"))[:8]) or None
        raise InputError(
            "the path is a folder",
            expected="one .gguf file",
            found=found,
            where=path,
            hint="give the path of a .gguf file",
        )
    file = read_gguf(path)
    config = _read_config(file)
    if config.n_layers > len(file.tensors):  # before a table of that size is built
        hint = "get the file again"
        raise InputError("more layers than tensors", expected=f"{config.n_layers} layers", where=path, hint=hint)
    back = {gguf_name(name): name for name in param_table(config)}
    shapes = {back.get(name, name): tensor.shape for name, tensor in file.tensors.items() if name != FACTORS}
    check_shapes(config, shapes, path)
    return GGUFCheckpoint(file, config)


def _read_config(file: GGUFFile) -> ModelConfig:
    fields = file.fields
    architecture, kind = (str(fields.get(f"general.{key}", "model"))[:60] for key in ("architecture", "type"))
    if (architecture, kind) != ("llama", "model"):
        found = f"general.architecture {architecture!r}, general.type {kind!r}"
        problem, hint = "not a model of the Llama architecture", "use a model of the Llama architecture"
        raise InputError(problem, expected="'llama'", found=found, where=file.path, hint=hint)
    parts = fields.get("split.count", 1)
    if type(parts) is not int or parts > 1:
        found = f"{str(parts)[:20]} parts"
        hint = "merge the parts first: llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf"
        raise InputError(
            "the file is one part of a split model", expected="one file", found=found, where=file.path, hint=hint
        )
    problems: list[str] = []
    given = {key.removeprefix("llama."): value for key, value in fields.items() if key.startswith("llama.")}
    for key in sorted(given.keys() - READ):
        value = given[key]
        if not any(type(value) is type(off) and value == off for off in OFF.get(key, ())):
            problems.append(f"llama.{key[:60]}: {str(value)[:60]} is not supported by this architecture")

    def size(key: str, default: int = 0) -> int:
        value = given.get(key, default)
        if type(value) is not int or not 0 < value < 1 << 24:
            problems.append(f"llama.{key}: expected a whole number, found {str(value)[:60]}")
            return 1
        return value

    def number(key: str, default: float, own: str) -> float:
        value, exact = given.get(key, default), fields.get(f"minillm.{own}")
        with np.errstate(over="ignore"):
            if type(exact) is type(value) is float and np.float32(exact) == np.float32(value):
                value = exact
        if type(value) is not float or not 0 < value < math.inf:
            problems.append(f"llama.{key}: expected a number above 0, found {str(value)[:60]}")
            return 1.0
        return value

    context_length, width, n_layers, hidden, n_heads = (size(key) for key in SIZES)
    embedding = file.tensors.get(gguf_name("model.embed_tokens.weight"))
    head_dim = size("attention.key_length", width // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if size(key, head_dim) != head_dim:
            problems.append(f"llama.{key}: {given[key]}, but attention.key_length is {head_dim}")
    theta = number("rope.freq_base", 10_000.0, "rope_theta")
    eps = number("attention.layer_norm_rms_epsilon", math.nan, "norm_eps")
    n_kv_heads = size("attention.head_count_kv", n_heads)
    vocab_size = size("vocab_size", embedding.shape[0] if embedding else 0)
    if problems:
        hint = "use a model of the Llama architecture"
        raise InputError(listed("the file cannot be read as a Llama model", problems), where=file.path, hint=hint)
    init_std = fields.get("minillm.init_std")
    extra: dict[str, Any] = {"init_std": init_std} if type(init_std) is float and 0 < init_std < math.inf else {}
    try:
        config = ModelConfig(
            vocab_size=vocab_size,
            context_length=context_length,
            width=width,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            hidden=hidden,
            tie_embeddings=gguf_name("lm_head.weight") not in file.tensors,
            rope_theta=theta,
            norm_eps=eps,
            **extra,
        )
        return _with_scaling(config, file) if FACTORS in file.tensors else config
    except InputError as error:
        raise error if str(file.path) in str(error) else InputError(str(error), where=file.path) from error


def rope_factors(config: ModelConfig) -> np.ndarray:
    """The factors by which Llama 3's RoPE scaling divides each frequency, float64 (H/2,)."""
    unscaled = ModelConfig(**vars(config) | {"rope_scaling": None})
    return inverse_frequencies(unscaled) / inverse_frequencies(config)


def _with_scaling(config: ModelConfig, file: GGUFFile) -> ModelConfig:
    """The configuration with the RoPE scaling that gives the file's factors.

    Candidates are the scaling that this project writes into its own files, and the scaling of Llama 3.1 to 3.3, whose
    `factor` is the largest of the factors.
    """
    shape = file.tensors[FACTORS].shape
    if shape != (config.resolved_head_dim // 2,):
        expected = (config.resolved_head_dim // 2,)
        hint = "get the file again"
        raise InputError(f"wrong shape of {FACTORS}", expected=expected, found=shape, where=file.path, hint=hint)
    factors = file.read(FACTORS)
    own: list[Any] = [file.fields.get(f"minillm.rope_scaling.{name}") for name in SCALING]
    candidates = [RopeScaling(*own)] if [type(value) for value in own] == [float, float, float, int] else []
    if not candidates and (factors == 1).all():
        return config
    largest = float(factors.max())
    candidates += [RopeScaling(largest, 1.0, 4.0, 8192)] if 0 < largest < math.inf else []
    for scaling in candidates:
        scaled = ModelConfig(**vars(config) | {"rope_scaling": scaling})
        with np.errstate(all="ignore"):
            if np.allclose(rope_factors(scaled), factors, rtol=1e-4, atol=0):
                return scaled
    raise InputError(
        f"{FACTORS} is not Llama 3's scaling",
        expected="factors of low_freq_factor 1, high_freq_factor 4, original context 8192",
        found=f"{factors.min():.6g} to {factors.max():.6g}",
        where=file.path,
        hint="import the Hugging Face checkpoint from which the file was made",
    )


def config_fields(config: ModelConfig) -> dict[str, Any]:
    """llama.cpp's keys of a model, and this project's own keys for values that those do not hold exactly, or at all."""
    fields = {
        "llama.context_length": config.context_length,
        "llama.embedding_length": config.width,
        "llama.block_count": config.n_layers,
        "llama.feed_forward_length": config.hidden,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.attention.key_length": config.resolved_head_dim,
        "llama.attention.value_length": config.resolved_head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.dimension_count": config.resolved_head_dim,
        "llama.rope.freq_base": config.rope_theta,
        "llama.vocab_size": config.vocab_size,
        # llama.cpp's keys are float32; ours keep the exact values
        "minillm.rope_theta": config.rope_theta,
        "minillm.norm_eps": config.norm_eps,
        "minillm.init_std": config.init_std,
    }
    if config.rope_scaling is not None:
        factor, low, high, original = astuple(config.rope_scaling)
        values = (float(factor), float(low), float(high), original)
        fields |= {f"minillm.rope_scaling.{name}": x for name, x in zip(SCALING, values, strict=True)}
    return fields


def write_gguf(
    path: Path, config: ModelConfig, weights: Mapping[str, np.ndarray], dtype: str, other_fields: Mapping[str, Any]
) -> list[str]:
    """Writes a file, a part of a tensor at a time.

    Args:
        dtype: precision of the matrices: float32, float16, bfloat16 or q8_0. q8_0 has blocks of 32 values of a row;
            matrices whose rows are not a multiple of 32 are stored as float16. Norms are float32.
        other_fields: further keys: the name of the model, the tokenizer.

    Returns:
        the matrices that are float16 although q8_0 was requested.

    Raises:
        InputError: the model has a sliding window.
    """
    if config.sliding_window is not None:
        found, hint = f"model.sliding_window {config.sliding_window}", "export a Hugging Face folder instead"
        raise InputError("llama.cpp's Llama has no sliding window", found=found, hint=hint)
    gguf = gguf_package()
    kinds = {"float32": gguf.GGMLQuantizationType.F32, "float16": gguf.GGMLQuantizationType.F16}
    kinds |= {"bfloat16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
    dtypes: dict[str, str] = {}
    writer = gguf.GGUFWriter(path, "llama")
    fields = {"general.type": "model", "general.file_type": FILE_TYPES[dtype], "general.quantization_version": 2}
    for key, value in {**fields, **other_fields, **config_fields(config)}.items():
        kind = gguf.GGUFValueType.get_type(value)
        if kind == gguf.GGUFValueType.INT32:
            kind = gguf.GGUFValueType.UINT32
        if kind == gguf.GGUFValueType.FLOAT32 and key.startswith("minillm."):
            kind = gguf.GGUFValueType.FLOAT64
        writer.add_key_value(key, value, kind)

    def add(name: str, shape: tuple[int, ...], dtype: str) -> None:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kinds[dtype]]
        n_bytes = math.prod(shape) // block * block_bytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes, kinds[dtype])

    factors = None if config.rope_scaling is None else rope_factors(config).astype(np.float32)
    if factors is not None:
        add(FACTORS, factors.shape, "float32")
    for name, spec in param_table(config).items():
        fits = dtype != "q8_0" or spec.shape[-1] % 32 == 0
        dtypes[name] = "float32" if len(spec.shape) == 1 else dtype if fits else "float16"
        add(gguf_name(name), spec.shape, dtypes[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as file:  # the package's own writer of arrays does not report a full disk

        def write(arrays: Iterable[np.ndarray]) -> None:
            file.write(bytes(-file.tell() % 32))
            for array in arrays:
                file.write(np.ascontiguousarray(array).view(np.uint8).data)

        def stored(name: str, kind: str) -> Iterator[np.ndarray]:
            array = weights[name]
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                array = interleaved(array, config.resolved_head_dim)
            for part in parts(array):
                yield _stored(gguf, gguf_name(name), part, kind)
                work.advance(part.size)

        if factors is not None:
            write([factors])
        with progress("writing the weights", count_params(config), "value") as work:
            for name, kind in dtypes.items():
                write(stored(name, kind))
        file.write(bytes(-file.tell() % 32))
    return [name for name, kind in dtypes.items() if dtype == "q8_0" and kind == "float16"]


def _stored(gguf: Any, name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """The values in the dtype of the file."""
    if dtype != "q8_0":
        return rounded(name, array, dtype)
    if np.abs(array).max() > 127 * float(np.finfo(np.float16).max):  # a block's scale is a float16
        raise InputError("q8_0 cannot hold the weights", found=name, hint="choose bfloat16 or float32")
    blocks: np.ndarray = gguf.quantize(rounded(name, array, "float32"), gguf.GGMLQuantizationType.Q8_0)
    return blocks
