"""What a configuration of any size costs, without allocating its arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

from minillm_core.config import RunConfig
from minillm_core.errors import InputError
from minillm_core.model.params import count_params, forward_flops
from minillm_core.training.backend import Backend


@dataclass(frozen=True)
class Plan:
    """The cost of a configuration."""

    n_params: int
    flops_per_token: float
    """Of training: forward and backward."""
    weights_bytes: int
    """In float32."""
    training_bytes: int
    """Weights, gradients and two Adam moments in float32, without activations."""
    activation_bytes: int
    """What PyTorch keeps of one micro-batch for the backward pass, in bfloat16 with fused attention. JAX keeps less."""
    cache_bytes: int
    """The keys and values of one full context, in bfloat16."""


def plan(config: RunConfig, backends: Sequence[Backend] = ()) -> Plan:
    """Counts parameters, operations and memory.

    Args:
        backends: frameworks that build the model abstractly; their own counts must agree.

    Raises:
        InputError: the counts of a framework differ.
    """
    model, seq_len = config.model, config.train.seq_len
    counted = count_params(model), forward_flops(model, 1, seq_len)
    for backend in backends:
        found = backend.count_params(model), backend.count_forward_flops(model, 1, seq_len)
        if found != counted:
            raise InputError(f"the counts of {backend.FRAMEWORK} differ", expected=counted, found=found)
    cache = 2 * 2 * model.n_layers * model.n_kv_heads * model.resolved_head_dim * model.context_length
    flops = 3 * counted[1] / seq_len
    return Plan(counted[0], flops, 4 * counted[0], 16 * counted[0], activation_bytes(config), cache)


def activation_bytes(config: RunConfig) -> int:
    """Bytes that PyTorch keeps of one micro-batch for the backward pass, in bfloat16 with fused attention.

    Per token and layer: gate, up, their activation and product; the input and the normalised input of both norms in
    float32, and their outputs; rotated q and k, v, the attention's output and its log-sum-exp. With `train.remat` only
    the input of every layer is kept, and everything of one layer while it is recomputed. The output head keeps the
    gradient of its input; its logits come in chunks that do not depend on the size of the batch.
    """
    model, c = config.model, config.train
    Q, KV = model.n_heads * model.resolved_head_dim, model.n_kv_heads * model.resolved_head_dim
    norm = 4 * 2 * model.width + 4 + 2 * model.width
    block = 2 * 4 * model.hidden + 2 * norm + 2 * (Q + KV) + 2 * KV + 2 * Q + 4 * model.n_heads
    blocks = 2 * model.width * model.n_layers + block if c.remat else block * model.n_layers
    return c.batch_size // c.grad_accum * c.seq_len * (blocks + norm)
