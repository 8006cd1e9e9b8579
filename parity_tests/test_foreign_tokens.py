"""Token files of other projects: nanoGPT's and the original's train.bin, and indexed datasets of Megatron-LM."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minillm_core.config import DataConfig
from minillm_core.data import foreign_tokens
from minillm_core.data.foreign_tokens import MAGIC
from minillm_core.data.prepared import PreparedData
from minillm_core.errors import InputError
from minillm_core.training.train import train
from parity_tests.conftest import BACKENDS, TINY, losses_of, metrics_of, text_run

pytestmark = pytest.mark.extended


def write_raw(folder: Path, tokens: dict[str, np.ndarray]) -> None:
    """As nanoGPT's prepare.py does."""
    for split, ids in tokens.items():
        ids.astype(np.uint16).tofile(folder / f"{split}.bin")


def write_megatron(folder: Path, tokens: dict[str, np.ndarray], dtype: str = "<i4", code: int = 4) -> None:
    """As Megatron-LM's IndexedDatasetBuilder does: three sequences, each a document."""
    for split, ids in tokens.items():
        ids.astype(dtype).tofile(folder / f"{split}.bin")
        sizes = np.array([10, 20, len(ids) - 30], np.int32)
        pointers = np.cumsum([0, *sizes[:-1]], dtype=np.int64) * np.dtype(dtype).itemsize
        header = MAGIC + struct.pack("<QBQQ", 1, code, len(sizes), len(sizes) + 1)
        bounds = np.arange(len(sizes) + 1, dtype=np.int64)
        (folder / f"{split}.idx").write_bytes(header + sizes.tobytes() + pointers.tobytes() + bounds.tobytes())


@pytest.fixture
def tokens(data_config: DataConfig) -> dict[str, np.ndarray]:
    data = PreparedData(data_config.dir, TINY.vocab_size)
    return {split: data.tokens[split][:] for split in ("train", "val")}


@pytest.mark.parametrize(
    ("write", "more"),
    [(write_raw, {}), (write_megatron, {}), (write_megatron, {"dtype": "<u2", "code": 8})],
    ids=["raw", "megatron", "megatron 16 bits"],
)
def test_they_are_read_as_they_are(
    write: Any, more: dict[str, Any], tokens: dict[str, np.ndarray], data_config: DataConfig, tmp_path: Path
) -> None:
    write(tmp_path, tokens, **more)
    ours, theirs = PreparedData(data_config.dir, TINY.vocab_size), PreparedData(tmp_path, TINY.vocab_size)
    theirs.verify()
    for step in range(5):
        assert np.array_equal(ours.batch(step, 4, 50, 1).targets_BT, theirs.batch(step, 4, 50, 1).targets_BT)
    assert theirs.tokens_per_byte("val") is None


def test_a_run_on_them(tokens: dict[str, np.ndarray], data_config: DataConfig, tmp_path: Path) -> None:
    """The same losses as on the same tokens, prepared here; no bits per byte: the size of the text is not known."""
    write_raw(tmp_path, tokens)
    for name, data in (("ours", data_config), ("theirs", DataConfig("unused", str(tmp_path)))):
        for _ in range(2):  # the second call finds the finished run
            train(text_run(data, tmp_path / name, steps=6, eval_every=3, checkpoint_every=3), BACKENDS["torch"])
    assert np.array_equal(losses_of(tmp_path / "ours", "torch"), losses_of(tmp_path / "theirs", "torch"))
    assert "bits_per_byte" not in metrics_of(tmp_path / "theirs", "torch")[-1]
    write_raw(tmp_path, {"train": tokens["train"][::-1]})
    with pytest.raises(InputError, match="uses a different training text"):
        train(text_run(data, tmp_path / "theirs", steps=6, eval_every=3, checkpoint_every=3), BACKENDS["torch"])


def test_large_files_are_known_by_both_ends(
    tokens: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign_tokens, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(foreign_tokens, "END_BYTES", 100)
    found = set()
    for change in (None, 0, 2999, 10_000):
        content = bytearray(3000 if change != 10_000 else 3002)
        if change in (0, 2999):
            content[change] = 1
        (tmp_path / "x").write_bytes(content)
        found.add(foreign_tokens.identity(tmp_path / "x"))
    assert len(found) == 4
    write_raw(tmp_path, tokens)
    data = PreparedData(tmp_path, TINY.vocab_size)
    data.verify()
    assert data.hashes()["train"] == foreign_tokens.identity(tmp_path / "train.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "train.bin").write_bytes(b"abc"), "damaged token file"),
        (lambda f: (f / "val.bin").write_bytes(b""), "damaged token file"),
        (lambda f: (f / "val.idx").write_bytes(b"MMID"), "damaged index of tokens"),
        (lambda f: (f / "val.idx").write_bytes((f / "val.idx").read_bytes()[:60]), "damaged index of tokens"),
        (lambda f: (f / "val.idx").write_bytes(MAGIC + struct.pack("<QBQQ", 1, 7, 0, 1)), "version 1, type 7"),
        (lambda f: (f / "val.idx").unlink(), "different types"),
        (lambda f: (f / "val.bin").unlink(), "not a folder of prepared data"),
    ],
)
def test_damage(damage: Any, message: str, tokens: dict[str, np.ndarray], tmp_path: Path) -> None:
    write_megatron(tmp_path, tokens)
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        PreparedData(tmp_path, TINY.vocab_size)


@pytest.mark.parametrize("wrong", [512, -1, 2**32 + 5])
def test_ids_beyond_the_vocabulary(wrong: int, tokens: dict[str, np.ndarray], tmp_path: Path) -> None:
    changed = tokens["train"].astype(np.int64)
    changed[:] = wrong
    write_megatron(tmp_path, {**tokens, "train": changed}, "<i8", 5)
    with pytest.raises(InputError, match=rf"(?s)outside the vocabulary.*found: {wrong}.*train\.bin"):
        PreparedData(tmp_path, TINY.vocab_size).batch(0, 2, 16, 0)
