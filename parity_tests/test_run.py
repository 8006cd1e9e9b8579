"""Whole runs compared with an independent run, and what the train loop does when something fails."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import minillm_torch
from minillm_core.config import DataConfig, OptimConfig, RunConfig, load_config
from minillm_core.data.prepared import PreparedData
from minillm_core.errors import InputError
from minillm_core.model.params import init_params
from minillm_core.training import loop
from minillm_core.training.checkpoints import CheckpointWriter, checkpoint_steps
from minillm_core.training.evaluation import evaluate
from minillm_core.training.metrics import read_metrics
from minillm_core.training.train import train
from parity_tests.conftest import BACKENDS, TINY, run_config

STEPS = 6


def small_run(data: DataConfig, out_dir: Path, **train: Any) -> RunConfig:
    optim = OptimConfig(learning_rate=3e-3, min_learning_rate=3e-4, warmup_steps=2)
    settings = {"steps": STEPS, "log_every": 1, "eval_every": 3, "eval_batches": 2, "checkpoint_every": 3} | train
    return run_config(TINY, out_dir, data=data, optim=optim, **settings)


def independent_run(config: RunConfig) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The run with transformers' Llama, torch's AdamW and clipping, and the schedule written out.

    It shares with the project only the initial weights, the order of the batches and the token files.

    Returns:
        the rows of the log, the final weights.
    """
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=320,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        )
    )
    weights = {name: torch.from_numpy(array) for name, array in init_params(TINY, config.train.seed).items()}
    assert llama.load_state_dict(weights, strict=False).missing_keys == ["lm_head.weight"]
    llama.tie_weights()
    params = list(llama.parameters())
    matrices, norms = [p for p in params if p.ndim > 1], [p for p in params if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8
    )
    folder = Path(config.data.dir)
    train, val = (np.fromfile(folder / f"{split}-00000.bin", "<u2").astype(np.int64) for split in ("train", "val"))
    windows = {tuple(train[i * 32 : i * 32 + 33]) for i in range((len(train) - 1) // 32)}
    data = PreparedData(folder, 512)
    rows = []
    for step in range(STEPS):
        batch = data.batch(step, 4, 32, config.train.seed)
        read = np.concatenate([batch.tokens_BT, batch.targets_BT[:, -1:]], axis=1)
        for row in read:
            windows.remove(tuple(row))  # a window of the text, not seen before
        tokens = torch.from_numpy(read.astype(np.int64))
        logits = llama(tokens[:, :-1]).logits.reshape(-1, 512)
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].reshape(-1))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 2) / (STEPS - 2)))
        rate = 3e-3 * (step + 1) / 3 if step < 2 else 3e-4 + cosine * (3e-3 - 3e-4)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        rows.append({"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": rate})
        if step + 1 in (3, STEPS):
            rows.append(held_out(llama, config, val, 2 * 4 if step + 1 == 3 else None))
    return rows, dict(llama.state_dict())


def held_out(llama: LlamaForCausalLM, config: RunConfig, val: np.ndarray, n_windows: int | None) -> dict[str, float]:
    """Held-out metrics over all windows of 32 tokens, or over `n_windows` spread from the first to the last."""
    starts = list(range(0, len(val) - 1, 32))
    if n_windows is not None:
        starts = [starts[int(n * (len(starts) - 1) / (n_windows - 1))] for n in range(n_windows)]
    nats, count = 0.0, 0
    with torch.no_grad():
        for start in starts:
            x = torch.from_numpy(val[start : start + 33])
            log_probs = torch.log_softmax(llama(x[None, :-1]).logits[0].double(), -1)
            nats -= float(log_probs[torch.arange(len(x) - 1), x[1:]].sum())
            count += len(x) - 1
    n_bytes = sum(path.stat().st_size for path in sorted(Path(config.data.corpus).glob("*.txt"))[4::5])
    loss = nats / count
    bits = loss * (len(val) - 1) / math.log(2) / n_bytes
    return {"loss": loss, "bits_per_byte": bits, "perplexity": math.exp(loss)}


