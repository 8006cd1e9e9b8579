"""Import and export of GGUF files, compared with llama.cpp on the same files."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import AutoModelForCausalLM

import minillm_core.interop.gguf as ours
from minillm_core.config import ModelConfig, RopeScaling
from minillm_core.errors import InputError
from minillm_core.files import lock
from minillm_core.interop.exports import export_gguf, export_hf
from minillm_core.interop.gguf import gguf_name, open_gguf, write_gguf
from minillm_core.interop.gguf_tokenizer import NO_TOKENIZER
from minillm_core.interop.imports import import_checkpoint
from minillm_core.interop.safetensors_files import numpy_dtype
from minillm_core.model.params import param_table
from minillm_core.model.rope import half_split, interleaved
from minillm_core.tensors import Tensors
from minillm_core.text.tokenizer import Tokenizer
from minillm_core.text.tokenizer_json import load_tokenizer
from minillm_core.training.checkpoints import find_checkpoint, read_info
from parity_tests.commands import fails, succeeds
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
from parity_tests.test_transformers import CONFIGS, llama_logits, named

__all__ = ["text_checkpoint"]

FLOAT32 = 2.5e-5
"""Bound on the largest difference between llama.cpp's logits and ours, relative to the largest logit.

Measured: 8.2e-6 over the 13 configurations, with 500 tokens and `sharpness` 1. Our logits are within 2e-6 of float64;
llama.cpp computes its rotary angles as float32 products.
"""

ROUNDED = {"float16": (8e-3, 1.2e-6, 3e-6), "bfloat16": (5e-2, 9e-5, 2e-4), "q8_0": (1e-1, 9e-4, 2e-3)}
"""Three bounds for each dtype of the weights: largest difference and mean KL divergence (nat) between llama.cpp and our
float32 model of the same file, and mean KL divergence between llama.cpp and our model before its weights were rounded.

llama.cpp rounds the activations to the dtype of the weights (for q8_0 in blocks), and we do not. Measured, the largest
of the 13 configurations: 3.2e-3, 4.1e-7, 1.2e-6 for float16; 1.8e-2, 3.0e-5, 7.1e-5 for bfloat16; 3.5e-2, 3.2e-4,
6.9e-4 for q8_0.
"""


def write(path: Path, config: ModelConfig, weights: Tensors, dtype: str = "float32") -> Path:
    write_gguf(path, config, weights, dtype, NO_TOKENIZER)
    return path


def torch_logits(config: ModelConfig, weights: Tensors, tokens: np.ndarray) -> np.ndarray:
    return pair_of(config, TIERS["float32"], weights).logits(tokens)[1]


def mean_kl(logits: np.ndarray, other: np.ndarray) -> float:
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (logits, other.astype(np.float64)))
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("name", named(CONFIGS))
def test_logits_match_llama_cpp(name: str, tmp_path: Path) -> None:
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
    "q and k not permuted": (MODELS["gqa"], _unpermuted),
    "wrong eps": (MODELS["gqa"], _with(MODELS["gqa"], norm_eps=1e-6)),
    "wrong theta": (MODELS["gqa"], _with(MODELS["gqa"], rope_theta=4.9e5)),
    "scaling missing": (SCALED, _with(SCALED, rope_scaling=None)),
    "wrong scaling": (SCALED, _with(SCALED, rope_scaling=RopeScaling(7.0, 1.0, 4.0, 128))),
}


@pytest.mark.extended
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_exceed_the_bound(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fault exceeds the bound at least tenfold."""
    config, plant = FAULTS[fault]
    weights = random_weights(config, sharpness=1.0)
    tokens = random_tokens(config, 1, 500)
    logits = LlamaCpp(write(tmp_path / "model.gguf", plant(monkeypatch), weights)).logits(tokens[0])[None]
    with pytest.raises(AssertionError):
        assert_close("", logits, torch_logits(config, weights, tokens), 10 * FLOAT32)


