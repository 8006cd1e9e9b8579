"""Converts a Hugging Face config.json of the Llama architecture to a ModelConfig, and back. With a sliding window it is
the Mistral architecture, which is otherwise the same.

What transformers loads with the same logits is read: a key changes logits only if transformers reads it while it builds
or runs such a model. Those keys are read here or refused by name (NEUTRAL); every other key is passed over.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from minillm_core.config import ModelConfig, RopeScaling
from minillm_core.errors import InputError, listed
from minillm_core.text.tokenizer import BOS_ID, EOS_ID, PAD_ID

logger = logging.getLogger(__name__)

READ = frozenset(
    {
        "head_dim",
        "hidden_act",
        "hidden_size",
        "initializer_range",
        "intermediate_size",
        "max_position_embeddings",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "original_max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "tie_word_embeddings",
        "vocab_size",
    }
)
"""Keys of config.json that become a ModelConfig."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, True),  # biases of the file must be zero
    "attention_chunk_size": (),
    "decoder": (),
    "default_rope_type": (),
    "default_theta": (),
    "fusion_config": (),
    "generator": (),
    "ignore_keys_at_rope_validation": (),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "is_heterogeneous": (False,),
    "kv_sharing_modes": (),
    "layer_types": (),
    "mlp_bias": (False, True),
    "mtp_layer_types": (),
    "num_heads": (),
    "partial_rotary_factor": (1, 1.0),
    "per_layer_config": (),
    "quantization_config": (),
    "sliding_window": (),
    "sub_configs": (),
    "sub_configs_defaults": (),
    "text_config": (),
    "transformers_weights": (),
}
"""Other keys that transformers reads for such a model and that may change its logits -> the values, besides null, with
which they do not."""

ORDINARY = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "is_decoder",
        "is_llama_config",
        "label2id",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "return_dict",
        "tokenizer_class",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
        "use_sliding_window",
    }
    # settings of generation and of training, which transformers 4 wrote here too
    | {"do_sample", "max_length", "max_sequence_length", "min_length", "num_beams", "repetition_penalty", "temperature"}
    | {"top_k", "top_p", "chunk_size_feed_forward", "problem_type", "pruned_heads", "torchscript", "use_bfloat16"}
)
"""Keys that are passed over without a word."""


LARGEST = 1 << 24
"""Upper bound of every size and count. With a larger one, the rotary table alone would take gigabytes."""


DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {
        "intermediate_size": 14336,
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}
COMMON_DEFAULTS = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
"""What transformers takes for a missing key: a configuration may leave out what equals its default."""


def from_hf_config(data: Any, where: object) -> ModelConfig:
    """The ModelConfig of a `config.json`. Missing keys get the defaults of transformers.

    Raises:
        InputError: keys have a wrong type, or are not supported by this architecture. One message lists them all.
    """
    if not isinstance(data, dict):
        found, hint = type(data).__name__, "get the file again"
        raise InputError("not a configuration", expected="a JSON object", found=found, where=where, hint=hint)
    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in DEFAULTS:
        problem = "the configuration cannot be read as a Llama or Mistral model:\n  "
        problem += f"model_type: expected 'llama' or 'mistral', found {repr(model_type)[:60]}"
        raise InputError(problem, where=where, hint="use a model of one of these architectures")
    given, data = data.keys(), COMMON_DEFAULTS | DEFAULTS[model_type] | data
    problems = []
    if data.get("hidden_act", "silu") not in ("silu", "swish"):
        problems.append(f"hidden_act: expected 'silu', found {repr(data['hidden_act'])[:60]}")
    for key in sorted(NEUTRAL.keys() & data.keys()):
        value = data[key]
        is_read = key == "sliding_window" and model_type == "mistral"
        all_full = key == "layer_types" and isinstance(value, list) and all(x == "full_attention" for x in value)
        if not (is_read or all_full or value is None or value in NEUTRAL[key]):
            problems.append(f"{key}: {str(value)[:60]} is not supported by this architecture")
    if data.get("auto_map"):
        logger.warning(f"{where}: the model's own code (auto_map) is not run; with it, a model may give other logits")
    if strange := sorted(given - READ - NEUTRAL.keys() - ORDINARY - {"auto_map"}):
        names = ", ".join(key[:60] for key in strange[:8]) + " ..." * (len(strange) > 8)
        logger.warning(f"{where}: transformers does not read these keys for such a model, so they are ignored: {names}")
    theta, scaling = _rope(data, problems)

    def number(key: str, default: Any, kind: type) -> Any:
        value = default if data.get(key) is None else data[key]
        fits: bool = isinstance(value, (int, float) if kind is float else kind)
        if isinstance(value, bool) is not (kind is bool) or not fits:
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
        "sliding_window": None,
        "norm_eps": number("rms_norm_eps", 1e-6, float),
        "init_std": number("initializer_range", 0.02, float),
    }
    if model_type == "mistral" and data["sliding_window"] is not None:
        fields["sliding_window"] = number("sliding_window", None, int)
    if problems:
        hint = "use a model of the Llama or Mistral architecture; if this is one, correct its config.json"
        problem = "the configuration cannot be read as a Llama or Mistral model"
        raise InputError(listed(problem, problems), where=where, hint=hint)
    try:
        return ModelConfig(**fields, rope_theta=theta, rope_scaling=scaling)
    except InputError as error:
        raise InputError(str(error), where=where) from error


def _rope(data: dict[str, Any], problems: list[str]) -> tuple[float, RopeScaling | None]:
    """rope_theta and rope_scaling, from the keys of transformers 4 or from rope_parameters (transformers 5).

    If both forms are present, they must agree. Adds to `problems` instead of raising.
    """
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
        if kind == "llama3":  # transformers prefers a length outside of this object
            lengths = (data.get(names[3]), rope.get(names[3]), data.get("max_position_embeddings"))
            rope = rope | {names[3]: next((x for x in lengths if x is not None), None)}
        values = [theta, *(rope.get(name) for name in names if kind == "llama3")]
        if kind not in ("default", "llama3"):
            problems.append(f"{key}: rope_type {kind!r} is not supported by this architecture (default or llama3)")
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
        for name in sorted(map(str, rope)):  # transformers ignores the keys of other types, except a nested object
            is_partial = name == "partial_rotary_factor" and rope[name] not in (None, 1)
            if is_partial or isinstance(rope[name], dict):
                problems.append(f"{key}.{name}: {str(rope[name])[:60]} is not supported by this architecture")
    if len(set(found)) > 1:
        problems.append(f"rope_scaling and rope_parameters differ: {found[0]} and {found[1]}")
    return found[0] if found else (1.0, None)


def to_hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` from which `transformers` builds the same model: LlamaForCausalLM, or MistralForCausalLM if it
    has a sliding window."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_context_length,
        }
    window = {} if config.sliding_window is None else {"sliding_window": config.sliding_window}
    return window | {
        "architectures": ["LlamaForCausalLM" if config.sliding_window is None else "MistralForCausalLM"],
        "model_type": "llama" if config.sliding_window is None else "mistral",
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
    path.write_text(json.dumps(to_hf_config(config, dtype), indent=1) + "\n", encoding="utf-8")
