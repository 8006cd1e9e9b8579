"""Damaged, hostile and unsupported GGUF files are refused, with the problem named and in bounded memory."""

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import minillm_core.interop.gguf as ours
from minillm_core.errors import InputError
from minillm_core.interop.gguf import gguf_name, open_gguf, rope_factors, write_gguf
from minillm_core.interop.gguf_tokenizer import NO_TOKENIZER, tokenizer_fields
from minillm_core.interop.imports import import_checkpoint
from minillm_core.tensors import Tensors
from minillm_core.text.tokenizer import Tokenizer
from minillm_core.text.tokenizer_json import load_tokenizer
from parity_tests.conftest import (
    BACKENDS,
    TINY,
    random_weights,
)
from parity_tests.test_gguf import EMBEDDING, NORM, write

pytestmark = pytest.mark.extended

Fields = dict[str, Any]


def damaged(path: Path, fields: Fields, tensors: Tensors) -> Path:
    """A valid file of the `gguf` package, with some keys and tensors changed, or omitted if they are None."""
    writer = gguf.GGUFWriter(path, "llama")
    everything = {"general.type": "model", **ours.config_fields(TINY), **NO_TOKENIZER} | fields
    for key, value in everything.items():
        if value is not None and key != "general.architecture":
            kind = gguf.GGUFValueType.get_type(value)
            writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.INT32 else kind)
    if "general.architecture" in fields:
        writer.kv_data[0]["general.architecture"].value = fields["general.architecture"]
    writer.data_alignment = fields.get("general.alignment", writer.data_alignment)
    for name, array in ({gguf_name(name): array for name, array in random_weights(TINY).items()} | tensors).items():
        if array is not None:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("fields", "tensors", "named"),
    [
        ({"general.architecture": "qwen2"}, {}, "qwen2"),
        ({"general.type": "adapter"}, {}, "adapter"),
        ({"split.count": 2}, {}, "(?s)2 parts.*llama-gguf-split --merge"),
        ({"llama.expert_count": 8}, {}, "expert_count: 8"),
        ({"llama.attention.sliding_window": 512}, {}, "sliding_window"),
        ({"llama.attention.causal": False}, {}, "causal"),
        ({"llama.rope.scaling.type": "yarn"}, {}, "yarn"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, {}, "linear"),
        ({"llama.rope.dimension_count": 8}, {}, "dimension_count: 8"),
        ({"llama.attention.value_length": 8}, {}, "value_length: 8"),
        ({"llama.logit_scale": 0.5}, {}, "logit_scale"),
        ({"llama.feed_forward_length": [96, 64]}, {}, "feed_forward_length"),
        ({"llama.attention.head_count_kv": 3}, {}, "n_kv_heads"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, {}, "rms_epsilon"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, {}, "rms_epsilon"),
        ({"llama.rope.freq_base": float("inf")}, {}, "freq_base"),
        ({"llama.context_length": 1 << 31}, {}, "context_length"),
        ({"llama.context_length": "long"}, {}, "context_length: expected"),
        ({"llama.embedding_length": None}, {}, "embedding_length"),
        ({"llama.block_count": 1 << 20}, {}, "more layers than tensors"),
        ({"llama.vocab_size": 600}, {}, "shape: model.embed_tokens"),
        ({}, {"blk.0.attn_q.bias": np.zeros(64, np.float32)}, "unexpected: blk.0.attn_q.bias"),
        ({}, {"blk.0.ffn_gate_exps.weight": np.zeros((2, 4, 4), np.float32)}, "unexpected: blk.0.ffn_gate_exps"),
        ({}, {NORM: None}, "missing: model.norm.weight"),
        ({}, {NORM: np.zeros(3, np.float32)}, "shape: model.norm"),
        ({}, {NORM: np.full(48, np.nan, np.float32)}, "not finite"),
        ({}, {EMBEDDING: np.full((512, 48), np.inf, np.float16)}, "not finite"),
        ({}, {NORM: np.zeros(48, np.int8)}, "I8"),
        ({}, {"rope_freqs.weight": np.array([1, 1, 1, 1, 1, 1, 1, 9], np.float32)}, "not Llama 3's scaling"),
        ({}, {"rope_freqs.weight": np.full(8, np.nan, np.float32)}, "not Llama 3's scaling"),
        ({}, {"rope_freqs.weight": np.ones(5, np.float32)}, "wrong shape of rope_freqs"),
    ],
)
def test_unsupported_models_are_refused(fields: Fields, tensors: Tensors, named: str, tmp_path: Path) -> None:
    """The message names the problem, and nothing is written."""
    with pytest.raises(InputError, match=named) as refused:
        import_checkpoint("gguf", damaged(tmp_path / "x.gguf", fields, tensors), tmp_path / "run", BACKENDS["torch"])
    assert "what to do: " in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_harmless_keys_are_accepted(tmp_path: Path) -> None:
    """Omitted defaults, RoPE factors of 1, and keys that switch a feature off."""
    fields = dict.fromkeys((f"llama.attention.{name}_length" for name in ("key", "value")), 16)
    fields |= {"llama.rope.freq_base": None, "llama.vocab_size": None, "llama.rope.dimension_count": None}
    fields |= {"llama.expert_count": 0, "llama.rope.scaling.type": "none", "minillm.init_std": None}
    opened = open_gguf(damaged(tmp_path / "x.gguf", fields, {"rope_freqs.weight": np.ones(8, np.float32)}))
    assert opened.config == TINY
    assert rope_factors(TINY).tolist() == [1.0] * 8
    content = bytearray((tmp_path / "x.gguf").read_bytes())
    content[4] = 2  # the layout of version 2 is the same
    (tmp_path / "x.gguf").write_bytes(content)
    assert open_gguf(tmp_path / "x.gguf").config == TINY


