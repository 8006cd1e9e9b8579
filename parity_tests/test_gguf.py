"""GGUF files, both ways, against llama.cpp and what it makes of the same files."""

import struct
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import AutoModelForCausalLM

import minillm_core.gguf as ours
from minillm_core.bridge import export_gguf, import_checkpoint
from minillm_core.checkpoints import Tensors, read_info
from minillm_core.config import ModelConfig, RopeScaling
from minillm_core.errors import InputError
from minillm_core.gguf import gguf_name, open_gguf, rope_factors, write_gguf
from minillm_core.gguf_tokenizer import NO_TOKENIZER, tokenizer_fields
from minillm_core.interchange import numpy_dtype
from minillm_core.params import param_table
from minillm_core.rope import half_split, interleaved
from minillm_core.tokenizer import Tokenizer
from minillm_core.tokenizer_json import load_tokenizer
from parity_tests.conftest import (
    BACKENDS,
    MODELS,
    TIERS,
    TINY,
    assert_close,
    pair_of,
    random_tokens,
    random_weights,
)
from parity_tests.llama_cpp import LlamaCpp, quantise
from parity_tests.test_hf import text_checkpoint
from parity_tests.test_scripts import fails, succeeds
from parity_tests.test_transformers import CONFIGS, llama_logits

__all__ = ["text_checkpoint"]

FLOAT32 = 2.5e-5
"""Largest difference of llama.cpp's logits from ours, relative to the largest; measured 8.2e-6 over the 13
configurations, 500 tokens, `sharpness` 1. Ours are within 2e-6 of float64; llama.cpp's angles are float32 products."""

ROUNDED = {"float16": (8e-3, 1.2e-6, 3e-6), "bfloat16": (5e-2, 9e-5, 2e-4), "q8_0": (1e-1, 9e-4, 2e-3)}
"""For weights kept so, llama.cpp rounds what they are multiplied with likewise (for q8_0 in blocks), and we do not:
bounds of the largest difference and of the mean KL (nat) from our float32 model of the same file, and of the mean KL
from our model of the weights before they were rounded. Measured, the largest of the 13 configurations: 3.2e-3, 4.1e-7,
1.2e-6 for float16; 1.8e-2, 3.0e-5, 7.1e-5 for bfloat16; 3.5e-2, 3.2e-4, 6.9e-4 for q8_0."""


def write(path: Path, config: ModelConfig, weights: Tensors, dtype: str = "float32") -> Path:
    write_gguf(path, config, weights, dtype, NO_TOKENIZER)
    return path


def torch_logits(config: ModelConfig, weights: Tensors, tokens: np.ndarray) -> np.ndarray:
    return pair_of(config, TIERS["float32"], weights).logits(tokens)[1]


