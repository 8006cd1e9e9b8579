"""Reads and writes tokenizers in GGUF files: SentencePiece BPE (`llama` in llama.cpp) and byte-level BPE (`gpt2`)."""

import itertools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from minillm_core.errors import InputError
from minillm_core.text.chat_template import read_chat_template
from minillm_core.text.tokenizer import (
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    ModelProto,
    Tokenizer,
)
from minillm_core.text.tokenizer_json import SPACE, JsonTokenizer, bos_template

logger = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens. GGUF uses the numbers of SentencePiece."""

# fmt: off
ENDS = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[",
))
"""Names of tokens at which llama.cpp always ends a text, independent of the ids in the file (src/llama-vocab.cpp)."""

FIM_ENDS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
# fmt: on
"""Tokens of fill-in-the-middle at which it also ends: key of the file -> names, one of which counts without the key."""


def end_ids(tokens: Sequence[str], special: Mapping[str, int]) -> set[int]:
    """The tokens at which llama.cpp ends a text.

    Args:
        special: the ids that the file gives by name (`eos`, `eot`, `eom`, `fim_pad`, ...); missing or negative: none.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    ends = {special[key] for key in ("eos", "eot", "eom") if special.get(key, -1) >= 0}
    ends |= {ids[name] for name in ENDS & ids.keys()}
    for key, names in FIM_ENDS.items():
        found = [name for name in names if name in ids]
        if (given := special.get(key, -1)) >= 0:
            ends.add(given)
        elif found:
            ends.add(ids[found[0]])
        if given < 0 and len(found) > 1:
            logger.warning(f"llama.cpp ends a text at one of {', '.join(found)}; here it ends at {found[0]}")
    at = {tokens[i] for i in ends}
    # llama.cpp's exceptions, for models that use these two names inside of a text
    if "<|end|>" in at and at & {"<|call|>", "<|calls|>"} and at & {"<|return|>", "<|flush|>"}:
        ends.remove(ids["<|end|>"])
    if {"<|tool_response>", "</s>"} <= at:
        ends.remove(ids["</s>"])
    return ends


BYTE_NAME = re.compile("<0x[0-9A-F]{2}>")
"""llama.cpp finds the tokens of single bytes by their names, whatever their types (SentencePiece models). One of them
alone is an ordinary token."""

AGAIN = "get the file again"

NO_TOKENIZER = {"tokenizer.ggml.model": "no_vocab"}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "llama-bpe": (
        [
            {"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated", "invert": False},
            _byte_level(use_regex=False),
        ],
        True,
    ),
    "smollm": ([{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)], False),
    "gpt-2": ([_byte_level(use_regex=True)], False),
}
"""Name in llama.cpp -> its settings in tokenizer.json: the pre-tokenizers, and `ignore_merges` (a word that is itself a
token is not split, independent of the merges)."""

ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "gpt2": "gpt-2"}


