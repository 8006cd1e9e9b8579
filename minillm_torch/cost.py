"""What a model of any size costs, counted on the framework's own abstract model: nothing is allocated."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from minillm_core.config import ModelConfig
from minillm_torch.model import abstract_model


def count_params(config: ModelConfig) -> int:
    """Parameters of the model as this framework builds it."""
    return sum(param.numel() for param in abstract_model(config).parameters())


def count_forward_flops(config: ModelConfig, batch: int, seq_len: int) -> int:
    """Operations of the matrix products of one forward pass as this framework traces it (a multiply-add is 2)."""
    tokens_BT = torch.zeros((batch, seq_len), dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        abstract_model(config)(tokens_BT)
    return counter.get_total_flops()
