"""XLA's programs for NVIDIA GPUs, compiled without a GPU: attention is fused, and no array is larger than planned.

The tests marked `compiled` need the extra `cuda`: pytest parity_tests/test_compiled.py -m compiled -n 0
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import jax._src.cudnn.fused_attention_stablehlo as cudnn
import pytest

from minillm_core.config import RunConfig, dump_config, load_config, preset_names
from minillm_core.errors import InputError
from minillm_jax.compiled import CARDS, Program, card, card_device, compile_programs, compile_train_step, materialised
from minillm_jax.compiled.card import standing_in_for
from minillm_jax.compiled.hlo import Costs, read_costs
from minillm_jax.device import target_device
from parity_tests.conftest import ROOT

HAS_CUDA = importlib.util.find_spec("jax_cuda13_plugin") is not None
needs_cuda = [
    pytest.mark.compiled,
    pytest.mark.skipif(not HAS_CUDA, reason="needs JAX's CUDA compiler: pip install -e '.[cuda]'"),
]
for_cuda = pytest.mark.parametrize("preset", [pytest.param(name, marks=needs_cuda) for name in preset_names()])


def checked_config(preset: str) -> RunConfig:
    """A preset as it is, with two exceptions.

    Only mini-llm-50m, whose memory is tested, keeps more than 4 layers: they are all alike, and 80 take minutes to
    compile. The sequence is shortened until no size of the model is a multiple of it, so that a (T, T) array is known
    by its shape.
    """
    config = load_config(preset)
    model, seq_len = config.model, config.train.seq_len
    N, K = model.n_heads, model.n_kv_heads
    heads = {n * model.resolved_head_dim for n in (1, N, K, N + K, N + 2 * K)}
    sizes = {model.width, model.hidden, 2 * model.hidden, model.vocab_size} | heads
    while any(size % seq_len == 0 for size in sizes):
        seq_len = seq_len * 3 // 4
    n_layers = model.n_layers if preset == "mini-llm-50m" else min(4, model.n_layers)
    return replace(config, model=replace(model, n_layers=n_layers), train=replace(config.train, seq_len=seq_len))


def one_layer(**train: Any) -> RunConfig:
    config = checked_config("quickstart")
    return replace(config, model=replace(config.model, n_layers=1), train=replace(config.train, **train))


@lru_cache
def train_step(config: RunConfig) -> Program:
    return compile_train_step(config, "h100")


def arrays(program: Program) -> list[tuple[str, list[int]]]:
    """Dtype and shape of every array that the program stores."""
    shapes = [array.removesuffix("]").split("[") for array in materialised(program.hlo)]
    return [(dtype, [int(dim) for dim in dims.split(",") if dim]) for dtype, dims in shapes]


def scores_or_masks(config: RunConfig) -> list[str]:
    """The stored arrays with an element for every pair of positions; a group of heads may be joined with one axis."""
    T = config.train.seq_len
    return [
        f"{dtype}{dims}"
        for dtype, dims in arrays(train_step(config))
        if T in dims and sum(dim > 0 and dim % T == 0 for dim in dims) >= 2
    ]


def logits_of_all_tokens(config: RunConfig) -> list[str]:
    """The stored float32 arrays, other than weights, that are as large as the logits of one micro-batch."""
    n_tokens = config.train.batch_size // config.train.grad_accum * config.train.seq_len
    V, D = config.model.vocab_size, config.model.width
    return [
        f"{dtype}{dims}"
        for dtype, dims in arrays(train_step(config))
        if dtype == "f32" and prod(dims) >= n_tokens * V and {*dims} != {V, D}
    ]


@for_cuda
def test_attention_is_fused(preset: str) -> None:
    """One call of cuDNN forward (two if blocks are recomputed) and one backward, per layer and micro-batch."""
    config = checked_config(preset)
    program, n_forward = train_step(config), 2 if config.train.remat else 1
    assert program.fused_attention_calls == (n_forward + 1) * config.model.n_layers * config.train.grad_accum
    forward, backward = (program.hlo.count(f'"__cudnn$fmhaSoftmax{which}"') for which in ("", "Backward"))
    assert forward == n_forward * backward > 0


@for_cuda
def test_no_mask_and_no_scores(preset: str) -> None:
    assert scores_or_masks(checked_config(preset)) == []


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=needs_cuda) for name in preset_names() if name != "quickstart"]
)
def test_no_logits_of_all_tokens(preset: str) -> None:
    """In every preset but quickstart, whose 1,024 tokens are one chunk."""
    assert logits_of_all_tokens(checked_config(preset)) == []


@pytest.mark.parametrize(("batch_size", "seq_len", "limit"), [(64, 512, 9e9), (32, 2048, 24e9)])
@pytest.mark.compiled
@needs_cuda[1]
def test_memory_of_mini_llm(batch_size: int, seq_len: int, limit: float) -> None:
    """The second micro-batch is the preset's own."""
    config = load_config("mini-llm-50m")
    train = config.train
    if seq_len == train.seq_len:
        assert batch_size == train.batch_size // train.grad_accum
    else:
        config = replace(config, train=replace(train, batch_size=batch_size, grad_accum=1, seq_len=seq_len))
    plain = train_step(config).temporaries_bytes
    assert plain <= limit
    recomputed = replace(config, train=replace(config.train, remat=True))
    assert train_step(recomputed).temporaries_bytes <= plain / 4