def mean_kl(logits: np.ndarray, other: np.ndarray) -> float:
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (logits, other.astype(np.float64)))
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_llama_cpps(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    weights = random_weights(config, sharpness=1.0)
    tokens = random_tokens(config, 1, 500)
    expected = LlamaCpp(write(tmp_path / "model.gguf", config, weights)).logits(tokens[0])[None]
    pair = pair_of(config, TIERS["float32"], weights)
    for framework, logits in zip(BACKENDS, pair.logits(tokens), strict=True):
        assert_close(framework, logits, expected, FLOAT32)


def _with(config: ModelConfig, **change: Any) -> Callable[[pytest.MonkeyPatch], ModelConfig]:
    return lambda patch: replace(config, **change)


def _unpermuted(patch: pytest.MonkeyPatch) -> ModelConfig:
    patch.setattr(ours, "interleaved", lambda array, head_dim: array)
    return MODELS["gqa"]


SCALED = MODELS["mha-narrow-heads-scaled"]
FAULTS = {
    "rotations unpermuted": (MODELS["gqa"], _unpermuted),
    "another eps": (MODELS["gqa"], _with(MODELS["gqa"], norm_eps=1e-6)),
    "another theta": (MODELS["gqa"], _with(MODELS["gqa"], rope_theta=4.9e5)),
    "scaling left out": (SCALED, _with(SCALED, rope_scaling=None)),
    "another scaling": (SCALED, _with(SCALED, rope_scaling=RopeScaling(7.0, 1.0, 4.0, 128))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_exceed_the_bound(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times at least."""
    config, plant = FAULTS[fault]
    weights = random_weights(config, sharpness=1.0)
    tokens = random_tokens(config, 1, 500)
    logits = LlamaCpp(write(tmp_path / "model.gguf", plant(monkeypatch), weights)).logits(tokens[0])[None]
    with pytest.raises(AssertionError):
        assert_close("", logits, torch_logits(config, weights, tokens), 10 * FLOAT32)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("name", CONFIGS)
def test_rounded_weights(name: str, dtype: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    weights = random_weights(config, sharpness=1.0)
    tokens = random_tokens(config, 1, 500)
    path = write(tmp_path / "model.gguf", config, weights, dtype)
    theirs = LlamaCpp(path).logits(tokens[0])[None]
    loaded = torch_logits(config, dict(open_gguf(path).tensors()), tokens)
    largest, kl, kl_before = ROUNDED[dtype]
    assert_close(dtype, theirs, loaded, largest)
    assert mean_kl(loaded, theirs) < kl
    assert mean_kl(torch_logits(config, weights, tokens), theirs) < kl_before


@pytest.mark.parametrize("framework", BACKENDS)
def test_text_is_llama_cpps(
    framework: str, text_checkpoint: Callable[[str], Path], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """From a text through llama.cpp's tokenizer to the same 60 greedy tokens; and from the file imported again."""
    checkpoint = text_checkpoint(framework)
    file = export_gguf(checkpoint, tmp_path / "model.gguf", BACKENDS[framework], "float32")
    llama = LlamaCpp(file)
    ids = (llama.vocab.token_bos(), llama.vocab.token_eos(), llama.vocab.token_pad())
    assert ids == (tokenizer.bos_id, tokenizer.eos_id, 3)
    again = import_checkpoint("gguf", file, tmp_path / "again", BACKENDS[framework])
    for folder in (checkpoint, again):
        generator = BACKENDS[framework].Generator(BACKENDS[framework].load(folder), load_tokenizer(folder, 512))
        for prompt in ("The Congress", "Fellow citizens of", "In 1790 \n"):
            completion = generator.generate([prompt], max_new_tokens=60, temperature=0, logprobs=True)[0]
            expected = llama.greedy(prompt, 60)
            end = expected.index(tokenizer.eos_id) if tokenizer.eos_id in expected else None
            assert completion.tokens == expected[:end]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("framework", BACKENDS)
def test_there_and_back_to_the_bit(
    framework: str, dtype: str, text_checkpoint: Callable[[str], Path], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """framework -> gguf -> the other framework: the same bits once rounded, configuration and tokenizer; and the same
    file again."""
    other = "torch" if framework == "jax" else "jax"
    checkpoint = text_checkpoint(framework)
    file = export_gguf(checkpoint, tmp_path / "one.gguf", BACKENDS[framework], dtype)
    moved = import_checkpoint("gguf", file, tmp_path / "moved" / "run", BACKENDS[other])
    config = read_info(moved).config
    assert config.model == read_info(checkpoint).config.model
    weights = BACKENDS[other].read_payload(moved, config, moments=False).weights
    for name, array in random_weights(TINY).items():
        expected = array if array.ndim == 1 else array.astype(numpy_dtype(dtype)).astype(np.float32)
        assert weights[name].tobytes() == expected.tobytes(), name
    for text in ("The Congress", " \n é\u2581", "<s>"):
        assert load_tokenizer(moved, TINY.vocab_size).encode(text, bos=True) == tokenizer.encode(text, bos=True)
    again = export_gguf(moved, tmp_path / "two.gguf", BACKENDS[other], dtype)
    assert again.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_comes_back(name: str, tmp_path: Path) -> None:
    """Numbers that float32 would round to others (1e-6), Llama 3's scaling, and norms away from 1."""
    config = replace(CONFIGS[name], init_std=0.0123)
    weights = random_weights(config)
    opened = open_gguf(write(tmp_path / "model.gguf", config, weights))
    assert opened.config == replace(config, head_dim=config.resolved_head_dim)
    assert {name: array.tobytes() for name, array in opened.tensors()} == {
        name: array.tobytes() for name, array in weights.items()
    }


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.rope_scaling is None])
def test_transformers_reads_it(name: str, tmp_path: Path) -> None:
    """Its loader knows no `rope_freqs`."""
    config = CONFIGS[name]
    weights = random_weights(config, sharpness=1.0)
    write(tmp_path / "model.gguf", config, weights)
    llama = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    assert llama.config.tie_word_embeddings == config.tie_embeddings
    tokens = random_tokens(config, 2, 500)
    assert_close(name, torch_logits(config, weights, tokens), llama_logits(llama, tokens), TIERS["float32"].logits)


WIDE = ModelConfig(
    vocab_size=512, context_length=640, width=256, n_layers=2, n_heads=4, n_kv_heads=2, hidden=512, tie_embeddings=False
)
QUANTISED = {
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q2_k": 10,
    "q3_k_m": 12,
    "q4_k_m": 15,
    "q5_k_m": 17,
}
QUANTISED |= {"q6_k": 18, "iq4_nl": 25, "iq4_xs": 30}


@pytest.mark.parametrize("kind", QUANTISED)
def test_what_llama_cpp_has_quantised(kind: str, tmp_path: Path) -> None:
    """Files of another writer, in a dozen types: the numbers that llama.cpp itself takes them for, to the bit. Its q8_0
    is ours, block for block."""
    weights = random_weights(WIDE, sharpness=1.0)
    plain = write(tmp_path / "plain.gguf", WIDE, weights)
    quantise(plain, tmp_path / "quantised.gguf", QUANTISED[kind])
    quantise(tmp_path / "quantised.gguf", tmp_path / "numbers.gguf", 0)
    opened, numbers = open_gguf(tmp_path / "quantised.gguf"), dict(open_gguf(tmp_path / "numbers.gguf").tensors())
    assert max(tensor.type for tensor in opened.file.tensors.values()) > 1
    for name, array in opened.tensors():
        assert np.array_equal(array, numbers[name]), name
        assert_close(name, array, weights[name], 0.5)
    if kind == "q8_0":
        own = open_gguf(write(tmp_path / "own.gguf", WIDE, weights, "q8_0")).file
        for name, tensor in opened.file.tensors.items():
            assert tensor.type == own.tensors[name].type
            assert np.array_equal(opened.file.read(name), own.read(name)), name


def test_llama_3s_factors_are_recognised(tmp_path: Path) -> None:
    """Without our own keys, as llama.cpp's converter writes: the scaling of Llama 3.1 and 3.2; others are refused."""
    scalings = [RopeScaling(8.0, 1.0, 4.0, 8192), RopeScaling(32.0, 1.0, 4.0, 8192), RopeScaling(8.0, 1.0, 4.0, 4096)]
    for scaling in scalings:
        config = replace(TINY, rope_theta=5e5, rope_scaling=scaling)
        path = write(tmp_path / "model.gguf", config, random_weights(config))
        path.write_bytes(path.read_bytes().replace(b"minillm.rope_scaling", b"another.rope_scaling"))
        if scaling == scalings[2]:
            with pytest.raises(InputError, match="not Llama 3's scaling"):
                open_gguf(path)
        else:
            assert open_gguf(path).config == config


def test_names_and_rows() -> None:
    """llama.cpp's own table of names; permutation and its inverse."""
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    config = replace(MODELS["mqa-untied"], n_layers=3)
    for name in param_table(config):
        assert known.get_name(name, try_suffixes=[".weight"]) == gguf_name(name)
    rows = np.arange(32.0).reshape(16, 2)
    assert np.array_equal(half_split(interleaved(rows, 8), 8), rows)
    assert interleaved(rows[:8], 8)[:, 0].tolist() == [0, 8, 2, 10, 4, 12, 6, 14]


Fields = dict[str, Any]


def damaged(path: Path, fields: Fields, tensors: Tensors) -> Path:
    """A good file of the package's own writer, with some keys and tensors changed, or left out if None."""
    writer = gguf.GGUFWriter(path, "llama")
    everything = {"general.type": "model", **ours.config_fields(TINY), **NO_TOKENIZER} | fields
    for key, value in everything.items():
        if value is not None and key != "general.architecture":
            kind = gguf.GGUFValueType.get_type(value)
            writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.INT32 else kind)
    if "general.architecture" in fields:
        writer.kv_data[0]["general.architecture"].value = fields["general.architecture"]
    for name, array in ({gguf_name(name): array for name, array in random_weights(TINY).items()} | tensors).items():
        if array is not None:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


NORM, EMBEDDING = "output_norm.weight", "token_embd.weight"


@pytest.mark.parametrize(
    ("fields", "tensors", "named"),
    [
        ({"general.architecture": "qwen2"}, {}, "qwen2"),
        ({"general.type": "adapter"}, {}, "adapter"),
        ({"split.count": 3}, {}, "(?s)3 parts.*llama-gguf-split --merge"),
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
        ({}, {"rope_freqs.weight": np.ones(5, np.float32)}, "the shape of rope_freqs"),
    ],
)
def test_refused_by_name(fields: Fields, tensors: Tensors, named: str, tmp_path: Path) -> None:
    """And nothing is written."""
    with pytest.raises(InputError, match=named):
        import_checkpoint("gguf", damaged(tmp_path / "x.gguf", fields, tensors), tmp_path / "run", BACKENDS["torch"])
    assert not (tmp_path / "run").exists()


def test_what_changes_nothing_is_accepted(tmp_path: Path) -> None:
    """Defaults that a file may leave out, factors of 1, and keys that say that something is off."""
    fields = dict.fromkeys((f"llama.attention.{name}_length" for name in ("key", "value")), 16)
    fields |= {"llama.rope.freq_base": None, "llama.vocab_size": None, "llama.rope.dimension_count": None}
    fields |= {"llama.expert_count": 0, "llama.rope.scaling.type": "none", "minillm.init_std": None}
    opened = open_gguf(damaged(tmp_path / "x.gguf", fields, {"rope_freqs.weight": np.ones(8, np.float32)}))
    assert opened.config == TINY
    assert rope_factors(TINY).tolist() == [1.0] * 8


def header(fields: bytes = b"", tensors: bytes = b"", n_fields: int = 0, n_tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_fields) + fields + tensors


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


HOSTILE = {
    "empty": (b"", "damaged"),
    "no magic": (b"GGML" + bytes(60), "not a GGUF file"),
    "version": (header(version=4), "another version"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "2^63 keys": (header(n_fields=1 << 63), "ends after the file"),
    "2^63 tensors": (header(n_tensors=1 << 63), "ends after the file"),
    "a long key": (header(struct.pack("<Q", 1 << 62), n_fields=1), "ends after the file"),
    "a long array": (header(text(b"a") + struct.pack("<IIQ", 9, 0, 1 << 60) + bytes(9), n_fields=1), "ends after"),
    "a long list": (header(text(b"a") + struct.pack("<IIQ", 9, 8, 1 << 60) + bytes(9), n_fields=1), "ends after"),
    "nested arrays": (header(text(b"a") + struct.pack("<IIQ", 9, 9, 1), n_fields=1), "array of type 9"),
    "an unknown type": (header(text(b"a") + struct.pack("<I", 13), n_fields=1), "value of type 13"),
    "no UTF-8": (header(text(b"\xff") + struct.pack("<I", 13), n_fields=1), "utf-8"),
    "a key twice": (header((text(b"a") + struct.pack("<Ib", 1, 1)) * 2, n_fields=2), "'a' twice"),
    "alignment": (header(text(b"general.alignment") + struct.pack("<II", 4, 33), n_fields=1), "alignment of 33"),
    "a tensor twice": (header(tensors=tensor(b"a", (1,)) * 2, n_tensors=2) + bytes(64), "'a' twice"),
    "5 dimensions": (header(tensors=tensor(b"a", (1,) * 5), n_tensors=1) + bytes(64), "5 dimensions"),
    "2^32 dimensions": (header(tensors=text(b"a") + b"\xff" * 4, n_tensors=1) + bytes(64), "dimensions of"),
    "no numbers": (header(tensors=tensor(b"a", (4, 0)), n_tensors=1) + bytes(64), "a shape of"),
    "overflow": (header(tensors=tensor(b"a", (1 << 32, 1 << 32)), n_tensors=1) + bytes(64), "not within"),
    "blocks": (header(tensors=tensor(b"a", (33,), 8), n_tensors=1) + bytes(64), "in blocks of 32"),
    "a type of none": (header(tensors=tensor(b"a", (1,), 99), n_tensors=1) + bytes(64), "not known"),
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
    """Counts, lengths, offsets and types that are not so: refused at once, without the memory they ask for."""
    content, named = HOSTILE[name]
    (tmp_path / "x.gguf").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=named):
            open_gguf(tmp_path / "x.gguf")
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_other_paths(tmp_path: Path) -> None:
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
    """2,000 mutations of a header, the tokenizer's keys in it: each is read or refused with an InputError, in bounded
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


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    for dtype, value in (("float16", 7e4), ("q8_0", 1e7)):
        weights = random_weights(WIDE)
        weights["model.layers.1.self_attn.q_proj.weight"][0, 0] = value
        with pytest.raises(InputError, match=f"{dtype} cannot hold"):
            write(tmp_path / "x.gguf", WIDE, weights, dtype)
        (tmp_path / "x.gguf").unlink()
    assert write_gguf(tmp_path / "x.gguf", TINY, random_weights(TINY), "q8_0", NO_TOKENIZER)[0].endswith(
        "embed_tokens.weight"
    )


def test_nothing_is_overwritten_or_left(
    text_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, file = text_checkpoint("torch"), tmp_path / "out" / "model.gguf"

    def full(array: np.ndarray, *_: Any) -> np.ndarray:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ours, "interleaved", full)
        with pytest.raises(OSError, match="No space"):
            export_gguf(checkpoint, file, BACKENDS["torch"], "float32")
    assert list(file.parent.iterdir()) == []
    export_gguf(checkpoint, file, BACKENDS["torch"], "float32")
    with pytest.raises(InputError, match="destination exists"):
        export_gguf(checkpoint, file, BACKENDS["torch"], "float32")
    with pytest.raises(InputError, match="checkpoints of its own"):
        import_checkpoint("gguf", file, tmp_path / "run", BACKENDS["torch"])
    fails("gguf has no float64", "convert", "torch->gguf", str(tmp_path / "run"), "--dtype", "float64", cwd=tmp_path)
    fails("hf has no q8_0", "convert", "torch->hf", str(tmp_path / "run"), "--dtype", "q8_0", cwd=tmp_path)
    fails("no paths", "convert", "gguf->torch", str(file), cwd=tmp_path)


def test_commands(text_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The default name of the file, and text from what is imported."""
    text_checkpoint("torch")
    done = succeeds("convert", "torch->gguf", "run", "--dtype", "bfloat16", cwd=tmp_path)
    assert done.stdout == "run/run-bfloat16.gguf\n"
    succeeds("convert", "gguf-to-torch", "run/run-bfloat16.gguf", "again", cwd=tmp_path)
    texts = [
        succeeds(
            "generate", run, "--backend", "torch", "--temperature", "0", "--max-new-tokens", "9", cwd=tmp_path
        ).stdout
        for run in ("run", "again")
    ]
    assert texts[0] == texts[1]


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install.*\[gguf\]"):
        write(tmp_path / "x.gguf", TINY, random_weights(TINY))
    assert not (tmp_path / "x.gguf").exists()
