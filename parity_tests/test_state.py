"""A training run moves between the frameworks without a change, and both frameworks give the same curve."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

import minillm_jax
import minillm_torch
from minillm_core.config import DataConfig, RunConfig, load_config
from minillm_core.errors import InputError
from minillm_core.files import hash_file
from minillm_core.interop import convert
from minillm_core.interop.imports import import_checkpoint
from minillm_core.training.checkpoints import CheckpointInfo, CheckpointWriter, TrainingState, read_info
from minillm_core.training.run_directory import RunDirectory
from minillm_core.training.schedule import learning_rate
from minillm_core.training.train import train
from parity_tests.conftest import (
    BACKENDS,
    TIERS,
    TINY,
    Tier,
    assert_close,
    losses_of,
    metrics_of,
    random_weights,
    run_config,
    state_at,
    text_run,
    train_until,
)
from parity_tests.test_hf import save_llama


def moved_run(config: Callable[[Path], RunConfig], folder: Path, frameworks: list[str], every: int) -> np.ndarray:
    """Losses of a run that trains `every` steps in each of the frameworks in turn and is converted in between."""
    for n, framework in enumerate(frameworks):
        run = config(folder / str(n))
        if n > 0:
            step = n * every
            before = frameworks[n - 1]
            convert(f"{before}->{framework}", folder / f"{n - 1}/{before}/checkpoints/{step}", folder / str(n))
        if n == len(frameworks) - 1:
            train(run, BACKENDS[framework])
        else:
            train_until(run, BACKENDS[framework], (n + 1) * every)
    return losses_of(folder / str(n), frameworks[-1])


EXTENDED = [pytest.param(name, marks=pytest.mark.extended) for name in ("float32", "bfloat16")]


@pytest.fixture(scope="module", params=["float64", *EXTENDED])
def whole_runs(
    request: pytest.FixtureRequest, data_config: DataConfig, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunConfig]:
    """An uninterrupted run in both frameworks, in each precision."""
    config = text_run(data_config, tmp_path_factory.mktemp(f"whole-{request.param}"), compute_dtype=request.param)
    with jax.enable_x64(request.param == "float64"):
        for backend in BACKENDS.values():
            train(config, backend)
        yield config


@pytest.mark.parametrize("order", [["torch", "jax", "torch"], ["jax", "torch", "jax"]], ids="-".join)
def test_run_moved_between_frameworks_is_the_same(order: list[str], whole_runs: RunConfig, tmp_path: Path) -> None:
    """A run that trains in each framework in turn, with conversions in between, equals a run in either framework alone.

    In bfloat16, the final losses differ by no more than those of two seeds.
    """
    dtype, whole = whole_runs.train.compute_dtype, Path(whole_runs.train.out_dir)

    def config(out_dir: Path) -> RunConfig:
        return replace(whole_runs, train=replace(whole_runs.train, out_dir=str(out_dir)))

    moved = moved_run(config, tmp_path, order, every=10)
    if dtype == "bfloat16":
        other_seed = replace(whole_runs.train, out_dir=str(tmp_path / "other"), seed=4)
        train(replace(whole_runs, train=other_seed), minillm_torch)
        noise = abs(np.mean(losses_of(tmp_path / "other", "torch")[-10:] - losses_of(whole, "torch")[-10:]))
        for framework in BACKENDS:
            assert abs(np.mean(moved[-10:] - losses_of(whole, framework)[-10:])) <= noise
        return
    for framework in BACKENDS:
        assert_close("losses", moved, losses_of(whole, framework), TIERS[dtype].run_loss)
        if dtype == "float64":
            ours, theirs = state_at(tmp_path / "2", order[-1], 30), state_at(whole, framework, 30)
            for group in ("weights", "exp_avg", "exp_avg_sq"):
                for name, array in getattr(theirs, group).items():
                    assert_close(f"{group} {name}", getattr(ours, group)[name], array, 1e-10)


@pytest.mark.parametrize("whole_runs", ["float64", EXTENDED[0]], indirect=True)
def test_a_loop_over_the_blocks_continues_a_run(whole_runs: RunConfig, tmp_path: Path) -> None:
    """A JAX run may switch to `train.scan_layers` and back: its losses, those of evaluations, and its state stay the
    same."""
    dtype, whole = whole_runs.train.compute_dtype, Path(whole_runs.train.out_dir)
    config = replace(whole_runs, train=replace(whole_runs.train, out_dir=str(tmp_path)))
    scanned = replace(config, train=replace(config.train, scan_layers=True))
    train_until(config, minillm_jax, 10)
    train_until(scanned, minillm_jax, 20)
    train(config, minillm_jax)
    assert_close("losses", losses_of(tmp_path, "jax"), losses_of(whole, "jax"), TIERS[dtype].run_loss)
    if dtype == "float64":
        ours, theirs = state_at(tmp_path, "jax", 30), state_at(whole, "jax", 30)
        for group in ("weights", "exp_avg", "exp_avg_sq"):
            for name, array in getattr(theirs, group).items():
                assert_close(f"{group} {name}", getattr(ours, group)[name], array, 1e-10)


@pytest.mark.long
def test_thousand_steps_moved_three_times(float64: Tier, data_config: DataConfig, tmp_path: Path) -> None:
    """float64, every loss within 1e-9 of a run in either framework alone."""

    def config(out_dir: Path) -> RunConfig:
        return text_run(data_config, out_dir, compute_dtype="float64", steps=1000, eval_every=100, checkpoint_every=100)

    moved = moved_run(config, tmp_path / "moved", ["torch", "jax", "torch", "jax"], every=250)
    assert moved[-1] < moved[0] - 1, "nothing was learnt, so little was compared"
    for framework, backend in BACKENDS.items():
        train(config(tmp_path / "whole"), backend)
        error = np.abs(moved - losses_of(tmp_path / "whole", framework)).max()
        print(f"\n{framework}: largest difference of a loss {error:.1e}")
        assert error <= 1e-9


@pytest.mark.parametrize(
    ("tier", "grad_accum"),
    [("float64", 1), ("float64", 2), ("float32", 1), pytest.param("float32", 2, marks=pytest.mark.extended)],
    indirect=["tier"],
)
def test_same_curve(grad_accum: int, tier: Tier, data_config: DataConfig, tmp_path: Path) -> None:
    """100 steps on text, with evaluations: every logged number agrees."""
    config = text_run(
        data_config,
        tmp_path,
        steps=100,
        eval_every=50,
        checkpoint_every=100,
        grad_accum=grad_accum,
        compute_dtype=tier.name,
    )
    for backend in BACKENDS.values():
        train(config, backend)
    ours, theirs = (metrics_of(tmp_path, framework) for framework in BACKENDS)
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.5, "nothing was learnt, so little was compared"
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert (a["step"], a["split"]) == (b["step"], b["split"])
        for name in a.keys() - {"step", "split"}:
            bound = tier.run_loss * (10 if name in ("grad_norm", "perplexity") else 1)
            assert abs(a[name] - b[name]) <= bound * max(1, abs(b[name])), f"step {a['step']} {name}"


def test_converting_an_older_step_keeps_the_log(data_config: DataConfig, tmp_path: Path) -> None:
    train(text_run(data_config, tmp_path, steps=20), minillm_torch)
    for step, last in ((10, 10), (20, 20)):
        convert("torch->jax", tmp_path / f"torch/checkpoints/{step}", tmp_path)
        assert metrics_of(tmp_path, "jax")[-1]["step"] == last
    convert("torch->jax", tmp_path / "torch/checkpoints/10", tmp_path)
    assert metrics_of(tmp_path, "jax")[-1]["step"] == 20
    (tmp_path / "jax/checkpoints/20").rename(tmp_path / "20")
    train_until(text_run(data_config, tmp_path, steps=20), minillm_jax, 11)
    with pytest.raises(InputError, match="destination run was also trained"):
        convert("torch->jax", tmp_path / "torch/checkpoints/20", tmp_path)
    (tmp_path / "20").rename(tmp_path / "jax/checkpoints/20")
    (tmp_path / "jax/checkpoints/20/tokenizer.model").write_bytes(b"")
    with pytest.raises(InputError, match="damaged checkpoint"):
        convert("torch->jax", tmp_path / "torch/checkpoints/20", tmp_path)


def test_training_continues_from_weights_alone(
    data_config: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A checkpoint without optimizer state can be converted and trained further; as the messages say, Adam restarts."""
    config = text_run(data_config, tmp_path / "a", steps=6, checkpoint_every=4, log_every=1)
    train_until(config, minillm_torch, 3)
    state, info = state_at(tmp_path / "a", "torch", 3), read_info(tmp_path / "a/torch/checkpoints/3")
    bare = TrainingState(state.weights, {}, {})
    with CheckpointWriter(tmp_path / "bare/torch/checkpoints") as writer:
        tokenizer = tmp_path / "a/tokenizer.model"
        writer.save(info, tokenizer.parent, lambda folder: lambda: minillm_torch.write_payload(folder, config, bare))
    convert("torch->jax", tmp_path / "bare/torch/checkpoints/3", tmp_path / "b")
    with pytest.raises(InputError, match="holds a different checkpoint of this step"):  # the same weights, with moments
        convert("torch->jax", tmp_path / "a/torch/checkpoints/3", tmp_path / "b")
    assert "further training restarts Adam's moments at zero" in caplog.text
    moved = replace(config, train=replace(config.train, out_dir=str(tmp_path / "b")))
    train(moved, minillm_jax)
    assert "Adam's moments and its count start again at zero" in caplog.text
    assert read_info(tmp_path / "b/jax/checkpoints/4").updates == 1
    first = state_at(tmp_path / "b", "jax", 4)
    rate = learning_rate(config.optim, 3, 6)
    for name, weight in state.weights.items():
        grad = first.exp_avg[name].astype(np.float64) / (1 - config.optim.beta1)
        decay = config.optim.weight_decay if weight.ndim > 1 else 0.0
        expected = weight * (1 - rate * decay) - rate * grad / (np.abs(grad) + config.optim.eps)
        assert_close(name, first.weights[name], expected, 1e-6)


