"""A run of 100 steps gives the losses that version 0.1 recorded, so a change of the code has not changed the model.

Both frameworks could change together, and every other test would still pass.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minillm_core.config import DataConfig, ModelConfig, OptimConfig
from minillm_core.data.prepared import PreparedData
from minillm_core.training.evaluation import evaluate
from minillm_core.training.schedule import learning_rate
from parity_tests.conftest import BACKENDS, ROOT, Tier, run_config

MODEL = ModelConfig(
    vocab_size=307, context_length=64, width=48, n_layers=2, n_heads=4, n_kv_heads=2, hidden=96, head_dim=12
)
STEPS = 100
RECORDED = ROOT / "parity_tests/losses_0.1.json"


def prepared(folder: Path) -> PreparedData:
    """Token files that no tokenizer or corpus can change: a Philox counter, with small ids more frequent."""
    meta: dict[str, Any] = {"format_version": 1, "vocab_size": 307, "dtype": "<u2", "tokenizer_sha256": "none"}
    for key, (split, n_tokens) in enumerate({"train": 30_001, "val": 2_000}.items()):
        raw = np.random.Philox(key=key).random_raw(2 * n_tokens).reshape(2, -1) % np.uint64(307)
        (raw[0] * raw[1] // np.uint64(307)).astype("<u2").tofile(folder / f"{split}.bin")
        meta[split] = {"n_tokens": n_tokens, "n_bytes": 4 * n_tokens, "sha256": "none"}
    (folder / "meta.json").write_text(json.dumps(meta))
    return PreparedData(folder, 307)


def run_losses(framework: str, folder: Path) -> list[float]:
    """The losses of all steps, then the held-out loss."""
    backend = BACKENDS[framework]
    optim = OptimConfig(learning_rate=3e-3, min_learning_rate=3e-4, warmup_steps=10)
    settings = {"steps": STEPS, "batch_size": 4, "grad_accum": 2, "seq_len": 33, "compute_dtype": "float64"}
    config = run_config(MODEL, data=DataConfig("unused", str(folder)), optim=optim, **settings)
    data, c = prepared(folder), config.train
    state, step = backend.init_state(config), backend.make_train_step(config)
    losses = []
    for n in range(STEPS):
        batch = data.batch(n, c.batch_size, c.seq_len, c.seed)
        state, metrics = step(state, batch, learning_rate(config.optim, n, STEPS))
        losses.append(float(metrics["loss"]))
    return [*losses, evaluate(backend.make_eval_step(backend.model_of(config, state)), data, "val", c).mean]


@pytest.mark.parametrize("framework", BACKENDS)
def test_recorded_losses(framework: str, float64: Tier, tmp_path: Path) -> None:
    recorded = json.loads(RECORDED.read_text())[framework]
    losses = run_losses(framework, tmp_path)
    assert len(losses) == len(recorded) == STEPS + 1
    assert recorded[0] > recorded[-2] + 0.3, "the run has learnt something"
    error = np.abs(np.array(losses) / recorded - 1)
    assert error.max() <= float64.run_loss, f"step {error.argmax() + 1}: differs by {error.max():.2e}"