@pytest.fixture(scope="module")
def expected(data_config: DataConfig) -> Any:
    return independent_run(small_run(data_config, Path("unused")))


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize("grad_accum", [1, 2])
def test_run_matches_an_independent_run(
    framework: str, grad_accum: int, data_config: DataConfig, expected: Any, tmp_path: Path
) -> None:
    """Both frameworks could share a bug in the loop, the schedule or the evaluation; this run shares none of them."""
    batches = 2 * grad_accum  # micro-batches: the same windows
    config = small_run(data_config, tmp_path / "run", grad_accum=grad_accum, eval_batches=batches)
    checkpoint = train(config, BACKENDS[framework])
    expected_rows, weights = expected
    rows = read_metrics(tmp_path / "run" / framework / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4, 5, 6, 6]
    for row, ours in zip(rows, expected_rows, strict=True):
        for name, value in ours.items():
            assert row[name] == pytest.approx(value, rel=1e-5), f"step {row['step']} {row['split']} {name}"
    final = BACKENDS[framework].read_payload(checkpoint, config).weights
    for name, array in final.items():
        assert np.abs(array - weights[name].numpy()).max() <= 1e-4, name


def test_a_moved_run_is_found_by_its_own_file(data_config: DataConfig, tmp_path: Path) -> None:
    train(small_run(data_config, tmp_path / "old"), BACKENDS["torch"])
    (tmp_path / "old").rename(tmp_path / "new")
    config = load_config(str(tmp_path / "new" / "config.yaml"))
    assert config.train.out_dir == str(tmp_path / "new")
    assert train(config, BACKENDS["torch"]) == tmp_path / "new" / "torch" / "checkpoints" / str(STEPS)
    assert not (tmp_path / "old").exists()


def test_the_last_evaluation_can_be_limited(data_config: DataConfig, tmp_path: Path) -> None:
    """The run then equals one in which the last evaluation is as short as the others."""
    config = small_run(data_config, tmp_path / "run", final_eval_batches=2)
    checkpoint = train(config, BACKENDS["torch"])
    data = PreparedData(data_config.dir, TINY.vocab_size)
    model = BACKENDS["torch"].load(checkpoint)
    expected = evaluate(BACKENDS["torch"].make_eval_step(model), data, "val", config.train, 2).mean
    row = read_metrics(tmp_path / "run" / "torch" / "metrics.jsonl")[-1]
    assert (row["split"], row["step"]) == ("val", STEPS)
    assert row["loss"] == pytest.approx(expected, rel=1e-6)


def test_failed_save_is_reported(data_config: DataConfig, tmp_path: Path) -> None:
    def failing(folder: Path, config: RunConfig, state: Any) -> Callable[[], None]:
        def finish() -> None:
            raise OSError("Input/output error")

        return finish

    backend = SimpleNamespace(**(vars(minillm_torch) | {"start_payload": failing}))
    with pytest.raises(OSError, match="Input/output error"):
        train(small_run(data_config, tmp_path / "run"), backend)
    assert checkpoint_steps(tmp_path / "run/torch/checkpoints") == []


@pytest.mark.parametrize("framework", BACKENDS)
def test_mismatched_data_is_refused_on_resume(framework: str, data_config: DataConfig, tmp_path: Path) -> None:
    config = small_run(data_config, tmp_path / "run", steps=3)
    checkpoint = train(config, BACKENDS[framework])
    info = json.loads((checkpoint / "checkpoint.json").read_text())
    assert info["data_hashes"].keys() == {"tokenizer", "train", "val"}
    other = PreparedData(data_config.dir, TINY.vocab_size)
    other.splits["train"] = replace(other.splits["train"], hashes=("0" * 64,))
    with pytest.raises(InputError, match="uses a different training text"):
        loop.initial_or_newest(config, BACKENDS[framework], other, CheckpointWriter(checkpoint.parent))
