"""The neutral format between frameworks: safetensors in Hugging Face's names, and Hugging Face's config.json."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from minillm_core.config import ModelConfig
from minillm_core.errors import InputError
from minillm_core.tokenizer import BOS_ID, EOS_ID, PAD_ID


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, {"format": "pt"})


def read_safetensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of a file, one at a time.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError("missing or damaged safetensors file", found=error, where=path) from error


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
