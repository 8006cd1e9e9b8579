"""What the command says about a folder of prepared data."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from minillm_core.data.assemble import Holdout
from minillm_core.data.inspect import inspect_data
from minillm_core.data.prepare import prepare
from minillm_core.text.tokenizer import Tokenizer
from parity_tests.commands import fails, script_here, succeeds_here
from parity_tests.test_corpus import as_version_0_1
from parity_tests.test_prepare import plan_for

pytestmark = pytest.mark.extended

TEXTS = {"a.txt": "one two\fthree\f" + "the people of the United States " * 40, "b.md": "four\ffive"}


@pytest.fixture
def folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "in" / name).write_bytes(text.encode())
    prepare(plan_for([tmp_path / "in"], tokenizer, holdout=Holdout(every=5)), tmp_path / "data")
    return tmp_path / "data"


def test_counts_lengths_sources_and_samples(folder: Path, tokenizer: Tokenizer) -> None:
    report = inspect_data(folder, n_samples=10)
    train, val = report.splits["train"], report.splits["val"]
    texts = [*TEXTS["a.txt"].split("\f"), "four"]
    lengths = [len(tokenizer.encode(text)) + 2 for text in texts]
    assert train.lengths.tolist() == lengths
    assert train.n_tokens == sum(lengths)
    own = {Path(path).name: count for path, count in train.tokens_of_source.items()}
    assert own == {"a.txt": sum(lengths[:3]), "b.md": lengths[3]}
    assert train.samples[:2] == ("one two", "three")
    assert texts[2].startswith(train.samples[2])
    assert val.samples == ("five",)
    assert report.damaged == ()


def test_command(folder: Path, tmp_path: Path) -> None:
    done = succeeds_here("inspect_data", "data", "--out", "lengths.png", "--samples", "1", cwd=tmp_path)
    assert "4 documents; tokens of a document" in done.stdout
    assert "all files are intact" in done.stdout
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    np.full(5, 9, "<u2").tofile(folder / "val-00000.bin")
    fails("truncated data file.*val-00000", "inspect_data", "data", cwd=tmp_path)
    fails("not a folder of prepared data", "inspect_data", "in", cwd=tmp_path)


@pytest.mark.parametrize("name", ["train-00000.bin", "val-00000.bin", "train.documents", "val.documents"])
def test_damage(name: str, folder: Path, tmp_path: Path) -> None:
    path = folder / name
    original = bytearray(path.read_bytes())
    changed = [original[:5] + bytes([original[5] ^ 1]) + original[6:]]
    for content in changed + [original[:-8], b""] * name.endswith(".documents"):
        path.write_bytes(content)
        done = script_here("inspect_data", "data", cwd=tmp_path)
        assert done.returncode == 1
        assert f"DAMAGED: data/{name}" in done.stdout
    path.write_bytes(original)
    (folder / "tokenizer_config.json").write_text("{}")
    assert "DAMAGED: data/the tokenizer's files" in script_here("inspect_data", "data", cwd=tmp_path).stdout
    fails("samples is out of range", "inspect_data", "data", "--samples", "-1", cwd=tmp_path)


def test_data_of_an_earlier_version(data_config: object, tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    """Without the index of the documents, sizes and a sample are shown."""
    shutil.copytree(folder, tmp_path / "old")
    index = json.loads((folder / "index.json").read_text()) | {"corpus": "x", "holdout_every": 5}
    (tmp_path / "old" / "index.json").write_text(json.dumps(index))
    as_version_0_1(tmp_path / "old")
    report = inspect_data(tmp_path / "old")
    assert report.splits["train"].samples[0].startswith("one two")
    assert len(report.splits["train"].lengths) == 0