def tokenizer_fields(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """llama.cpp's keys of a tokenizer. Embedding rows without a token get unused tokens.

    Raises:
        InputError: llama.cpp would give different ids, or a file next to the tokenizer is damaged.
    """
    if not tokenizer.fits(vocab_size):
        hint = "put the model's own tokenizer files into its checkpoint"
        raise InputError(
            "the tokenizer belongs to a different model", expected=vocab_size, found=tokenizer.vocab_size, hint=hint
        )
    make = _of_json if isinstance(tokenizer, JsonTokenizer) else _of_sentencepiece
    fields = {f"tokenizer.ggml.{key}": value for key, value in make(tokenizer, vocab_size).items()}
    more_ends = sorted(tokenizer.end_ids - {tokenizer.eos_id})
    fields |= {f"tokenizer.ggml.{key}_token_id": i for key, i in zip(("eot", "eom"), more_ends, strict=False)}
    tokens = fields["tokenizer.ggml.tokens"]
    given = {"eos": tokenizer.eos_id, **dict(zip(("eot", "eom"), more_ends, strict=False))}
    theirs = end_ids(tokens, given)
    if lost := sorted(tokenizer.end_ids - theirs):
        logger.warning(
            f"llama.cpp will not end a text at {', '.join(tokens[i] for i in lost)} (GGUF names at most three ends)"
        )
    if more := [tokens[i] for i in sorted(theirs - tokenizer.end_ids)]:
        logger.warning(
            f"llama.cpp will also end a text at {', '.join(more)}: it treats every token of such a name as an end"
        )
    if (template := read_chat_template(tokenizer.path.parent)) is not None:
        fields["tokenizer.chat_template"] = template
    return fields


def _of_sentencepiece(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    proto = ModelProto.FromString(tokenizer.content)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    symbols = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    problems = {
        "not a BPE model": trainer.model_type != trainer.BPE,
        "no byte fallback": not trainer.byte_fallback,
        "text is normalised": bool(normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces),
        "unusual handling of spaces": trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces,
        "unused tokens": any(piece.type == UNUSED for piece in proto.pieces),
        "user-defined symbols with spaces": any({" ", SPACE} & {*symbol} for symbol in symbols),
        "user-defined symbols that overlap": overlap(symbols),
        # llama.cpp also inserts a space after each user-defined symbol
        "a space before a text together with user-defined symbols": normalizer.add_dummy_prefix and bool(symbols),
    }
    _refuse(problems, "a BPE model that does not change the text", tokenizer.path)
    padding = range(len(proto.pieces), vocab_size)
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unknown": trainer.unk_id, "padding": trainer.pad_id}
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [*(piece.piece for piece in proto.pieces), *(f"[PAD{i}]" for i in padding)],
        "scores": [*(piece.score for piece in proto.pieces), *(0.0 for _ in padding)],
        "token_type": [*(piece.type for piece in proto.pieces), *(UNUSED for _ in padding)],
        **{f"{name}_token_id": i for name, i in ids.items() if i >= 0},
        "add_bos_token": tokenizer.adds_bos,
        "add_eos_token": False,
        "add_space_prefix": normalizer.add_dummy_prefix,
        "remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
    }


def _of_json(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    data = json.loads(tokenizer.path.read_text(encoding="utf-8"))
    model, steps = data["model"], data.get("pre_tokenizer") or {}
    steps = [
        {"use_regex": True} | step | {"trim_offsets": True} if step.get("type") == "ByteLevel" else step
        for step in steps.get("pretokenizers", [steps])
    ]
    found = (steps, bool(model.get("ignore_merges")))
    name = next((name for name, known in PRE_TOKENIZERS.items() if known == found), None)
    begin = tokenizer.encode("", bos=True)
    symbols = [token["content"] for token in data.get("added_tokens") or [] if not token["special"]]
    added = data.get("added_tokens") or []
    problems = {
        "its pre-tokenizer": name is None,
        "its normalizer": data.get("normalizer") is not None,
        "its model": model.get("type") != "BPE" or any(model.get(key) for key in ("dropout", "byte_fallback")),
        "its prefixes and suffixes": any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")),
        "the tokens that it puts before a document": begin not in ([], [tokenizer.bos_id]),
        "its added tokens": any(
            not token["special"] and any(token[key] for key in ("lstrip", "rstrip", "single_word")) for token in added
        )
        or overlap(symbols),
    }
    _refuse(problems, f"a byte-level BPE like one of {', '.join(PRE_TOKENIZERS)}", tokenizer.path)
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    for text, i in model["vocab"].items():
        tokens[i], types[i] = text, NORMAL
    for token in added:
        tokens[token["id"]], types[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    return {
        "model": "gpt2",
        "pre": name,
        "tokens": tokens,
        "token_type": types,
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]] or [""],
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "add_bos_token": tokenizer.adds_bos,
        "add_eos_token": False,
    }


def overlap(symbols: list[str]) -> bool:
    """Whether one symbol can begin inside another. Then llama.cpp takes the longest first, but others the leftmost."""
    owners: dict[str, set[str]] = {}
    for symbol in symbols:
        for end in range(1, len(symbol)):
            owners.setdefault(symbol[:end], set()).add(symbol)
    return any(owners.get(symbol[start:], set()) - {symbol} for symbol in symbols for start in range(1, len(symbol)))


def _refuse(problems: dict[str, bool], expected: str, where: Path) -> None:
    if found := ", ".join(problem for problem, is_there in problems.items() if is_there):
        problem, hint = (
            "llama.cpp would not give the same ids as this tokenizer",
            "tokenise outside llama.cpp, and give it token ids",
        )
        raise InputError(problem, expected=expected, found=found, where=where, hint=hint)


def tokenizer_files(fields: dict[str, Any], where: Path) -> dict[str, bytes]:
    """The files that `load_tokenizer` reads (name -> content), made from the keys of a GGUF file.

    Raises:
        InputError: there is no tokenizer, its kind is not supported, or its keys contradict each other.
    """

    def get(key: str, kind: type, default: Any) -> Any:
        value = fields.get(f"tokenizer.ggml.{key}", default)
        if value is not default and type(value) is not kind:
            expected, found = kind.__name__, str(value)[:60]
            raise InputError(f"damaged tokenizer: {key}", expected=expected, found=found, where=where, hint=AGAIN)
        return value

    model, tokens = get("model", str, "no_vocab"), get("tokens", list, [])
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]  # the names that llama.cpp gives them
    if get("add_eos_token", bool, False):
        logger.warning(
            "the file asks for an end-of-document token after every text; this project does not add it to a prompt"
        )
    types = get("token_type", np.ndarray, np.full(len(tokens), NORMAL)).tolist()
    names = ("bos", "eos", "unknown", "padding", "eot", "eom", *FIM_ENDS)
    special = {name: get(f"{name}_token_id", int, -1) for name in names}
    if model not in ("llama", "gpt2"):
        expected = "llama (SentencePiece BPE) or gpt2 (byte-level BPE)"
        problem, hint = "no supported tokenizer", "import the Hugging Face checkpoint from which the file was made"
        raise InputError(problem, expected=expected, found=model[:60], where=where, hint=hint)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens) or max(special.values()) >= len(tokens):
        expected = "as many types as tokens, no duplicate tokens, and special ids below the number of tokens"
        raise InputError("damaged tokenizer", expected=expected, where=where, hint=AGAIN)
    if special["eos"] < 0:
        expected = "tokenizer.ggml.eos_token_id"
        raise InputError("no end-of-document token", expected=expected, where=where, hint=AGAIN)
    files = {}
    if isinstance(template := fields.get("tokenizer.chat_template"), str):
        files[CHAT_TEMPLATE] = template.encode()
    ends = end_ids(tokens, special)
    if ends != {special["eos"]}:
        files[GENERATION_CONFIG] = json.dumps({"eos_token_id": sorted(ends)}).encode()
    if model == "llama":
        scores = get("scores", np.ndarray, np.empty(0)).tolist()
        if len(scores) != len(tokens):
            raise InputError("damaged tokenizer", expected="as many scores as tokens", where=where, hint=AGAIN)
        prefix = get("add_space_prefix", bool, True)
        is_byte = [bool(BYTE_NAME.fullmatch(token)) for token in tokens]
        if sum(is_byte) == 256:
            if USER_DEFINED in itertools.compress(types, is_byte):
                logger.warning("llama.cpp also finds the names of byte tokens in a text; this project does not")
            types = [BYTE if byte else kind for byte, kind in zip(is_byte, types, strict=True)]
        tokens = [t.replace(" ", SPACE) if kind == USER_DEFINED else t for t, kind in zip(tokens, types, strict=True)]
        if prefix and USER_DEFINED in types:
            example = tokens[types.index(USER_DEFINED)]
            logger.warning(
                f"llama.cpp inserts a space after tokens such as {example[:60]!r} inside a text; this project does not"
            )
        if not get("add_bos_token", bool, True):
            files[TOKENIZER_CONFIG] = json.dumps({"add_bos_token": False}).encode()
        return files | {"tokenizer.model": _sentencepiece(tokens, scores, types, special, prefix)}
    pre = get("pre", str, "missing")
    if ALIASES.get(pre, pre) not in PRE_TOKENIZERS:
        expected = ", ".join(PRE_TOKENIZERS)
        problem, hint = (
            "the pre-tokenizer is not supported",
            "import the Hugging Face checkpoint from which the file was made",
        )
        raise InputError(problem, expected=expected, found=pre[:60], where=where, hint=hint)
    merges = [merge.split(" ", 2) for merge in get("merges", list, []) if merge]
    if not all(len(merge) == 2 for merge in merges):
        raise InputError("damaged tokenizer", expected="merges of two tokens", where=where, hint=AGAIN)
    add_bos = get("add_bos_token", bool, ALIASES.get(pre, pre) == "llama-bpe") and special["bos"] >= 0
    data, settings = _tokenizer_json(tokens, types, merges, ALIASES.get(pre, pre), special, add_bos)
    files[TOKENIZER_CONFIG] = json.dumps(settings).encode()
    return files | {"tokenizer.json": json.dumps(data).encode()}


