"""Parameter and FLOP counts of a model of any size, from the framework's abstract model: no array is allocated."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from minillm_core.config import ModelConfig
from minillm_torch.model import abstract_model


def count_params(config: ModelConfig) -> int:
    """Number of parameters of the model that this framework builds."""
    return sum(param.numel() for param in abstract_model(config).parameters())


def count_forward_flops(config: ModelConfig, batch: int, seq_len: int) -> int:
    """Operations of the matrix products in one forward pass, as traced by this framework (a multiply-add is 2)."""
    tokens_BT = torch.zeros((batch, seq_len), dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        abstract_model(config)(tokens_BT)
    return counter.get_total_flops()
