"""Runs a Hugging Face folder with transformers' Llama or Mistral; records its stages under this project's names."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from minillm_core.config import ModelConfig
from minillm_core.doctor.subjects import Engine, Run
from minillm_core.errors import InputError, missing_package
from minillm_core.model.rope import inverse_frequencies
from minillm_core.model.stages import Trace, stage_names
from minillm_core.tensors import Tensors


def transformers_run(folder: Path) -> Run:
    """A function that loads a folder with `from_pretrained` and runs it; in float64, without transformers' casts.

    Raises:
        InputError: transformers or torch is not installed.
    """
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_package(
            error, "transformers", where=folder, otherwise="or import the folder with hf->jax, and compare that run"
        ) from error
    return partial(_run, folder)


def transformers_encoder(folder: Path) -> Callable[[str], list[int]]:
    """AutoTokenizer of a folder, as a function from text to ids. It adds the tokens that start a document, but not
    those that end one. Text that looks like a special token is encoded as text.

    Raises:
        InputError: AutoTokenizer cannot load the folder.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
        plain, framed = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    except Exception as error:  # the packages raise many types of errors
        raise InputError("AutoTokenizer cannot load the tokenizer", found=str(error)[:200], where=folder) from error
    n_after = len(framed) - len(plain) - framed.index(plain[0]) if plain else 0

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text).input_ids
        return ids[: len(ids) - n_after]

    return encode


def _run(folder: Path, config: ModelConfig, weights: Tensors, tokens_BT: np.ndarray, dtype: str) -> Trace:
    import torch
    from torch.nn import functional as F
    from transformers.utils import logging

    logging.disable_progress_bar()
    model_class = getattr(_modeling(config), f"{_prefix(config)}ForCausalLM")
    model = model_class.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
    model.model.embed_tokens.padding_idx = None  # if set, look-ups of the padding token would get no gradient
    tokens = torch.from_numpy(tokens_BT).long()
    recorded: dict[str, torch.Tensor] = {}
    with without_casts(config) if dtype == "float64" else ExitStack(), _recording(model, config, recorded):
        logits_BTV = model(tokens).logits
    recorded["logits"] = logits_BTV
    high = torch.promote_types(logits_BTV.dtype, torch.float32)
    log_probs_BTV = torch.log_softmax(logits_BTV[:, :-1].to(high), dim=-1)
    losses_BT = F.nll_loss(log_probs_BTV.transpose(1, 2), tokens[:, 1:], reduction="none")
    losses_BT.mean().backward()
    gradients = {name: param.grad.to(high).numpy() for name, param in model.named_parameters()}
    stages = {
        name: recorded[name].detach().double().numpy().reshape(*tokens_BT.shape, -1) for name in stage_names(config)
    }
    return Trace(stages, losses_BT.detach().double().numpy(), gradients)


def _prefix(config: ModelConfig) -> str:
    """transformers has the sliding window only in Mistral, whose code is otherwise Llama's."""
    return "Llama" if config.sliding_window is None else "Mistral"


def _modeling(config: ModelConfig) -> Any:
    """The module of transformers that has the model."""
    name = _prefix(config).lower()
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


@contextmanager
def _recording(model: Any, config: ModelConfig, recorded: dict[str, Any]) -> Iterator[None]:
    """Records the output of every module, and q and k after their rotation."""
    modeling = _modeling(config)
    rotate, layer = modeling.apply_rotary_pos_emb, iter(range(config.n_layers))

    def rotate_and_keep(*inputs: Any, **options: Any) -> Any:
        name, rotated = f"model.layers.{next(layer)}.self_attn", rotate(*inputs, **options)
        recorded.update({f"{name}.{part}": x.transpose(1, 2) for part, x in zip("qk", rotated, strict=True)})
        return rotated

    def keep(name: str, module: Any, inputs: Any, output: Any) -> None:
        if name.endswith(".v_proj"):
            name, output = name.removesuffix("_proj"), output.unflatten(-1, (-1, config.resolved_head_dim))
        recorded[name] = output[0] if isinstance(output, tuple) else output

    hooks = [module.register_forward_hook(partial(keep, name)) for name, module in model.named_modules()]
    with patch.object(modeling, "apply_rotary_pos_emb", rotate_and_keep):
        yield
    for hook in hooks:
        hook.remove()


@contextmanager
def without_casts(config: ModelConfig) -> Iterator[None]:
    """Removes the two hard-coded float32 casts of transformers' Llama: in RMSNorm and in the rotary angles."""
    import torch

    modeling, prefix = _modeling(config), _prefix(config)

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    frequencies = torch.from_numpy(inverse_frequencies(config))

    def rotary(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own = self.inv_freq.double().to(frequencies.device)  # used if it differs by more than float32 rounding
        exact = frequencies if torch.allclose(own, frequencies, rtol=1e-6, atol=0) else own
        angles = position_ids[..., None].double() * exact
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    with (
        patch.object(getattr(modeling, f"{prefix}RMSNorm"), "forward", norm),
        patch.object(getattr(modeling, f"{prefix}RotaryEmbedding"), "forward", rotary),
    ):
        yield


TRANSFORMERS = Engine("transformers", transformers_run, transformers_encoder)
"""Runs Hugging Face folders."""