def test_auto_dtype_keeps_the_dtype_of_the_run(data_config: DataConfig, tmp_path: Path) -> None:
    """A run that started in bfloat16 (as on a GPU) continues in bfloat16 where `auto` would mean float32."""
    begun = text_run(data_config, tmp_path, steps=6, compute_dtype="bfloat16", checkpoint_every=3)
    train_until(begun, minillm_torch, 3)
    auto = replace(begun, train=replace(begun.train, compute_dtype="auto"))
    train(auto, minillm_torch)
    assert read_info(tmp_path / "torch/checkpoints/6").config.train.compute_dtype == "bfloat16"
    other = replace(begun, train=replace(begun.train, compute_dtype="float32"))
    with pytest.raises(InputError, match="compute_dtype: 'float32', was 'bfloat16'"):
        train(other, minillm_torch)
    begun_auto = tmp_path / "auto"  # as if a version that stored `auto` had started it
    train_until(replace(auto, train=replace(auto.train, out_dir=str(begun_auto))), minillm_torch, 3)
    for path in (begun_auto / "config.yaml", begun_auto / "torch/checkpoints/3/checkpoint.json"):
        path.write_text(path.read_text().replace("float32", "auto"))
    rewrite_manifest(begun_auto / "torch/checkpoints/3")
    train(replace(auto, train=replace(auto.train, out_dir=str(begun_auto))), minillm_torch)


