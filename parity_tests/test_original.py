"""Checkpoints of the original Mini-LLM, compared with an independent version of its model (interleaved RoPE)."""

import io
import json
import os
import pickle
import sys
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from minillm_core.errors import InputError
from minillm_core.interop import convert, torch_pickle
from minillm_core.interop.imports import import_checkpoint
from minillm_core.interop.original import open_original, original_name
from minillm_core.model.params import param_table
from minillm_core.model.rope import half_split
from minillm_core.text.tokenizer import ModelProto, Tokenizer
from minillm_core.text.tokenizer_json import load_tokenizer, sentencepiece_to_json
from parity_tests.conftest import BACKENDS, TIERS, Tier, assert_close
from parity_tests.test_hf import logits_of

pytestmark = pytest.mark.extended

ARGS = {
    "dim": 48,
    "n_layers": 3,
    "n_heads": 6,
    "n_kv_heads": 2,
    "vocab_size": 300,
    "multiple_of": 80,
    "max_seq_len": 600,
    "dropout": 0.0,
    "device": "cpu",
}
H, HIDDEN = 8, 240


@pytest.fixture(autouse=True)
def model_args() -> Iterator[Callable[[], Any]]:
    """Makes objects that pickle under the name of the original's class, in a module that tests can remove."""
    module = types.ModuleType("model.config")

    @dataclass
    class ModelArgs:
        dim: int = 0

    ModelArgs.__module__, ModelArgs.__qualname__ = "model.config", "ModelArgs"
    module.ModelArgs = ModelArgs  # type: ignore[attr-defined]
    sys.modules |= {"model": types.ModuleType("model"), "model.config": module}

    def make() -> Any:
        args = ModelArgs()
        vars(args).update(ARGS)
        return args

    yield make
    for name in ("model", "model.config"):
        sys.modules.pop(name, None)


def rotations(dtype: torch.dtype) -> torch.Tensor:
    frequencies = 10_000.0 ** (-torch.arange(0, H, 2, dtype=dtype) / H)
    angles = torch.outer(torch.arange(ARGS["max_seq_len"], dtype=dtype), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def state_dict() -> dict[str, torch.Tensor]:
    """Weights with the original's names and shapes, sharp attention and norm weights away from 1."""
    generator = torch.Generator().manual_seed(0)
    D, KV, V = ARGS["dim"], ARGS["n_kv_heads"] * H, ARGS["vocab_size"]
    shapes = {"tok_embeddings.emb.weight": (V, D), "norm.weight": (D,)}
    for i in range(ARGS["n_layers"]):
        block = {"attention.wq": (D, D), "attention.wk": (KV, D), "attention.wv": (KV, D), "attention.wo": (D, D)}
        block |= {"feed_forward.w1": (HIDDEN, D), "feed_forward.w2": (D, HIDDEN), "feed_forward.w3": (HIDDEN, D)}
        block |= {"attention_norm": (D,), "ffn_norm": (D,)}
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in block.items()}
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.2 + (1.0 if len(shape) == 1 else 0.0)
        for name, shape in shapes.items()
    }
    tensors["output.weight"] = tensors["tok_embeddings.emb.weight"]  # one tensor under two names
    tensors["rope.freqs_cis"] = rotations(torch.float32)
    return tensors


def original_logits(tensors: dict[str, torch.Tensor], tokens: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The original's logits without a cache. In float64, the rotations are float64 too."""
    w = {name: tensor.to(dtype) for name, tensor in tensors.items() if name != "rope.freqs_cis"}
    turn = rotations(dtype)[: tokens.shape[1], None]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w[name]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    x = w["tok_embeddings.emb.weight"][torch.from_numpy(tokens)]
    for i in range(ARGS["n_layers"]):
        block = f"layers.{i}"
        h = norm(x, f"{block}.attention_norm.weight")
        q, k, v = ((h @ w[f"{block}.attention.{p}.weight"].T).unflatten(-1, (-1, H)) for p in ("wq", "wk", "wv"))
        groups = ARGS["n_heads"] // ARGS["n_kv_heads"]
        q, k, v = rotate(q), rotate(k).repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        out = F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v)), is_causal=True)
        x = x + out.transpose(1, 2).flatten(2) @ w[f"{block}.attention.wo.weight"].T
        h = norm(x, f"{block}.ffn_norm.weight")
        w1, w2, w3 = (w[f"{block}.feed_forward.{p}.weight"] for p in ("w1", "w2", "w3"))
        x = x + (F.silu(h @ w1.T) * (h @ w3.T)) @ w2.T
    return (norm(x, "norm.weight") @ w["output.weight"].T).numpy()


