"""Rows from several folders, and documents that share a row: functions of (seed, step), equal in both frameworks."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm_core.config import DataConfig
from minillm_core.data.assemble import Holdout
from minillm_core.data.batches import Batch
from minillm_core.data.mixture import PERIOD, Mixture, Phase, shares_of
from minillm_core.data.prepare import prepare
from minillm_core.data.prepared import PreparedData
from minillm_core.data.run_data import open_data, open_or_prepare
from minillm_core.data.split_loss import SplitLoss
from minillm_core.decoding.scoring import score_split
from minillm_core.errors import InputError
from minillm_core.text.tokenizer import EOS_ID, Tokenizer
from minillm_core.text.tokenizer_json import load_tokenizer
from minillm_core.training.checkpoints import find_checkpoint
from minillm_core.training.evaluation import evaluate
from minillm_core.training.train import train
from parity_tests.conftest import BACKENDS, TINY, losses_of, metrics_of, text_run, train_until
from parity_tests.test_hf_tokenizer import byte_level
from parity_tests.test_prepare import plan_for


@pytest.fixture(scope="module")
def folders(corpus: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small corpus in two folders of prepared data, `a` and `b`, with the same tokenizer."""
    root = tmp_path_factory.mktemp("folders")
    files = sorted(corpus.iterdir())
    for name, own in (("a", files[:12]), ("b", files[12:])):
        prepare(plan_for(own, tokenizer, holdout=Holdout(every=4)), root / name)
    return root


class Counting(Mixture):
    """A mixture without data."""

    def __init__(self, n_parts: int, phases: Sequence[Phase]):
        self.parts = dict.fromkeys(map(str, range(n_parts)))  # type: ignore[assignment]
        self.phases = tuple(phases)


WEIGHTS = st.lists(st.floats(0.01, 10), min_size=3, max_size=3)


@settings(deadline=None, max_examples=30)
@given(WEIGHTS, WEIGHTS, st.integers(1, 7), st.integers(2, 3000), st.integers(0, 5))
def test_no_row_is_skipped_or_repeated(
    first: list[float], then: list[float], batch_size: int, change: int, seed: int
) -> None:
    """Each folder gives its rows 0, 1, 2, ... in this order, also when the weights change; any part of the rows can be
    computed alone."""
    middle = Phase(change // 2, shares_of(then[::-1]))
    mixture = Counting(3, [Phase(0, shares_of(first)), middle, Phase(change, shares_of(then))])
    n = batch_size * change + 2 * PERIOD
    part, index = mixture.rows_of(np.arange(n), batch_size, seed)
    for number in range(3):
        assert np.array_equal(index[part == number], np.arange((part == number).sum()))
    for rows in (np.arange(n - 50, n), np.arange(max(0, batch_size * change - 30), batch_size * change + 30)):
        again = mixture.rows_of(rows, batch_size, seed)
        assert np.array_equal(again[0], part[rows])
        assert np.array_equal(again[1], index[rows])
    counts = np.bincount(part[batch_size * change :][:PERIOD], minlength=3)
    assert counts.tolist() == list(shares_of(then)), "after PERIOD rows, each folder has given exactly its share"


def test_shares() -> None:
    assert shares_of([0.7, 0.3]) == (7000, 3000)
    assert shares_of([1, 1, 1]) == (3334, 3333, 3333)
    assert shares_of([2, 0]) == (10_000, 0)
    with pytest.raises(InputError, match="too small"):
        shares_of([1, 1e-6])


def test_rows_are_those_of_the_folders(folders: Path) -> None:
    changes = {3: {"a": 1.0, "b": 0.0}}
    mixed = DataConfig("unused", str(folders), mixture={"a": 0.25, "b": 0.75}, mixture_changes=changes)
    data = open_data(mixed, TINY.vocab_size)
    parts = [PreparedData(folders / name, TINY.vocab_size) for name in "ab"]
    counts = [0, 0]
    for step in range(5):
        batch = data.batch(step, 8, 32, 7)
        tokens = np.concatenate([batch.tokens_BT, batch.targets_BT[:, -1:]], axis=1)
        assert isinstance(data, Mixture)
        own, _ = data.rows_of(np.arange(step * 8, step * 8 + 8), 8, 7)
        for row, part in zip(tokens, own.tolist(), strict=True):
            assert np.array_equal(row, parts[part].train_rows(np.array([counts[part]]), 8, 32, 7).tokens[0])
            counts[part] += 1
        assert np.array_equal(data.batch(step, 8, 32, 7, slice(2, 5)).tokens_BT, batch.tokens_BT[2:5])
        if step >= 3:
            assert own.tolist() == [0] * 8
    assert counts[1] > 10
    n_targets = sum(float(batch.weights_BT.sum()) for batch in data.eval_batches("val", 3, 32))
    assert n_targets == sum(part.n_tokens("val") - 1 for part in parts)
    sizes = [part.n_tokens("val") for part in parts]
    for n_batches in (3, 20):
        few = data.eval_parts("val", 1, 32, n_batches)
        expected = [max(1, round(n_batches * size / sum(sizes))) for size in sizes]
        assert [len([*batches]) for batches in few.values()] == expected
    assert data.hashes().keys() == {"tokenizer", "train of a", "val of a", "train of b", "val of b"}


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from([5, 6, 7, EOS_ID]), min_size=12, max_size=12), min_size=1, max_size=4))
def test_packed_rows(rows: list[list[int]]) -> None:
    """Against a loop: segment, position and weight of each token."""
    batch = Batch.packed(np.array(rows, np.int32), EOS_ID)
    assert batch.positions_BT is not None
    assert batch.segments_BT is not None
    for b, row in enumerate(rows):
        segment = position = 0
        for t, token in enumerate(row[:-1]):
            assert (batch.tokens_BT[b, t], batch.targets_BT[b, t]) == (token, row[t + 1])
            assert (batch.segments_BT[b, t], batch.positions_BT[b, t]) == (segment, position)
            assert batch.weights_BT[b, t] == (token != EOS_ID)
            position += 1
            if token == EOS_ID:
                segment, position = segment + 1, 0


