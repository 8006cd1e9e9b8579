"""From text to tokens to batches: nothing is lost or repeated, and a batch depends only on (seed, step)."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minillm_core.config import DataConfig, OptimConfig
from minillm_core.data.batches import Batch
from minillm_core.data.corpus import list_documents
from minillm_core.data.mixture import Mixture, Phase
from minillm_core.data.order import permute
from minillm_core.data.pieces import text_chunks
from minillm_core.data.prepared import PreparedData
from minillm_core.data.run_data import prepare_data
from minillm_core.errors import InputError
from minillm_core.text.tokenizer import BOS_ID, EOS_ID, Tokenizer
from minillm_core.training.evaluation import evaluate
from minillm_core.training.metrics import bits_per_byte, perplexity
from minillm_core.training.schedule import learning_rate
from parity_tests.conftest import TINY, run_config


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n  two  spaces\t\ttabs\r\n",
        "héllo 😀 \u200b\u3000 漢字",
        "\x00\x01",
        "x" * 3000,
        "<s></s><unk>",
        "1234567890",
    ],
)
def test_tokenizer_loses_nothing(text: str, tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_pieces(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == TINY.vocab_size
    assert (tokenizer.bos_id, tokenizer.eos_id) == (BOS_ID, EOS_ID)
    assert tokenizer.encode("a", bos=True) == [BOS_ID, *tokenizer.encode("a")]
    assert BOS_ID not in tokenizer.encode("<s>"), "text must not be able to write control tokens"


def test_token_files_hold_the_whole_corpus(data_config: DataConfig, tokenizer: Tokenizer) -> None:
    """Tokenising a document in pieces gives the same ids as tokenising it whole; every fifth file is held out."""
    data = PreparedData(data_config.dir, TINY.vocab_size)
    documents = list_documents(data_config)
    assert [d.split for d in documents] == ["train", "train", "train", "train", "val"] * 4
    for split in ("train", "val"):
        texts = [d.path.read_text(encoding="utf-8") for d in documents if d.split == split]
        expected = [token for text in texts for token in (BOS_ID, *tokenizer.encode(text), EOS_ID)]
        assert data.tokens[split][:].tolist() == expected
        assert data.index[split]["n_bytes"] == sum(len(text.encode()) for text in texts)


def test_single_file_is_split_at_a_line(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    lines = [f"line {i} of the only document we have\n" for i in range(2000)]
    path.write_text("".join(lines))
    train, val = list_documents(DataConfig(corpus=str(path), dir="unused", holdout_every=10))
    texts = ["".join(text_chunks(d)) for d in (train, val)]
    assert "".join(texts) == path.read_text()
    assert texts[0].endswith("\n")
    assert 0.09 < len(texts[1]) / path.stat().st_size < 0.11


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 1000, 4097])
def test_permutation(n: int) -> None:
    """A bijection of range(n), element by element, different for every key."""
    whole = permute(np.arange(n), n, (1, 2))
    assert np.array_equal(np.sort(whole), np.arange(n))
    assert np.array_equal(np.concatenate([permute(np.array([i]), n, (1, 2)) for i in range(min(n, 50))]), whole[:50])
    if n >= 64:
        assert not np.array_equal(permute(np.arange(n), n, (1, 3)), whole)
        assert abs(np.corrcoef(np.arange(n), whole)[0, 1]) < 4 / math.sqrt(n)
        assert (np.diff(whole) == 1).mean() < 0.1


def test_every_epoch_reads_every_window_once(data_config: DataConfig) -> None:
    data = PreparedData(data_config.dir, TINY.vocab_size)
    seq_len = 50
    n_windows = (len(data.tokens["train"]) - 1) // seq_len
    expected = sorted(data.tokens["train"][i * seq_len : (i + 1) * seq_len + 1].tolist() for i in range(n_windows))

    def rows_of(step: int, batch_size: int, seed: int = 4, rows: slice = slice(None)) -> np.ndarray:
        batch = data.batch(step, batch_size, seq_len, seed, rows)
        assert batch.tokens_BT.dtype == batch.targets_BT.dtype == np.int32
        assert (batch.weights_BT == 1).all()
        assert np.array_equal(batch.tokens_BT[:, 1:], batch.targets_BT[:, :-1])
        return np.concatenate([batch.tokens_BT, batch.targets_BT[:, -1:]], axis=1)

    rows = [row.tolist() for n in range(2 * n_windows) for row in rows_of(n, 1)]
    assert sorted(rows[:n_windows]) == expected
    assert sorted(rows[n_windows:]) == expected
    assert rows[:n_windows] != rows[n_windows:]
    assert not np.array_equal(rows_of(0, 8), rows_of(0, 8, seed=5))
    whole = rows_of(3, 8)
    assert np.array_equal(whole, np.concatenate([rows_of(n, 4) for n in (6, 7)]))
    assert np.array_equal(whole, np.concatenate([rows_of(3, 8, rows=slice(a, a + 2)) for a in (0, 2, 4, 6)]))
    assert np.array_equal(whole[1::3], rows_of(3, 8, rows=slice(1, None, 3)))


def test_held_out_windows_cover_every_token_once(data_config: DataConfig) -> None:
    data = PreparedData(data_config.dir, TINY.vocab_size)
    targets = [w.targets_BT[w.weights_BT == 1] for w in data.eval_batches("val", batch_size=7, seq_len=33)]
    assert np.concatenate(targets).tolist() == data.tokens["val"][1:].tolist()
    few = list(data.eval_batches("val", batch_size=3, seq_len=33, n_batches=2))
    assert [w.tokens_BT.shape for w in few] == [(3, 33)] * 2
    last_start = (len(data.tokens["val"]) - 2) // 33 * 33
    assert few[0].tokens_BT[0, 0] == data.tokens["val"][0]
    assert few[-1].tokens_BT[-1, 0] == data.tokens["val"][last_start], "the windows are not spread up to the last one"
    total = 2.0 * (len(data.tokens["val"]) - 1)  # nats, if every token costs 2
    expected = total / math.log(2) / data.index["val"]["n_bytes"]
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(709.9) == perplexity(math.inf) == math.inf, "exp overflows"
    assert bits_per_byte(2.0, data.tokens_per_byte("val")) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n_batches", [None, 1, 4, 10**6])
def test_the_number_of_batches_is_known(n_batches: int | None, data_config: DataConfig) -> None:
    data = PreparedData(data_config.dir, TINY.vocab_size)
    mixture = Mixture({"a": data, "b": data}, [Phase(0, (5000, 5000))])
    for shape in ((3, 33), (1, 1000), (64, 7)):
        for source in (data, mixture):
            assert len([*source.eval_batches("val", *shape, n_batches)]) == source.n_eval_batches(
                "val", *shape, n_batches
            )


@pytest.mark.parametrize("n_batches", [None, 2])
def test_padding_does_not_count(n_batches: int | None, data_config: DataConfig) -> None:
    """The held-out loss is the mean over real targets, whatever a model says about padding. Micro-batches, not whole
    batches, are evaluated."""
    data, rows = PreparedData(data_config.dir, TINY.vocab_size), []

    def eval_step(batch: Batch) -> np.ndarray:
        rows.append(len(batch.tokens_BT))
        return np.where(batch.weights_BT > 0, batch.targets_BT, np.nan)

    config = run_config(TINY, batch_size=14, grad_accum=2, seq_len=33).train
    loss = evaluate(eval_step, data, "val", config, n_batches).mean
    assert set(rows) == {7}
    assert n_batches is None or len(rows) == n_batches
    assert n_batches is not None or loss == pytest.approx(data.tokens["val"][1:].mean(), rel=1e-12)


def test_learning_rate_follows_original_schedule() -> None:
    config = OptimConfig(learning_rate=6e-4, min_learning_rate=6e-5, warmup_steps=1000)
    rates = [learning_rate(config, step, 10_000) for step in range(10_000)]
    assert rates[0] == pytest.approx(6e-4 / 1001)
    assert rates[999] == pytest.approx(6e-4 * 1000 / 1001)
    assert rates[1000] == max(rates) == 6e-4
    assert rates[5500] == pytest.approx((6e-4 + 6e-5) / 2)
    assert 6e-5 < rates[-1] < 6.001e-5


def damage(folder: Path, how: str) -> None:
    if how == "missing":
        (folder / "val-00000.bin").unlink()
    elif how == "truncated":
        (folder / "train-00000.bin").write_bytes((folder / "train-00000.bin").read_bytes()[:-2])
    elif how == "meta":
        (folder / "index.json").write_text("{")
    elif how == "no-meta":
        (folder / "index.json").unlink()
    elif how.startswith("token"):
        tokens = np.fromfile(folder / "train-00000.bin", "<u2")
        tokens[:] = int(how.removeprefix("token "))
        tokens.tofile(folder / "train-00000.bin")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"(?s)missing or truncated data file.*no file.*val-00000\.bin"),
        ("truncated", r"(?s)missing or truncated data file.*train-00000\.bin"),
        ("meta", "damaged data file"),
        ("no-meta", "not a folder of prepared data"),
        ("token 60000", r"(?s)token id outside the vocabulary.*below 512.*60000"),
        ("token 512", r"(?s)token id outside the vocabulary.*below 512.*512"),
    ],
)
def test_damaged_data(how: str, message: str, data_config: DataConfig, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data_config.dir, folder)
    damage(folder, how)
    with pytest.raises(InputError, match=message):
        PreparedData(folder, TINY.vocab_size).batch(0, 2, 16, 0)


def test_mismatched_data_is_refused(data_config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)vocabulary size differs.*expected: 4096.*found: 512"):
        PreparedData(data_config.dir, 4096)
    with pytest.raises(InputError, match="different holdout_every"):
        prepare_data(replace(data_config, holdout_every=7), TINY.vocab_size)
    with pytest.raises(InputError, match="too little text"):
        prepare_data(DataConfig(corpus=str(tmp_path), dir=str(tmp_path / "out")), 512)
    (tmp_path / "latin.txt").write_bytes("caf\xe9\n".encode("latin-1") * 500)
    with pytest.raises(InputError, match="not UTF-8"):
        prepare_data(DataConfig(corpus=str(tmp_path / "latin.txt"), dir=str(tmp_path / "out")), 512)
    (tmp_path / "small.txt").write_text("a few words\n" * 40)
    with pytest.raises(InputError, match="cannot train 5000 pieces"):
        prepare_data(DataConfig(corpus=str(tmp_path / "small.txt"), dir=str(tmp_path / "out")), 5000)
    assert not (tmp_path / "out").exists(), "a failed preparation must leave nothing"
    assert [path.name for path in tmp_path.glob(".out*")] == [".out.lock"]


def test_prepared_data_is_reused(data_config: DataConfig) -> None:
    before = json.loads((Path(data_config.dir) / "index.json").read_text())
    assert not prepare_data(data_config, TINY.vocab_size)
    assert json.loads((Path(data_config.dir) / "index.json").read_text()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 4}, "format version 4"),
        ({"format_version": 3}, "n_counted"),
        ({"tokenizer_sha256": None}, "damaged data file"),
        ({"val": {"n_tokens": 23433, "n_bytes": 0, "sha256": ""}}, "n_bytes is not positive"),
    ],
)
def test_damaged_meta_data(change: dict[str, object], message: str, data_config: DataConfig, tmp_path: Path) -> None:
    shutil.copytree(data_config.dir, tmp_path / "data")
    path = tmp_path / "data/index.json"
    meta = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in meta.items() if value is not None}))
    with pytest.raises(InputError, match=message):
        PreparedData(tmp_path / "data", TINY.vocab_size)


@pytest.mark.parametrize("name", ["tokenizer.model", "train-00000.bin", "val-00000.bin"])
def test_changed_files_are_named(name: str, data_config: DataConfig, tmp_path: Path) -> None:
    """One bit differs, or the tokenizer is missing."""
    shutil.copytree(data_config.dir, tmp_path / "data")
    path = tmp_path / "data" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    data = PreparedData(tmp_path / "data", TINY.vocab_size)
    with pytest.raises(InputError, match=rf"(?s)missing or was changed.*{name}"):
        data.verify()
    if name == "tokenizer.model":
        path.unlink()
        with pytest.raises(InputError, match=rf"(?s)missing or was changed.*{name}"):
            data.verify()
