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
    return Plan(counted[0], 3 * counted[1] / seq_len, 4 * counted[0], 16 * counted[0], cache)