@pytest.mark.compiled
@needs_cuda[1]
def test_a_loop_over_the_blocks() -> None:
    """With `train.scan_layers`, attention stays fused, and recomputed blocks need little memory."""
    config = load_config("mini-llm-50m")
    train = replace(config.train, batch_size=64, seq_len=512, grad_accum=1, scan_layers=True, remat=True)
    config = replace(config, train=train)
    assert train_step(config).fused_attention_calls == 3 * config.model.n_layers
    assert train_step(config).temporaries_bytes <= 1.5e9


@pytest.mark.compiled
@needs_cuda[1]
def test_plain_attention_is_seen() -> None:
    """cuDNN has no float32 attention, so a float32 run shows what these tests must find. The loss of so few tokens is
    computed in one chunk."""
    config = one_layer(compute_dtype="float32")
    assert train_step(config).fused_attention_calls == 0
    assert scores_or_masks(config) != []
    assert logits_of_all_tokens(config) != []


@pytest.mark.parametrize("card", [pytest.param(card, marks=needs_cuda) for card in CARDS if card != "h100"])
def test_cards(card: str) -> None:
    """The compiler accepts the figures of the other cards, and cuDNN's attention is available on all of them."""
    assert compile_train_step(one_layer(), card).fused_attention_calls == 2


@pytest.mark.compiled
@needs_cuda[1]
def test_command(tmp_path: Path) -> None:
    """The command needs no environment variable, and prints one JSON object."""
    file = tmp_path / "small.yaml"
    file.write_text(dump_config(one_layer()))
    environment = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME")}
    command = [sys.executable, "scripts/plan.py", str(file), "--compile", "h100", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)[str(file)]
    assert set(found) == {"train_step", "prefill", "decode_step"}
    assert all(value > 0 for costs in found.values() for key, value in costs.items() if key != "fused_attention_calls")
    assert found["train_step"]["fused_attention_calls"] == 2


@pytest.mark.compiled
@needs_cuda[1]
def test_nothing_is_left_behind() -> None:
    """The device, and the answers to JAX's questions about it, hold while a program is compiled, and no longer."""
    card = card_device("a100")
    names = ("check_cudnn_version", "check_compute_capability", "is_cuda_compute_capability_equal")
    before = [*(getattr(cudnn, name) for name in names), target_device()]
    with contextlib.suppress(KeyboardInterrupt), standing_in_for(card):
        assert target_device() is card
        assert cudnn.check_cudnn_version() == 91000
        assert cudnn.check_compute_capability("8.0")
        assert not cudnn.check_compute_capability("9.0")
        assert cudnn.is_cuda_compute_capability_equal("8.0")
        raise KeyboardInterrupt
    assert before == [*(getattr(cudnn, name) for name in names), target_device()]


def test_unknown_card() -> None:
    with pytest.raises(InputError, match=r"unknown card(?s:.*)expected: a100 or h100 or h200"):
        card_device("v100")


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extra were not installed, also where it is."""

    def no_platform(**_: object) -> None:
        raise NotImplementedError("topology")

    monkeypatch.setattr(card.topologies, "get_topology_desc", no_platform)
    monkeypatch.setattr(card.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"jax\[cuda13\](?s:.*)\[cuda\]"):
        compile_programs(load_config("quickstart"), "h100")


HLO = """
%fused (table: f32[100,8], row: s32[], new: f32[1,8]) -> f32[100,8] {
  %table = f32[100,8]{1,0} parameter(0)
  %row = s32[] parameter(1)
  %new = f32[1,8]{1,0} parameter(2)
  %zero = s32[] constant(0)
  ROOT %updated = f32[100,8]{1,0} dynamic-update-slice(%table, %new, %row, %zero)
}

%body (carry.1: (s32[], f32[100,8], f32[1,8])) -> (s32[], f32[100,8], f32[1,8]) {
  %carry.1 = (s32[], f32[100,8]{1,0}, f32[1,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry.1), index=0
  %rows = f32[100,8]{1,0} get-tuple-element(%carry.1), index=1
  %one = f32[1,8]{1,0} get-tuple-element(%carry.1), index=2
  %fusion.1 = f32[100,8]{1,0} fusion(%rows, %i, %one), kind=kLoop, calls=%fused
  ROOT %next = (s32[], f32[100,8]{1,0}, f32[1,8]{1,0}) tuple(%i, %fusion.1, %one)
}

%condition (carry.2: (s32[], f32[100,8], f32[1,8])) -> pred[] {
  %carry.2 = (s32[], f32[100,8]{1,0}, f32[1,8]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x: (s32[], f32[100,8], f32[1,8]), q: bf16[4,16]) -> bf16[4,16] {
  %x = (s32[], f32[100,8]{1,0}, f32[1,8]{1,0}) parameter(0)
  %q = bf16[4,16]{1,0} parameter(1)
  %while.1 = (s32[], f32[100,8]{1,0}, f32[1,8]{1,0}) while(%x), condition=%condition, body=%body, backend_config={TRIPS}
  %call.1 = (bf16[4,16]{1,0}, u8[0]{0}) custom-call(%q, %q), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %out = bf16[4,16]{1,0} get-tuple-element(%call.1), index=0
}
"""


@pytest.mark.parametrize(("trips", "n"), [('"known_trip_count":{"n":"5"}', 5), ("", 1)])
def test_costs_of_a_program(trips: str, n: int) -> None:
    """A loop counts as often as it runs, and an update in place moves only what is new (and the index)."""
    hlo = HLO.replace("TRIPS", trips)
    row, index, call = 8 * 4, 4, 4 * 16 * 2
    assert read_costs(hlo) == Costs(n * (2 * row + index) + 2 * call, n + 1, 1)
    assert materialised(hlo) == {"f32[100,8]": 1, "bf16[4,16]": 1, "u8[0]": 1}
