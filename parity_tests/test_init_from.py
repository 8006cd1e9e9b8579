"""Runs that start from a checkpoint: its model, weights and tokenizer, and the same curve in both frameworks."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minillm_core.config import DataConfig, RunConfig
from minillm_core.data.batches import Batch
from minillm_core.data.run_data import open_data
from minillm_core.errors import InputError
from minillm_core.interop.conversion import convert
from minillm_core.interop.initial import with_initial_checkpoint
from minillm_core.text.tokenizer_json import load_tokenizer
from minillm_core.training.checkpoints import find_checkpoint, read_info
from minillm_core.training.train import train
from parity_tests.conftest import BACKENDS, TINY, losses_of, text_run, train_until
from parity_tests.test_hf import save_llama
from parity_tests.test_hf_tokenizer import byte_level

MODEL = replace(TINY, vocab_size=576)  # more rows than the tokenizer has tokens


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("source") / "hf"
    save_llama(MODEL, folder, torch.float32)
    byte_level(folder, TINY.vocab_size)
    return folder


def run_from(source: Path, corpus: Path, home: Path, **settings: Any) -> RunConfig:
    """The model of the configuration, TINY, is replaced by that of the source."""
    data = DataConfig(str(corpus), str(home / "data"), holdout_every=5)
    settings = {"init_from": str(source), "compute_dtype": "float64", "seq_len": 32} | settings
    return text_run(data, home / "run", **settings)


def first_loss(config: RunConfig, framework: str, checkpoint: Path) -> float:
    """The loss of a checkpoint on the first batch of a run."""
    backend, c = BACKENDS[framework], config.train
    model = backend.load(checkpoint, "float64")
    batch = open_data(config.data, model.config.vocab_size).batch(0, c.batch_size, c.seq_len, c.seed)
    return float(np.asarray(backend.make_eval_step(model)(batch), np.float64).mean())


def losses_on_batch(framework: str, checkpoint: Path) -> np.ndarray:
    """The losses of a checkpoint on some tokens, which show its weights."""
    step = BACKENDS[framework].make_eval_step(BACKENDS[framework].load(checkpoint, "float64"))
    return np.asarray(step(Batch.from_rows(np.arange(2 * 33, dtype=np.int32).reshape(2, 33))), np.float64)


@pytest.mark.extended
def test_imported_models_train(source: Path, corpus: Path, tmp_path: Path) -> None:
    config = run_from(source, corpus, tmp_path, steps=100, eval_every=50, checkpoint_every=50)
    for framework, backend in BACKENDS.items():
        resolved = with_initial_checkpoint(config, backend)
        assert resolved.train.init_from == str(tmp_path / "run-init")
        train_until(resolved, backend, 7)
        checkpoint = train(resolved, backend)
        assert read_info(checkpoint).config.model == MODEL
        expected = first_loss(config, framework, find_checkpoint(tmp_path / "run-init", framework))
        assert losses_of(tmp_path / "run", framework)[0] == pytest.approx(expected, rel=1e-12)
        tokenizer = load_tokenizer(checkpoint, MODEL.vocab_size)
        assert tokenizer.encode("the people", bos=True) == load_tokenizer(source, 0).encode("the people", bos=True)
    ours, theirs = (losses_of(tmp_path / "run", framework) for framework in BACKENDS)
    assert len(ours) >= 100
    assert np.abs(ours / theirs - 1).max() <= 1e-11


def test_the_source_is_read_only_once(source: Path, corpus: Path, tmp_path: Path) -> None:
    """A run that has begun needs it no more."""
    shutil.copytree(source, tmp_path / "hf")
    backend = BACKENDS["torch"]
    config = run_from(tmp_path / "hf", corpus, tmp_path, steps=6, eval_every=6, checkpoint_every=3)
    train_until(with_initial_checkpoint(config, backend), backend, 4)
    for name in ("hf", "run-init"):
        shutil.rmtree(tmp_path / name)
    train(with_initial_checkpoint(config, backend), backend)


@pytest.mark.extended
@pytest.mark.parametrize("framework", BACKENDS)
def test_runs_train_on_other_text(framework: str, data_config: DataConfig, corpus: Path, tmp_path: Path) -> None:
    """The source is a run of the other framework, of which only the weights are used."""
    backend, other = BACKENDS[framework], next(name for name in BACKENDS if name != framework)
    train(text_run(data_config, tmp_path / "first", steps=5, eval_every=5, checkpoint_every=5), BACKENDS[other])
    small = tmp_path / "corpus"
    small.mkdir()
    for path in sorted(corpus.iterdir())[:8]:
        shutil.copy(path, small)
    config = run_from(tmp_path / "first", small, tmp_path, steps=5, eval_every=5)
    train(with_initial_checkpoint(config, backend), backend)
    expected = first_loss(config, framework, find_checkpoint(tmp_path / "run-init", framework))
    losses = losses_of(tmp_path / "run", framework)
    assert losses[0] == pytest.approx(expected, rel=1e-12)

    # the same weights without moments and count of an optimizer
    convert(f"{other}->hf", tmp_path / "first", tmp_path / "hf")
    alone = run_from(tmp_path / "hf", small, tmp_path / "alone", steps=5, eval_every=5)
    train(with_initial_checkpoint(alone, backend), backend)
    assert losses_of(tmp_path / "alone" / "run", framework) == pytest.approx(losses, rel=1e-12)


@pytest.mark.extended
@pytest.mark.parametrize("place", ["", "{}", "{}/checkpoints/5"])
@pytest.mark.parametrize("trained", BACKENDS)
def test_every_place_of_a_checkpoint(
    trained: str, place: str, data_config: DataConfig, corpus: Path, tmp_path: Path
) -> None:
    """A run, its part of one framework, or a checkpoint; for the same framework and for the other one."""
    checkpoint = train(text_run(data_config, tmp_path / "first", steps=5, eval_every=5), BACKENDS[trained])
    expected = losses_on_batch(trained, checkpoint)
    for framework, backend in BACKENDS.items():
        home = tmp_path / framework
        config = with_initial_checkpoint(run_from(tmp_path / "first" / place.format(trained), corpus, home), backend)
        assert (home / "run-init").exists() == (framework != trained)
        assert config.train.init_from is not None
        found = losses_on_batch(framework, find_checkpoint(config.train.init_from, framework))
        assert np.abs(found / expected - 1).max() <= 1e-11


def test_a_different_source_is_not_mixed_up(source: Path, corpus: Path, tmp_path: Path) -> None:
    """What was converted from one source is not used for another one."""
    backend = BACKENDS["torch"]
    save_llama(TINY, tmp_path / "second", torch.float32)
    config = run_from(source, corpus, tmp_path, steps=5)
    for _ in range(2):  # the second call uses the conversion again
        with_initial_checkpoint(config, backend)
    with pytest.raises(InputError, match=r"(?s)holds something different.*--train\.out_dir"):
        with_initial_checkpoint(
            replace(config, train=replace(config.train, init_from=str(tmp_path / "second"))), backend
        )


def test_bad_sources(source: Path, data_config: DataConfig, corpus: Path, tmp_path: Path) -> None:
    backend = BACKENDS["torch"]
    config = run_from(source, corpus, tmp_path, steps=5)
    with pytest.raises(InputError, match="no torch checkpoint"):
        train(replace(config, train=replace(config.train, init_from="nowhere")), backend)
    resolved = with_initial_checkpoint(config, backend)
    with pytest.raises(InputError, match="vocabulary size differs"):
        train(replace(resolved, data=data_config), backend)
    same_size = run_from(tmp_path / "same", corpus, tmp_path, steps=5)
    save_llama(TINY, tmp_path / "same", torch.float32)
    byte_level(tmp_path / "same", TINY.vocab_size)
    same_size = replace(same_size, train=replace(same_size.train, out_dir=str(tmp_path / "second")))
    with pytest.raises(InputError, match=r"(?s)different tokenizer than that of the initial.*--data\.dir"):
        train(with_initial_checkpoint(replace(same_size, data=data_config), backend), backend)
    with pytest.raises(InputError, match=r"(?s)holds an imported model.*--train\.init_from"):
        train(replace(config, train=replace(config.train, out_dir=str(tmp_path / "run-init"), init_from=None)), backend)