@pytest.mark.extended
@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("name", CONFIGS)
def test_rounded_weights(name: str, dtype: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    weights = random_weights(config, sharpness=1.0)
    tokens = random_tokens(config, 1, 500)
    path = write(tmp_path / "model.gguf", config, weights, dtype)
    theirs = LlamaCpp(path).logits(tokens[0])[None]
    loaded = torch_logits(config, dict(open_gguf(path).tensors()), tokens)
    file_type = {"float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}[dtype]
    assert open_gguf(path).file.fields["general.file_type"] == gguf.LlamaFileType[file_type]
    largest, kl, kl_before = ROUNDED[dtype]
    assert_close(dtype, theirs, loaded, largest)
    assert mean_kl(loaded, theirs) < kl
    assert mean_kl(torch_logits(config, weights, tokens), theirs) < kl_before


@pytest.mark.parametrize("framework", BACKENDS)
def test_text_matches_llama_cpp(
    framework: str, text_checkpoint: Callable[[str], Path], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """llama.cpp with its own tokenizer gives our 60 greedy tokens, and so does the file imported again."""
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
def test_round_trip_is_bit_exact(
    framework: str, dtype: str, text_checkpoint: Callable[[str], Path], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """framework -> gguf -> other framework: the same rounded bits, configuration and tokenizer; exporting again gives
    the same file."""
    other = "torch" if framework == "jax" else "jax"
    checkpoint = text_checkpoint(framework)
    file = export_gguf(checkpoint, tmp_path / "one.gguf", BACKENDS[framework], dtype)
    moved = import_checkpoint("gguf", file, tmp_path / "moved" / "run", BACKENDS[other])
    config = read_info(moved).config
    assert config.model == read_info(checkpoint).config.model
    weights = BACKENDS[other].read_payload(moved, config).weights
    for name, array in random_weights(TINY).items():
        expected = array if array.ndim == 1 else array.astype(numpy_dtype(dtype)).astype(np.float32)
        assert weights[name].tobytes() == expected.tobytes(), name
    for text in ("The Congress", " \n é\u2581", "<s>"):
        assert load_tokenizer(moved, TINY.vocab_size).encode(text, bos=True) == tokenizer.encode(text, bos=True)
    again = export_gguf(moved, tmp_path / "two.gguf", BACKENDS[other], dtype)
    assert again.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", named(CONFIGS))
def test_every_configuration_round_trips(name: str, tmp_path: Path) -> None:
    """Also numbers that are not exact in float32 (1e-6), Llama 3's RoPE scaling, and norm weights away from 1."""
    config = replace(CONFIGS[name], init_std=0.0123)
    weights = random_weights(config)
    opened = open_gguf(write(tmp_path / "model.gguf", config, weights))
    assert opened.config == replace(config, head_dim=config.resolved_head_dim)
    assert {name: array.tobytes() for name, array in opened.tensors()} == {
        name: array.tobytes() for name, array in weights.items()
    }


def test_numbers_beyond_float32_precision(tmp_path: Path) -> None:
    """A file exported here keeps the exact numbers. In any other file, theta is the float32 number that llama.cpp uses;
    if theta was changed in a file exported here, the changed number counts."""
    config = replace(TINY, rope_theta=283461213.0, norm_eps=1.00000001e-6)
    assert open_gguf(write(tmp_path / "ours.gguf", config, random_weights(TINY))).config.rope_theta == 283461213.0
    assert open_gguf(tmp_path / "ours.gguf").config.norm_eps == 1.00000001e-6
    content = (tmp_path / "ours.gguf").read_bytes()
    (tmp_path / "theirs.gguf").write_bytes(content.replace(b"minillm.", b"someone."[:8]))
    theirs = open_gguf(tmp_path / "theirs.gguf").config
    assert (theirs.rope_theta, theirs.norm_eps) == (283461216.0, 1e-6)
    key = content.index(b"llama.rope.freq_base") + len(b"llama.rope.freq_base") + 4
    changed = content[:key] + np.float32(1e4).tobytes() + content[key + 4 :]
    (tmp_path / "changed.gguf").write_bytes(changed)
    assert open_gguf(tmp_path / "changed.gguf").config.rope_theta == 1e4


@pytest.mark.extended
@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.rope_scaling is None])
def test_transformers_reads_exported_gguf(name: str, tmp_path: Path) -> None:
    """Only without RoPE scaling: the GGUF loader of transformers does not read `rope_freqs`."""
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


@pytest.mark.extended
@pytest.mark.parametrize("kind", QUANTISED)
def test_files_quantised_by_llama_cpp(kind: str, tmp_path: Path) -> None:
    """Files that llama.cpp quantised to a dozen types are dequantised to the same bits as by llama.cpp. Its q8_0 blocks
    equal ours."""
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


def test_llama_3_rope_factors_are_recognised(tmp_path: Path) -> None:
    """In files without our own keys, the scaling of Llama 3.1 and 3.2 is recognised; other scalings are refused."""
    scalings = [RopeScaling(8.0, 1.0, 4.0, 8192), RopeScaling(32.0, 1.0, 4.0, 8192)]
    others = [RopeScaling(8.0, 1.0, 4.0, 4096), RopeScaling(8.0, 1.0, 4.0, 8180)]
    for scaling in scalings + others:
        config = replace(TINY, rope_theta=5e5, rope_scaling=scaling)
        path = write(tmp_path / "model.gguf", config, random_weights(config))
        path.write_bytes(path.read_bytes().replace(b"minillm.rope_scaling", b"another.rope_scaling"))
        if scaling in others:
            with pytest.raises(InputError, match="not Llama 3's scaling"):
                open_gguf(path)
        else:
            assert open_gguf(path).config == config


def test_tensor_names_and_row_order() -> None:
    """The names are those of llama.cpp's own table; the row permutation has an exact inverse."""
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    config = replace(MODELS["mqa-untied"], n_layers=3)
    for name in param_table(config):
        assert known.get_name(name, try_suffixes=[".weight"]) == gguf_name(name)
    rows = np.arange(32.0).reshape(16, 2)
    assert np.array_equal(half_split(interleaved(rows, 8), 8), rows)
    assert interleaved(rows[:8], 8)[:, 0].tolist() == [0, 8, 2, 10, 4, 12, 6, 14]


NORM, EMBEDDING = "output_norm.weight", "token_embd.weight"


def test_weights_out_of_range_are_refused(tmp_path: Path) -> None:
    for dtype, value in (("float16", 7e4), ("q8_0", 1e7)):
        weights = random_weights(WIDE)
        weights["model.layers.1.self_attn.q_proj.weight"][0, 0] = value
        with pytest.raises(InputError, match=f"{dtype} cannot hold"):
            write(tmp_path / "x.gguf", WIDE, weights, dtype)
        (tmp_path / "x.gguf").unlink()
    weights["model.layers.1.self_attn.q_proj.weight"][0, 0] = 8e6  # a block's scale is 1/127 of its largest value
    largest = max(array.max() for _, array in open_gguf(write(tmp_path / "x.gguf", WIDE, weights, "q8_0")).tensors())
    assert largest == pytest.approx(8e6, rel=1e-3)
    assert write_gguf(tmp_path / "x.gguf", TINY, random_weights(TINY), "q8_0", NO_TOKENIZER)[0].endswith(
        "embed_tokens.weight"
    )


def test_a_sliding_window_is_refused(tmp_path: Path) -> None:
    """llama.cpp would ignore it."""
    config = replace(TINY, sliding_window=8)
    with pytest.raises(InputError, match=r"no sliding window[^$]*sliding_window 8[^$]*Hugging Face"):
        write_gguf(tmp_path / "x.gguf", config, random_weights(config), "float32", NO_TOKENIZER)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_or_left_behind(
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
    with lock(file.with_name(".other.gguf.lock")), pytest.raises(InputError, match="another process is working here"):
        export_gguf(checkpoint, file.with_name("other.gguf"), BACKENDS["torch"], "float32")
    with lock(file.with_name(".hf.lock")), pytest.raises(InputError, match="another process is working here"):
        export_hf(checkpoint, file.with_name("hf"), BACKENDS["torch"], "float32")
    assert not file.with_name("hf").exists()
    with pytest.raises(InputError, match="already has checkpoints"):
        import_checkpoint("gguf", file, tmp_path / "run", BACKENDS["torch"])
    with pytest.raises(InputError, match=r"different kind(?s:.*)gguf->torch") as raised:
        import_checkpoint("hf", file, tmp_path / "new", BACKENDS["torch"])
    assert raised.value.command == ("convert", "gguf->torch", str(file), str(tmp_path / "new"))
    with pytest.raises(InputError, match=r"in gguf format(?s:.*)gguf->jax") as raised:
        find_checkpoint(file, "jax")
    assert raised.value.command == ("convert", "gguf->jax", str(file), "RUN")
    fails("gguf has no float64", "convert", "torch->gguf", str(tmp_path / "run"), "--dtype", "float64", cwd=tmp_path)
    fails("hf has no q8_0", "convert", "torch->hf", str(tmp_path / "run"), "--dtype", "q8_0", cwd=tmp_path)
    fails("a path is missing.*no run directory", "convert", "gguf->torch", str(file), cwd=tmp_path)


@pytest.mark.extended
def test_commands(text_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The default file name, and the same text from the imported file."""
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


def test_missing_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install.*\[gguf\]"):
        write(tmp_path / "x.gguf", TINY, random_weights(TINY))
    assert not (tmp_path / "x.gguf").exists()