def test_targets_of_a_document_mask(folders: Path) -> None:
    """All tokens but the first of each document are predicted, each once."""
    plain, masked = (PreparedData(folders / "a", TINY.vocab_size, document_mask=mask) for mask in (False, True))
    tokens = masked.tokens["val"][:]
    assert masked.n_targets("val") == len(tokens) - (tokens == EOS_ID).sum()
    assert plain.n_targets("val") == len(tokens) - 1
    total = sum(float(batch.weights_BT.sum()) for batch in masked.eval_batches("val", 3, 32))
    assert total == masked.n_targets("val")
    del masked.index["val"]["n_documents"]
    assert masked.n_targets("val") == total, "counted in the tokens, as for data of version 0.1"


@pytest.mark.extended
def test_both_frameworks_have_the_same_curve(folders: Path, tmp_path: Path) -> None:
    """With a mixture that changes and documents that do not see each other; one of the runs is stopped and resumed."""
    config = DataConfig("unused", str(folders), mixture={"a": 0.5, "b": 0.5}, document_mask=True)
    changes = {4: {"a": 0.1, "b": 0.9}}
    train_config = {"steps": 12, "eval_every": 6, "checkpoint_every": 6, "compute_dtype": "float64", "seq_len": 48}
    run = text_run(replace(config, mixture_changes=changes), tmp_path / "run", **train_config)
    train(run, BACKENDS["jax"])
    train_until(run, BACKENDS["torch"], 7)
    train(run, BACKENDS["torch"])
    losses = {framework: losses_of(tmp_path / "run", framework) for framework in BACKENDS}
    assert len(losses["jax"]) >= 12
    assert np.abs(losses["jax"] / losses["torch"] - 1).max() <= 1e-11
    # bits per byte, from the files
    found = [json.loads((folders / name / "index.json").read_text())["val"] for name in "ab"]
    targets = [split["n_tokens"] - split["n_documents"] for split in found]
    n_targets, n_bytes = sum(targets), sum(split["n_bytes"] for split in found)
    last = metrics_of(tmp_path / "run", "jax")[-1]
    assert last["bits_per_byte"] == pytest.approx(last["loss"] * n_targets / n_bytes / np.log(2), rel=1e-12)

    # the evaluation of a checkpoint scores each document alone
    backend, last = BACKENDS["torch"], metrics_of(tmp_path / "run", "torch")[-1]
    checkpoint = find_checkpoint(tmp_path / "run", "torch")
    generator = backend.Generator(backend.load(checkpoint, "float64"), load_tokenizer(checkpoint, TINY.vocab_size))
    loss = score_split(generator, open_data(run.data, TINY.vocab_size), "val", 48)
    assert loss.mean == pytest.approx(last["loss"], rel=1e-12)
    assert loss.parts == {name: pytest.approx(last[f"loss_{name}"], rel=1e-12) for name in ("a", "b")}
    assert loss.parts["a"] != pytest.approx(loss.parts["b"], rel=1e-3)
    alone = PreparedData(folders / "b", TINY.vocab_size, document_mask=True)
    assert score_split(generator, alone, "val", 48) == SplitLoss(pytest.approx(loss.parts["b"], rel=1e-12), {})

    # the loss of the whole is not the mean of the two folders: every target counts as much
    data, step = open_data(run.data, TINY.vocab_size), backend.make_eval_step(backend.load(checkpoint, "float64"))
    batches = [*data.eval_batches("val", 4, 48)]
    losses_of_targets = [np.asarray(step(batch), np.float64)[batch.weights_BT > 0] for batch in batches]
    assert last["loss"] == pytest.approx(np.concatenate(losses_of_targets).mean(), rel=1e-12)
    sampled = evaluate(step, data, "val", replace(run.train, batch_size=1, grad_accum=1, seq_len=48), 2)
    weighted = sum(loss * n for loss, n in zip(sampled.parts.values(), targets, strict=True))
    assert sampled.mean == pytest.approx(weighted / n_targets, rel=1e-12)

    plain = text_run(replace(config, document_mask=False), tmp_path / "plain", **train_config)
    train(plain, BACKENDS["torch"])
    assert np.abs(losses["torch"] / losses_of(tmp_path / "plain", "torch") - 1).max() > 1e-6, "the mask has an effect"


