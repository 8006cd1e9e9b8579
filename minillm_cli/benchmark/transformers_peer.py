"""Hugging Face's transformers as a peer: Llama of the same shape and weights, eager, with the usual settings."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minillm_cli.benchmark.cases import Case
from minillm_cli.benchmark.engines import Round, padded
from minillm_core.errors import InputError
from minillm_core.interop.hf_config import to_hf_config
from minillm_core.model.params import init_params


def make_round(case: Case) -> Round:
    """See engines.make_round. Training has float32 weights, bfloat16 by autocast, and a fused AdamW that decays only
    matrices."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _model(case, device)
    if case.work == "train":
        return _training(model, case, device)
    ids, mask = (torch.from_numpy(array).to(device) for array in padded(case.prompts()))

    @torch.inference_mode()
    def prefill() -> None:
        out = model(ids, use_cache=True, logits_to_keep=1)
        float(out.logits[0, 0, 0])  # waits

    def decode() -> None:
        options = {"min_new_tokens": case.repeats, "max_new_tokens": case.repeats, "pad_token_id": 0}
        out = model.generate(ids, attention_mask=mask, do_sample=False, **options)
        assert out.shape == (case.rows, ids.shape[1] + case.repeats)
        int(out[0, -1])  # waits

    return prefill if case.work == "prefill" else decode


def _model(case: Case, device: torch.device) -> Any:
    if case.config.model.sliding_window is not None:
        hint = "leave out --peers transformers"
        raise InputError("transformers' Llama has no sliding window", found="model.sliding_window", hint=hint)
    torch.set_float32_matmul_precision("highest")  # float32 products are float32 in every engine
    trains = case.work == "train"
    dtype = torch.float32 if trains else getattr(torch, case.dtype)
    fields = to_hf_config(case.config.model, str(dtype).removeprefix("torch."))
    model: Any = LlamaForCausalLM(
        LlamaConfig(**{k: v for k, v in fields.items() if k not in ("architectures", "model_type")})
    )
    weights = init_params(case.config.model, case.config.train.seed)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, strict=False)
    model.model.embed_tokens.padding_idx = None  # if set, look-ups of the padding token would get no gradient
    model.generation_config.eos_token_id = None
    for param in model.parameters():  # not the buffers: rotary frequencies stay in float32, as after from_pretrained
        param.data = param.data.to(dtype)
    return model.to(device).train(trains)


def _training(model: Any, case: Case, device: torch.device) -> Round:
    optim, n_micro = case.config.optim, case.config.train.grad_accum
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
    ]
    betas = (optim.beta1, optim.beta2)
    optimizer = torch.optim.AdamW(groups, lr=optim.learning_rate, betas=betas, eps=optim.eps, fused=True)
    rows = torch.from_numpy(case.batch_rows()).long()

    def precision() -> AbstractContextManager[object]:
        return torch.autocast(device.type, torch.bfloat16) if case.dtype == "bfloat16" else nullcontext()

    def step() -> torch.Tensor:
        total = torch.zeros((), device=device)
        for micro in rows.chunk(n_micro):
            tokens = micro.to(device)
            with precision():
                logits = model(tokens[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()) / n_micro
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(params, optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    def train() -> float:
        for _ in range(case.repeats):
            loss = step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return float(loss)

    return train