def save_pickle(folder: Path, model_args: Callable[[], Any], tensors: dict[str, Any]) -> Path:
    """Save as the original's train.py does, together with an optimizer state."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    rest = {"optimizer": optimizer.state_dict(), "iter_num": 500, "best_val_loss": torch.tensor(3.25)}
    torch.save({"model": tensors, "model_args": model_args(), **rest}, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def save_folder(folder: Path, model_args: Callable[[], Any], tensors: dict[str, Any]) -> Path:
    """Save as the original's convert_to_safetensors.py does."""
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(ARGS | {"architectures": ["MiniLLM"], "model_type": "mini-llm"}))
    return folder


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("save", [save_pickle, save_folder])
def test_imported_model_matches_original(
    save: Callable[..., Path], compiled: bool, tmp_path: Path, model_args: Callable[[], Any], float64: Tier
) -> None:
    tensors = state_dict()
    prefix = "_orig_mod." if compiled else ""
    source = save(tmp_path, model_args, {prefix + name: tensor for name, tensor in tensors.items()})
    for name in ("model", "model.config"):
        del sys.modules[name]
    tokens = np.random.default_rng(1).integers(0, ARGS["vocab_size"], (2, 500))
    expected = {name: original_logits(tensors, tokens, getattr(torch, name)) for name in ("float32", "float64")}
    for framework, backend in BACKENDS.items():
        checkpoint = import_checkpoint("minillm", source, tmp_path / framework, backend)
        assert_close(framework, logits_of(framework, checkpoint, "float64", tokens), expected["float64"], 1e-12)
        logits = logits_of(framework, checkpoint, "float32", tokens)
        assert_close(framework, logits, expected["float32"], TIERS["float32"].logits)


