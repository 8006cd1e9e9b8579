"""Tokenizers trained on any text: lossless, of both kinds, in bounded memory."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm_core.errors import InputError
from minillm_core.text import train_tokenizer as module
from minillm_core.text.report import compare_tokenizers
from minillm_core.text.samples import SAMPLES
from minillm_core.text.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID, ModelProto, Tokenizer
from minillm_core.text.train_tokenizer import Kind, sample_lines, train_tokenizer
from parity_tests.commands import fails, succeeds_here
from parity_tests.test_gguf_tokenizer import train
from parity_tests.test_hf_tokenizer import byte_level

pytestmark = pytest.mark.extended

HARD = [
    "",
    " ",
    "  two  ",
    "a\n\n b\t",
    "12345",
    "caf\u00e9 \u65e5\u672c \U0001f469\u200d\U0001f467",
    "<user>hi</s><s>",
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("trained") / "tokenizer.model"
    texts = [file.read_text(encoding="utf-8") for file in sorted(corpus.iterdir())]
    train_tokenizer(texts, 600, path, kind=request.param, symbols=["<user>", "<assistant>"])
    return Tokenizer(path)


def test_both_kinds_are_lossless(trained: Tokenizer, corpus: Path) -> None:
    assert trained.vocab_size == 600
    assert (trained.bos_id, trained.eos_id) == (BOS_ID, EOS_ID)
    proto = ModelProto.FromString(trained.content)
    assert (proto.trainer_spec.unk_id, proto.trainer_spec.pad_id) == (UNK_ID, PAD_ID)
    for text in (*HARD, *(file.read_text(encoding="utf-8") for file in sorted(corpus.iterdir())[:3])):
        ids = trained.encode(text)
        assert trained.decode(ids) == text
        assert {UNK_ID, BOS_ID, EOS_ID, PAD_ID}.isdisjoint(ids)
    (user,) = trained.encode("<user>")
    assert trained.encode("a<user>b").count(user) == 1


def test_the_ids_of_a_text_are_those_of_its_lines(trained: Tokenizer, corpus: Path) -> None:
    """Documents are encoded line by line."""
    assert trained.splits_at_newlines
    for text in (*HARD, "\n\n\nx\n \n", (sorted(corpus.iterdir())[0]).read_text(encoding="utf-8")):
        lines = [line + "\n" for line in text.split("\n")[:-1]] + [text.split("\n")[-1]]
        assert [id for line in lines for id in trained.encode(line)] == trained.encode(text)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.text("ab \u00e9\n", max_size=30), max_size=20), st.integers(1, 200), st.integers(1, 60))
def test_a_sample_of_lines(texts: list[str], n_bytes: int, n_lines: int) -> None:
    lines = [line for text in texts for line in text.split("\n") if line]
    found = list(sample_lines(texts, n_bytes, n_lines))
    assert found == list(sample_lines(iter(texts), n_bytes, n_lines)), "the same texts give the same sample"
    sizes = [len(line.encode()) for line in found]
    assert sum(sizes) <= n_bytes or len(found) == 1
    assert len(found) <= n_lines
    if sum(len(line.encode()) for line in lines) <= n_bytes and len(lines) <= n_lines:
        assert found == lines
    remaining = iter(lines)
    assert all(line in remaining for line in found), "the order of the text is kept"


def test_a_sample_is_drawn_from_the_whole_text() -> None:
    texts = [f"{i:05}\n" for i in range(20_000)]
    for n_bytes, n_lines in ((5_000, 10**9), (10**9, 1000)):
        found = [int(line) for line in sample_lines(texts, n_bytes, n_lines)]
        assert len(found) == 1000
        assert 9_000 < sum(found) / len(found) < 11_000


def test_the_same_text_gives_the_same_tokenizer(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if only a sample of the lines is used."""
    monkeypatch.setattr(module, "SAMPLE_LINES", 200)
    texts = [file.read_text(encoding="utf-8") for file in sorted(corpus.iterdir())]
    for name in ("a", "b"):
        train_tokenizer(texts, 400, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_advice_about_the_vocabulary_works(kind: Kind, tmp_path: Path) -> None:
    texts = ["the people of the United States\n" * 50]
    with pytest.raises(InputError, match="cannot train 5000 pieces") as refused:
        train_tokenizer(texts, 5000, tmp_path / "x.model", kind=kind)
    advised = int("".join(filter(str.isdigit, str(refused.value).splitlines()[-1])))
    train_tokenizer(texts, advised, tmp_path / "x.model", kind=kind)
    assert Tokenizer(tmp_path / "x.model").vocab_size == advised
    with pytest.raises(InputError, match="a symbol cannot be a piece"):
        train_tokenizer(texts, advised, tmp_path / "x.model", symbols=["<a>", "<a>"])


def test_command(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--out", "my.model", "--vocab-size", "500", "--kind", "unigram")
    done = succeeds_here("train_tokenizer", str(corpus), *options, cwd=tmp_path)
    assert done.stdout == "my.model: 500 pieces\n"
    fails("the output exists already", "train_tokenizer", str(corpus), *options, cwd=tmp_path)
    fails("the input does not exist", "train_tokenizer", "nowhere", "--out", "new.model", cwd=tmp_path)
    monkeypatch.setattr(module, "SAMPLE_BYTES", 20_000)
    succeeds_here("train_tokenizer", str(corpus), "--out", "small.model", "--vocab-size", "500", cwd=tmp_path)


def test_report(corpus: Path, tmp_path: Path) -> None:
    """BPE, Unigram and a foreign tokenizer on text of many kinds."""
    files = sorted(corpus.iterdir())
    texts = [file.read_text(encoding="utf-8") for file in files[1:]]
    for kind in get_args(Kind):
        train_tokenizer(texts, 600, tmp_path / f"{kind}.model", kind=kind)
    (tmp_path / "foreign").mkdir()
    byte_level(tmp_path / "foreign", 512)
    options = ("--report", "bpe.model", "unigram.model", "foreign")
    done = succeeds_here("train_tokenizer", str(files[0]), *options, "--html", "page.html", cwd=tmp_path)
    header, *rows = done.stdout.splitlines()
    assert header.split("  ")[0] == "sample"
    assert len(rows) == 3 * 11
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<tr>") == len(rows) + 1
    assert "data:image/png;base64," in page

    found = json.loads(succeeds_here("train_tokenizer", str(files[0]), *options, "--json", cwd=tmp_path).stdout)
    by_name = {(row["tokenizer"], row["sample"]): row for row in found}
    prose = files[0].read_text(encoding="utf-8")
    bpe = Tokenizer(tmp_path / "bpe.model")
    own = by_name["bpe.model", "prose"]
    assert own["n_tokens"] == len(bpe.encode(prose))
    assert (own["n_bytes"], own["n_words"]) == (len(prose.encode()), len(prose.split()))
    for name in options[1:3]:
        assert all(by_name[name, sample]["is_lossless"] for sample in ("prose", *SAMPLES)), name
        assert by_name[name, "Chinese"]["n_partial"] > by_name[name, "Chinese"]["n_tokens"] / 2, "bytes of characters"
        assert by_name[name, "prose"]["n_partial"] == by_name[name, "prose"]["n_unknown"] == 0
    fails("given twice", "train_tokenizer", str(files[0]), "--report", "foreign", "foreign", cwd=tmp_path)
    fails("nothing to do", "train_tokenizer", str(files[0]), cwd=tmp_path)
    fails("only for --report", "train_tokenizer", str(files[0]), "--out", "x.model", "--json", cwd=tmp_path)
    fails("no input.*takes all words after it", "train_tokenizer", "--report", str(files[0]), cwd=tmp_path)
    text = str(files[0])
    fails(f"not a tokenizer.*where: {re.escape(text)}", "train_tokenizer", text, "--report", text, cwd=tmp_path)
    fails("no tokenizer", "train_tokenizer", str(files[0]), "--report", "none.model", cwd=tmp_path)


def test_unknown_characters_are_counted(corpus: Path, tmp_path: Path) -> None:
    """A tokenizer without byte fallback loses characters."""
    lines = [line for file in sorted(corpus.iterdir()) for line in file.read_text(encoding="utf-8").split("\n") if line]
    tokenizer = train(tmp_path, lines, byte_fallback=False)
    (row,) = [m for m in compare_tokenizers({"x": tokenizer}, "text") if m.sample == "Korean"]
    assert row.n_unknown > 0
    assert not row.is_lossless