def test_a_folder_alone_with_a_mask(folders: Path) -> None:
    data = open_data(DataConfig("unused", str(folders / "a"), document_mask=True), TINY.vocab_size)
    assert data.document_mask
    assert data.batch(0, 2, 48, 0).segments_BT is not None


def test_every_folder_is_verified(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders, tmp_path / "copy")
    config = DataConfig("unused", str(tmp_path / "copy"), mixture={"a": 1.0, "b": 1.0})
    open_or_prepare(config, TINY.vocab_size)
    path = tmp_path / "copy" / "b" / "train-00000.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(InputError, match=r"(?s)was changed after it was prepared.*b/train-00000\.bin"):
        open_or_prepare(config, TINY.vocab_size)


def test_only_the_future_of_a_mixture_can_change(folders: Path, tmp_path: Path) -> None:
    data = DataConfig("unused", str(folders), mixture={"a": 0.5, "b": 0.5}, mixture_changes={2: {"a": 1, "b": 1}})
    run = text_run(data, tmp_path / "run", steps=6, eval_every=6, checkpoint_every=3)
    train_until(run, BACKENDS["torch"], 3)
    for changes in (None, {1: {"a": 1.0, "b": 3.0}}, {2: {"a": 1.0, "b": 3.0}}):
        with pytest.raises(InputError, match=r"(?s)steps that were trained already.*from step 3 on"):
            train(replace(run, data=replace(data, mixture_changes=changes)), BACKENDS["torch"])
    with pytest.raises(InputError, match=r"data\.mixture: "):
        train(replace(run, data=replace(data, mixture={"a": 0.4, "b": 0.6})), BACKENDS["torch"])
    later = replace(data, mixture_changes={2: {"a": 1, "b": 1}, 4: {"a": 0.0, "b": 1.0}})
    train(replace(run, data=later), BACKENDS["torch"])


def test_the_order_of_the_names_does_not_matter(folders: Path) -> None:
    """Two such configurations are equal, so their batches must be too."""
    both = [
        open_data(DataConfig("unused", str(folders), mixture=dict(pairs)), TINY.vocab_size)
        for pairs in ([("a", 0.7), ("b", 0.3)], [("b", 0.3), ("a", 0.7)])
    ]
    for step in range(3):
        assert np.array_equal(*(data.batch(step, 8, 32, 7).targets_BT for data in both))


def test_a_tokenizer_without_an_end_of_its_own(folders: Path, tmp_path: Path) -> None:
    """Documents cannot be told apart if the same token is put before and after them."""
    shutil.copytree(folders / "a", tmp_path / "a")
    (tmp_path / "a" / "tokenizer.model").unlink()
    byte_level(tmp_path / "a", TINY.vocab_size)
    settings = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    settings["eos_token"] = settings["bos_token"]
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(settings))
    PreparedData(tmp_path / "a", TINY.vocab_size)
    with pytest.raises(InputError, match="cannot be told apart"):
        PreparedData(tmp_path / "a", TINY.vocab_size, document_mask=True)


def test_bad_mixtures(folders: Path, data_config: DataConfig, tmp_path: Path) -> None:
    for more, message in (
        ({"mixture": {"a": -1.0, "b": 1.0}}, "out of range"),
        ({"mixture": {"a": 0.0}}, "out of range"),
        ({"mixture": {"a": 1.0}, "mixture_changes": {5: {"b": 1.0}}}, "does not fit"),
        ({"mixture": {"a": 1.0}, "mixture_changes": {0: {"a": 1.0}}}, "does not fit"),
        ({"mixture_changes": {5: {"b": 1.0}}}, "does not fit"),
    ):
        with pytest.raises(InputError, match=message):
            DataConfig("unused", str(folders), **more)
    with pytest.raises(InputError, match="not a folder of prepared data"):
        open_data(DataConfig("unused", str(folders), mixture={"a": 1.0, "none": 1.0}), TINY.vocab_size)
    (tmp_path / "a").symlink_to(folders / "a")
    (tmp_path / "other").symlink_to(data_config.dir)
    changed = PreparedData(tmp_path / "a", TINY.vocab_size)
    changed.index["tokenizer_sha256"] = "0" * 64
    with pytest.raises(InputError, match="different tokenizers"):
        Mixture({"a": changed, "other": PreparedData(tmp_path / "other", TINY.vocab_size)}, [Phase(0, (5000, 5000))])