def test_alignment_of_the_data(tmp_path: Path) -> None:
    """The data begins at the alignment that the file names. Headers of eight lengths."""
    weights = random_weights(TINY)
    for n in range(0, 256, 32):
        path = damaged(tmp_path / "x.gguf", {"general.alignment": 256, "general.name": "x" * (n + 1)}, {})
        file = open_gguf(path).file
        for name in ("model.norm.weight", "model.embed_tokens.weight"):
            assert np.array_equal(file.read(gguf_name(name)), weights[name]), (n, name)


def header(fields: bytes = b"", tensors: bytes = b"", n_fields: int = 0, n_tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_fields) + fields + tensors


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


HOSTILE = {
    "empty": (b"", "found: 0 bytes"),
    "no magic": (b"GGML" + bytes(60), "not a GGUF file"),
    "version": (header(version=4), "unsupported version"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "2^63 keys": (header(n_fields=1 << 63), "no model has more"),
    "2^63 tensors": (header(n_tensors=1 << 63), "no model has more"),
    "2^16 keys": (header(n_fields=1 << 16), "ends after the file"),
    "2^16 tensors": (header(n_tensors=1 << 16), "ends after the file"),
    "a long key": (header(struct.pack("<Q", 1 << 62), n_fields=1), "ends after the file"),
    "a long array": (header(text(b"a") + struct.pack("<IIQ", 9, 0, 1 << 60) + bytes(9), n_fields=1), "ends after"),
    "a long list": (header(text(b"a") + struct.pack("<IIQ", 9, 8, 1 << 60) + bytes(9), n_fields=1), "ends after"),
    "nested arrays": (header(text(b"a") + struct.pack("<IIQ", 9, 9, 1), n_fields=1), "array of type 9"),
    "unknown value type": (header(text(b"a") + struct.pack("<I", 13), n_fields=1), "value of type 13"),
    "not UTF-8": (header(text(b"\xff") + struct.pack("<I", 13), n_fields=1), "utf-8"),
    "a key twice": (header((text(b"a") + struct.pack("<Ib", 1, 1)) * 2, n_fields=2), "'a' occurs twice"),
    "alignment": (header(text(b"general.alignment") + struct.pack("<II", 4, 33), n_fields=1), "alignment of 33"),
    "a tensor twice": (header(tensors=tensor(b"a", (1,)) * 2, n_tensors=2) + bytes(64), "'a' occurs twice"),
    "5 dimensions": (header(tensors=tensor(b"a", (1,) * 5), n_tensors=1) + bytes(64), "5 dimensions"),
    "2^32 dimensions": (header(tensors=text(b"a") + b"\xff" * 4, n_tensors=1) + bytes(64), "dimensions of"),
    "a dimension of 0": (header(tensors=tensor(b"a", (4, 0)), n_tensors=1) + bytes(64), "a shape of"),
    "overflow": (header(tensors=tensor(b"a", (1 << 32, 1 << 32)), n_tensors=1) + bytes(64), "not within"),
    "blocks": (header(tensors=tensor(b"a", (33,), 8), n_tensors=1) + bytes(64), "in blocks of 32"),
    "unknown tensor type": (header(tensors=tensor(b"a", (1,), 99), n_tensors=1) + bytes(64), "not known"),
    "beyond": (header(tensors=tensor(b"a", (64,), 0, 64), n_tensors=1) + bytes(300), "not within"),
    "far beyond": (header(tensors=tensor(b"a", (1,), 0, (1 << 64) - 32), n_tensors=1) + bytes(99), "not within"),
    "unaligned": (header(tensors=tensor(b"a", (1,), 0, 1), n_tensors=1) + bytes(99), "not within"),
    "overlap": (header(tensors=tensor(b"a", (9,)) + tensor(b"b", (9,), 0, 32), n_tensors=2) + bytes(99), "overlaps"),
    "a long text": (
        header(text(b"general.architecture") + struct.pack("<I", 8) + text(b"x" * 70_000_000), n_fields=1),
        "64 MiB",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(name: str, tmp_path: Path) -> None:
    """False counts, lengths, offsets and types are refused at once, without allocating the memory that they ask for."""
    content, named = HOSTILE[name]
    (tmp_path / "x.gguf").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=named) as refused:
            open_gguf(tmp_path / "x.gguf")
        assert "what to do: " in str(refused.value)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_many_problems_give_a_short_message(tmp_path: Path) -> None:
    """60,000 unknown keys; 60,000 unexpected tensors."""
    keys = b"".join(text(f"llama.{i}{'x' * 900}".encode()) + struct.pack("<Ib", 1, 1) for i in range(60_000))
    keys += text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    (tmp_path / "keys.gguf").write_bytes(header(keys, n_fields=60_001))
    many = {f"blk.{i}.x": np.zeros(1, np.float32) for i in range(60_000)}
    damaged(tmp_path / "tensors.gguf", {}, many)
    for name in ("keys", "tensors"):
        with pytest.raises(InputError, match=r"\.\.\. and \d+ more") as refused:
            open_gguf(tmp_path / f"{name}.gguf")
        assert len(str(refused.value)) < 4000


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        open_gguf(tmp_path / "none.gguf")
    write(tmp_path / "x.gguf", TINY, random_weights(TINY))
    with pytest.raises(InputError, match=r"one \.gguf file.*\n.*x\.gguf"):
        open_gguf(tmp_path)
    opened = open_gguf(tmp_path / "x.gguf")
    with (tmp_path / "x.gguf").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(InputError, match="truncated tensor"):
        list(opened.tensors())


def test_damaged_files_never_crash(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """2,000 mutations of a header with a tokenizer's keys: each file is read or refused with an InputError, in bounded
    memory."""
    path = tmp_path / "x.gguf"
    write_gguf(path, TINY, random_weights(TINY), "q8_0", tokenizer_fields(tokenizer, TINY.vocab_size))
    content = path.read_bytes()
    first = min(tensor.offset for tensor in open_gguf(path).file.tensors.values())
    names = content.index(b"tokenizer.ggml.tokens"), content.index(b"token_embd.weight")
    rng = np.random.default_rng(0)
    outcomes = {"read": 0, "refused": 0}
    tracemalloc.start()
    for i in range(2000):
        mutated = bytearray(content)
        low, high = ((0, 1000), (names[1], first), (0, first), (names[0], names[0] + 60))[i % 4]
        kind = i // 4 % 4
        at = int(rng.integers(low, high))
        if kind == 0:
            del mutated[at:]
        elif kind == 1:
            for place in rng.integers(low, high, rng.integers(1, 6)):
                mutated[place] = rng.integers(256)
        elif kind == 2:
            mutated[at:at] = rng.bytes(int(rng.integers(1, 30)))
        else:
            mutated[at : at + 8] = struct.pack("<Q", 1 << int(rng.integers(64)))
        path.write_bytes(mutated)
        try:
            opened = open_gguf(path)
            for _ in opened.tensors():
                pass
            opened.write_tokenizer(tmp_path)
            load_tokenizer(tmp_path, TINY.vocab_size)
            outcomes["read"] += 1
        except InputError:
            outcomes["refused"] += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert outcomes["refused"] > 1000
    assert sum(outcomes.values()) == 2000
    assert peak < 20_000_000