def rewrite_manifest(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest:
        file = checkpoint / name
        manifest[name] = {"size": file.stat().st_size, "sha256": hash_file(file)}
    path.write_text(json.dumps(manifest))


def test_checkpoint_of_a_different_run_is_refused(data_config: DataConfig, tmp_path: Path) -> None:
    """A checkpoint was copied into the directory of a run with a different configuration."""
    for name, seed in (("a", 3), ("b", 4)):
        train(text_run(data_config, tmp_path / name, steps=6, seed=seed), minillm_torch)
    shutil.rmtree(tmp_path / "b/torch/checkpoints/6")
    shutil.copytree(tmp_path / "a/torch/checkpoints/6", tmp_path / "b/torch/checkpoints/6")
    with pytest.raises(InputError, match=r"(?s)different configuration.*train.seed: 4, was 3.*b/torch/checkpoints/6"):
        train(text_run(data_config, tmp_path / "b", steps=6, seed=4), minillm_torch)


def test_a_folder_with_hidden_files_only_can_become_a_run(tmp_path: Path) -> None:
    """A process that was killed before it wrote anything leaves its lock file. What a run holds is not rewritten."""
    (tmp_path / ".lock").write_text("process 1")
    hashes = {"tokenizer": "0", "train": "1", "val": "2"}
    for keep_last in (1, 2):  # free to change
        config = run_config(TINY, tmp_path, keep_last=keep_last)
        with RunDirectory(tmp_path, config).opened(tmp_path, hashes):
            assert load_config(str(tmp_path / "config.yaml")).train.keep_last == 1
    with (
        pytest.raises(InputError, match="uses a different held-out text"),
        RunDirectory(tmp_path, config).opened(tmp_path, hashes | {"val": "3"}),
    ):
        pass


def test_imported_run_cannot_be_trained(tmp_path: Path) -> None:
    """Refused before any data is prepared for it."""
    save_llama(TINY, tmp_path / "hf", torch.float32)
    import_checkpoint("hf", tmp_path / "hf", tmp_path / "run", BACKENDS["torch"])
    config = load_config(str(tmp_path / "run/config.yaml"))
    config = replace(config, data=replace(config.data, dir=str(tmp_path / "data")))
    with pytest.raises(InputError, match="holds an imported model"):
        train(config, BACKENDS["torch"])
    assert not (tmp_path / "data").exists()


def test_conversion_keeps_the_dtype_of_the_run(data_config: DataConfig, tmp_path: Path) -> None:
    """A checkpoint whose configuration says `auto` is copied into a run that has settled on a dtype."""
    config = text_run(data_config, tmp_path / "a", steps=6, compute_dtype="auto")
    settled = replace(config, train=replace(config.train, compute_dtype="float32"))
    hashes, state = {"tokenizer": "0", "train": "1", "val": "2"}, TrainingState(random_weights(TINY), {}, {})
    with CheckpointWriter(tmp_path / "a/torch/checkpoints") as writer:
        info = CheckpointInfo("torch", 3, 3, config, hashes)
        writer.save(info, tmp_path, lambda folder: lambda: minillm_torch.write_payload(folder, config, state))
    with RunDirectory(tmp_path / "b", settled).opened(tmp_path, hashes):
        pass
    convert("torch->jax", tmp_path / "a/torch/checkpoints/3", tmp_path / "b")
    assert load_config(str(tmp_path / "b/config.yaml")).train.compute_dtype == "float32"
    assert state_at(tmp_path / "b", "jax", 3).weights.keys() == state.weights.keys()