def _sentencepiece(
    tokens: list[str],
    scores: list[float],
    types: list[int],
    special: dict[str, int],
    add_space_prefix: bool,
) -> bytes:
    proto = ModelProto()
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.vocab_size = trainer.BPE, len(tokens)
    trainer.byte_fallback = BYTE in types
    normalizer.name = "identity"
    # llama.cpp never removes spaces: it ignores the key remove_extra_whitespaces
    normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = add_space_prefix, False
    try:
        for token, score, kind in zip(tokens, scores, types, strict=True):
            proto.pieces.add(piece=token, score=score, type=kind)
    except (ValueError, TypeError) as error:  # an unknown type
        raise InputError("damaged tokenizer", found=error, hint=AGAIN) from error
    for ours, theirs in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        i = special[theirs]
        if theirs == "unknown" and i < 0 and UNKNOWN in types:
            i = types.index(UNKNOWN)
        setattr(trainer, f"{ours}_id", i)
        if i >= 0:
            setattr(trainer, f"{ours}_piece", tokens[i])
    content: bytes = proto.SerializeToString()
    try:
        made = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise InputError("damaged tokenizer", found=error, hint=AGAIN) from error
    if (made.bos_id(), made.eos_id()) != (special["bos"], special["eos"]):
        expected = "control tokens that begin and end a document"
        raise InputError("damaged tokenizer", expected=expected, found=special, hint=AGAIN)
    return content


def _tokenizer_json(
    tokens: list[str], types: list[int], merges: list[list[str]], pre: str, special: dict[str, int], add_bos: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of tokenizer.json and of tokenizer_config.json."""
    steps, ignore_merges = PRE_TOKENIZERS[pre]
    post = bos_template(tokens[special["bos"]], special["bos"]) if add_bos else _byte_level(use_regex=True)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": token, **flags, "special": kind != USER_DEFINED}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": post,
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED},
            "merges": merges,
        },
    }
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {f"{name}_token": tokens[special[name]] for name in ("bos", "eos") if special[name] >= 0}
    return data, settings
