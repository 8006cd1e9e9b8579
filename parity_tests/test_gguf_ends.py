"""Tokens that llama.cpp knows by their names: ends of a text, and single bytes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from minillm_core.interop.gguf import open_gguf, write_gguf
from minillm_core.interop.gguf_tokenizer import (
    ENDS,
    FIM_ENDS,
)
from minillm_core.text.tokenizer_json import load_tokenizer
from parity_tests.conftest import TINY, random_weights
from parity_tests.llama_cpp import LlamaCpp
from parity_tests.test_gguf_tokenizer import GOOD_LLAMA

pytestmark = pytest.mark.extended

NEWER = {"[e~["}
"""Names that the installed llama.cpp does not know yet."""


def ends_of(tokens: list[str], folder: Path, **more: int) -> tuple[set[int], set[int]]:
    """The ids at which the imported tokenizer ends a text, and those of llama.cpp."""
    n = len(tokens)
    fields: dict[str, Any] = GOOD_LLAMA | {
        "tokens": tokens,
        "scores": [0.0] * n,
        "token_type": [2, 3, 3] + [1] * (n - 3),
    }
    fields = {f"tokenizer.ggml.{key}": value for key, value in (fields | more).items()}
    config = dataclasses.replace(TINY, vocab_size=n)
    write_gguf(folder / "x.gguf", config, random_weights(config), "float32", fields)
    open_gguf(folder / "x.gguf").write_tokenizer(folder)
    llama = LlamaCpp(folder / "x.gguf")
    return set(load_tokenizer(folder, n).end_ids), {i for i in range(n) if llama.ends(i)}


@pytest.mark.parametrize("name", sorted(ENDS.union(*FIM_ENDS.values())))
def test_end_tokens_by_name(name: str, tmp_path: Path) -> None:
    """llama.cpp ends a text at tokens with these names, whatever the ids say; the imported tokenizer does the same."""
    ours, theirs = ends_of(["<unk>", "<s>", "<stop>", "a", "b", name], tmp_path)
    assert ours == {2, 5}
    assert theirs == ours or name in NEWER


@pytest.mark.parametrize(
    ("names", "ends"),
    [
        (["<|end|>", "<|call|>"], {2, 3, 4}),
        (["<|end|>", "<|call|>", "<|return|>"], {2, 4, 5}),
        (["<|end|>", "<|calls|>", "<|flush|>"], {2, 4, 5}),
        (["<|tool_response>", "</s>"], {2, 3}),
        (["<|fim_pad|>", "<|file_sep|>", ""], {2, 3, 4}),
    ],
)
def test_end_tokens_that_depend_on_others(names: list[str], ends: set[int], tmp_path: Path) -> None:
    ours, theirs = ends_of(["<unk>", "<s>", "<stop>", *names], tmp_path)
    assert ours == ends
    assert theirs == ours


def test_one_of_several_fill_in_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """llama.cpp takes one in the order of its hash table; with the key of the file it is certain."""
    tokens = ["<unk>", "<s>", "<stop>", "<PAD>", "[PAD]"]
    ours, theirs = ends_of(tokens, tmp_path)
    assert len(ours) == len(theirs) == 2
    assert "llama.cpp ends a text at one of <PAD>, [PAD]; here it ends at <PAD>" in caplog.text
    for given in (3, 4):
        (tmp_path / "generation_config.json").unlink()
        ours, theirs = ends_of(tokens, tmp_path, fim_pad_token_id=given)
        assert ours == theirs == {2, given}


@pytest.mark.parametrize("typed", [1, 3, 4, 5, 6])
def test_byte_tokens_by_name(typed: int, tmp_path: Path) -> None:
    """Whatever their types: files of an old converter have ordinary tokens."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"abcdefgh", "\u2581a", "he"]
    fields: dict[str, Any] = GOOD_LLAMA | {"tokens": tokens, "scores": [-float(i) for i in range(len(tokens))]}
    fields["token_type"] = [2, 3, 3] + [typed] * 256 + [1] * (len(tokens) - 259)
    fields = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    config = dataclasses.replace(TINY, vocab_size=len(tokens))
    write_gguf(tmp_path / "x.gguf", config, random_weights(config), "float32", fields)
    open_gguf(tmp_path / "x.gguf").write_tokenizer(tmp_path)
    llama, ours = LlamaCpp(tmp_path / "x.gguf"), load_tokenizer(tmp_path, len(tokens))
    for text in ("a\nb", "\u00e9", "\t", "\u65e5\U0001f600 z", *["he <0x0A>"] * (typed != 4)):
        assert ours.encode(text, bos=True) == llama.tokenize(text, bos=True), text


def test_a_token_may_look_like_a_byte(tmp_path: Path) -> None:
    """One such name is no set of byte tokens."""
    tokens = ["<unk>", "<s>", "</s>", "a", "<0x41>"]
    assert ends_of(tokens, tmp_path)[0] == {2}
    tokenizer = load_tokenizer(tmp_path, len(tokens))
    assert tokenizer.decode([3, 4]) == "a<0x41>"
