"""Mini-LLM in JAX: Flax NNX, optax, Orbax. Same files, same names, same numbers as minillm_torch."""

from minillm_jax.attention import describe_attention
from minillm_jax.checkpoint import FRAMEWORK, from_weights, load, open_weights, read_payload, write_payload
from minillm_jax.cost import count_forward_flops, count_params
from minillm_jax.device import describe_device
from minillm_jax.generate import Generator
from minillm_jax.kv_cache import KVCache, init_cache
from minillm_jax.loss import make_eval_step
from minillm_jax.model import MiniLLM, abstract_model
from minillm_jax.precision import auto_dtype
from minillm_jax.tracing import trace
from minillm_jax.train import (
    export_state,
    import_state,
    init_state,
    make_train_step,
    model_of,
    start_payload,
)
from minillm_jax.weights import build_model, to_canonical

__all__ = [
    "FRAMEWORK",
    "Generator",
    "KVCache",
    "MiniLLM",
    "abstract_model",
    "auto_dtype",
    "build_model",
    "count_forward_flops",
    "count_params",
    "describe_attention",
    "describe_device",
    "export_state",
    "from_weights",
    "import_state",
    "init_cache",
    "init_state",
    "load",
    "make_eval_step",
    "make_train_step",
    "model_of",
    "open_weights",
    "read_payload",
    "start_payload",
    "to_canonical",
    "trace",
    "write_payload",
]