def test_original_tokenizer_json_is_used(tmp_path: Path, model_args: Callable[[], Any]) -> None:
    """The original uses its tokenizer.json, with special tokens from special_tokens_map.json. The tokenizer.model, from
    which that file was made, adds a space before a text and removes other spaces."""
    source = save_pickle(tmp_path, model_args, state_dict())
    model = io.BytesIO()
    text = ["Fellow citizens of the Senate and the House of Representatives"] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=ARGS["vocab_size"] - 7, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    proto = ModelProto.FromString(model.getvalue())
    proto.normalizer_spec.name, proto.normalizer_spec.precompiled_charsmap = "identity", b""
    proto.normalizer_spec.add_dummy_prefix = proto.normalizer_spec.remove_extra_whitespaces = False
    data = sentencepiece_to_json(proto.SerializeToString(), adds_bos=True)
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    names = {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    conversion = convert("minillm->torch", source, tmp_path / "run")
    assert conversion.generates
    checkpoint = conversion.result
    tokenizer = load_tokenizer(checkpoint, ARGS["vocab_size"])
    published = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    other = Tokenizer(tmp_path / "tokenizer.model")
    for words in ("the House", "of  the"):
        assert tokenizer.encode(words, bos=True) == published.encode(words).ids != other.encode(words, bos=True)
    assert (tokenizer.bos_id, tokenizer.end_ids) == (1, {2})


def test_missing_permutation_is_detected(tmp_path: Path, model_args: Callable[[], Any], monkeypatch: Any) -> None:
    """The classic fault of such an import, planted: q and k keep the row order of interleaved RoPE."""
    source = save_pickle(tmp_path, model_args, state_dict())
    monkeypatch.setattr("minillm_core.interop.original.half_split", lambda array, head_dim: array)
    checkpoint = import_checkpoint("minillm", source, tmp_path / "run", BACKENDS["torch"])
    tokens = np.random.default_rng(1).integers(0, ARGS["vocab_size"], (2, 500))
    expected = original_logits(state_dict(), tokens, torch.float32)
    with pytest.raises(AssertionError):
        assert_close("", logits_of("torch", checkpoint, "float32", tokens), expected, 1e-2)


def test_half_split_and_names() -> None:
    rows = np.arange(16.0)[:, None]
    assert half_split(rows, 8)[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert original_name("model.layers.3.self_attn.q_proj.weight") == "layers.3.attention.wq.weight"
    assert original_name("model.norm.weight") == "norm.weight"
    assert original_name("model.embed_tokens.weight") == "tok_embeddings.emb.weight"
    assert original_name("model.layers.0.input_layernorm.weight") == "layers.0.attention_norm.weight"


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch hostile",)


def test_pickled_code_never_runs(
    tmp_path: Path, model_args: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = save_pickle(tmp_path, model_args, state_dict() | {"norm.weight": Hostile()})
    with pytest.raises(InputError, match="could run code") as raised:
        open_original(path)
    assert "system" in str(raised.value)
    assert not (tmp_path / "hostile").exists()


class Attributes:
    """Pickles as a tensor whose attributes are set after its construction, past the checks."""

    def __reduce_ex__(self, _: Any) -> Any:
        function, arguments, *_ = torch.ones(48).__reduce_ex__(2)
        return function, arguments, {"strides": (-64,), "file": "/etc/passwd"}


def test_tensor_attributes_are_refused(tmp_path: Path, model_args: Callable[[], Any]) -> None:
    path = save_pickle(tmp_path, model_args, state_dict())
    content = {"model": {"a": Attributes()}, "model_args": model_args()}
    torch.save(content, path)
    with pytest.raises(InputError, match="attributes of an object that is not ModelArgs"):
        open_original(path)


@pytest.mark.parametrize("place", [b"", b"X\x05\x00\x00\x00model}sX\x0a\x00\x00\x00model_args}X\x03\x00\x00\x00dim"])
def test_nested_tuples_are_refused_at_once(place: bytes, tmp_path: Path) -> None:
    """Sixty nested tuples, each holding the next one twice, in a few hundred bytes: neither hashed nor shown."""
    nested = b")" + b"q\x01h\x01\x86" * 60
    content = b"\x80\x02}" + place + nested + (b"s" if place else b"N") + b"s."
    with zipfile.ZipFile(tmp_path / "ckpt.pt", "w") as archive:
        archive.writestr("a/data.pkl", content)
    before = time.monotonic()
    with pytest.raises(InputError, match=r"damaged checkpoint|not the model_args"):
        open_original(tmp_path / "ckpt.pt")
    assert time.monotonic() - before < 2


def test_small_file_with_huge_claims_is_refused(tmp_path: Path, model_args: Callable[[], Any]) -> None:
    """A stride of 0 makes one number look like a whole tensor; a huge number of layers asks for a huge table."""
    tensors = state_dict() | {NORM: torch.ones(1).expand(48)}
    with pytest.raises(InputError, match="contiguous"):
        list(open_original(save_pickle(tmp_path, model_args, tensors)).tensors())
    huge = model_args()
    huge.n_layers = 10_000_000
    with pytest.raises(InputError, match="more layers than tensors"):
        open_original(save_pickle(tmp_path, lambda: huge, state_dict()))


NORM = "norm.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({NORM: None}, "'model' and"),
        ({NORM: torch.ones(3)}, "shape"),
        ({"layers.0.attention.wq.bias": torch.ones(3)}, "unexpected"),
        ({NORM: torch.full((48,), torch.nan)}, "not finite"),
        ({"output.weight": torch.zeros(300, 48)}, "head differs"),
        ({"rope.freqs_cis": rotations(torch.float32).conj().resolve_conj()}, "rotations"),
    ],
)
def test_mismatched_models_are_refused(
    change: dict[str, Any], named: str, tmp_path: Path, model_args: Callable[[], Any]
) -> None:
    path = save_pickle(tmp_path, model_args, state_dict() | change)
    with pytest.raises(InputError, match=rf"{named}(?s:.*)what to do: "):
        import_checkpoint("minillm", path, tmp_path / "run", BACKENDS["jax"])
    assert not (tmp_path / "run").exists()


def test_damaged_files_never_crash(tmp_path: Path, model_args: Callable[[], Any]) -> None:
    """600 mutations of the pickle and of the archive: each is read or refused with an InputError."""
    path = save_pickle(tmp_path, model_args, state_dict())
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    pickled = next(name for name in entries if name.endswith("data.pkl"))
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(600):
        if i % 3 == 0:
            mutated = bytearray(content)
            start = len(content) - 4000 if i % 2 else 0
            for at in rng.integers(start, start + 4000, rng.integers(1, 6)):
                mutated[at] = rng.integers(256)
            path.write_bytes(mutated if i % 4 else mutated[: rng.integers(len(mutated))])
        else:
            data = bytearray(entries[pickled])
            for at in rng.integers(0, len(data), rng.integers(1, 4)):
                data[at] = rng.integers(256)
            with zipfile.ZipFile(path, "w") as archive:
                for name, value in (entries | {pickled: bytes(data)}).items():
                    archive.writestr(name, value)
        try:
            for _ in open_original(path).tensors():
                pass
        except InputError:
            refused += 1
    assert refused > 200
    for wrong in (b"", b"not a zip", pickle.dumps({"model": {}})):
        path.write_bytes(wrong)
        with pytest.raises(InputError, match="damaged"):
            open_original(path)


def test_every_parameter_has_an_original_name(tmp_path: Path, model_args: Callable[[], Any]) -> None:
    opened = open_original(save_pickle(tmp_path, model_args, state_dict()))
    names = {original_name(name) for name in param_table(opened.config)}
    assert names == state_dict().keys() - {"output.weight", "rope.freqs_cis"}


def test_changed_pickle_module_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """If Python lacks the class that our reader restricts, the error message says so."""
    monkeypatch.delattr(pickle, "_Unpickler")
    with pytest.raises(InputError, match=r"(?s)different pickle\._Unpickler.*found: Python 3\..*earlier Python"):
        torch_pickle._python_unpickler()
