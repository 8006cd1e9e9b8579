"""Import and export of Hugging Face checkpoints, compared with `transformers` on the same folders."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig

from minillm_core.config import ModelConfig
from minillm_core.errors import InputError
from minillm_core.interop.exports import export_hf
from minillm_core.interop.hf import open_hf, write_hf_weights
from minillm_core.interop.hf_config import to_hf_config
from minillm_core.interop.imports import import_checkpoint
from minillm_core.text.tokenizer import Tokenizer
from minillm_core.text.tokenizer_json import load_tokenizer
from minillm_core.training.checkpoints import read_info
from minillm_jax.weights import split_model
from parity_tests.conftest import (
    BACKENDS,
    MODELS,
    TIERS,
    TINY,
    Tier,
    assert_close,
    jax_forward,
    random_tokens,
    random_weights,
    to_numpy,
)
from parity_tests.test_transformers import WITH_WINDOW, llama_logits, named, without_casts

__all__ = ["without_casts"]


def save_llama(config: ModelConfig, folder: Path, dtype: torch.dtype, shard: str = "40KB") -> LlamaForCausalLM:
    """Save a checkpoint with `transformers` itself, in shards."""
    fields = {k: v for k, v in to_hf_config(config, "float32").items() if k not in ("architectures", "model_type")}
    llama = AutoModelForCausalLM.from_config(
        LlamaConfig(**fields) if config.sliding_window is None else MistralConfig(**fields)
    )
    weights = {name: torch.from_numpy(array.copy()) for name, array in random_weights(config, sharpness=1.0).items()}
    missing, unexpected = llama.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    llama = llama.to(dtype).eval()
    llama.save_pretrained(folder, max_shard_size=shard)
    return llama


def rewrite(path: Path, **fields: Any) -> None:
    path.write_text(
        json.dumps((json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}) | fields), encoding="utf-8"
    )


def logits_of(framework: str, checkpoint: Path, dtype: str, tokens: np.ndarray) -> np.ndarray:
    model = BACKENDS[framework].load(checkpoint, dtype)
    if framework == "jax":
        return to_numpy(jax_forward(*split_model(model), tokens, None)[0])
    with torch.inference_mode():
        return to_numpy(model(torch.from_numpy(tokens))[0])


@pytest.mark.parametrize("name", named(WITH_WINDOW))
def test_imported_model_matches_transformers(
    name: str, tmp_path: Path, float64: Tier, without_casts: Callable[[ModelConfig], None]
) -> None:
    """A sharded checkpoint of transformers gives its logits in both frameworks: float32 unmodified, float64 without
    transformers' casts. Greedy decoding with a cache gives its tokens."""
    config = WITH_WINDOW[name]
    llama = save_llama(config, tmp_path / "hf", torch.float32)
    shards = list((tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) > 1
    checkpoints = {
        key: import_checkpoint("hf", tmp_path / "hf", tmp_path / key, backend) for key, backend in BACKENDS.items()
    }
    for checkpoint in checkpoints.values():
        assert read_info(checkpoint).config.model == replace(config, head_dim=config.resolved_head_dim)
    tokens = random_tokens(config, 2, 500)
    expected = llama_logits(llama, tokens)
    for framework, checkpoint in checkpoints.items():
        logits = logits_of(framework, checkpoint, "float32", tokens)
        assert_close(f"{framework} float32", logits, expected, TIERS["float32"].logits)
    text = llama.generate(
        torch.from_numpy(tokens[:1, :20]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    without_casts(config)
    expected = llama_logits(llama.double(), tokens)
    for framework, checkpoint in checkpoints.items():
        assert_close(f"{framework} float64", logits_of(framework, checkpoint, "float64", tokens), expected, 1e-12)
        generator = BACKENDS[framework].Generator(BACKENDS[framework].load(checkpoint), NoText(config))
        completion = generator.generate([tokens[0, :20].tolist()], max_new_tokens=40, temperature=0, logprobs=True)[0]
        assert completion.tokens == text[0, 20:].tolist()


class NoText(Tokenizer):
    """A stand-in for models without a tokenizer; no id ends a text."""

    def __init__(self, config: ModelConfig):
        self.vocab_size, self.bos_id, self.end_ids = config.vocab_size, 0, frozenset()

    def decode_after(self, ids: Any) -> str:
        return ""


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_round_trip_is_bit_exact(framework: str, dtype: str, tmp_path: Path) -> None:
    """hf -> framework -> hf: the same bits under the same names, in the same dtype, however they are sharded."""
    config = MODELS["gqa"]
    save_llama(config, tmp_path / "hf", getattr(torch, dtype))
    if dtype == "float64":  # numbers that float32 does not hold
        for path in (tmp_path / "hf").glob("*.safetensors"):
            save_file({name: x * (1 + 1e-12) for name, x in load_file(path).items()}, path, {"format": "pt"})
    checkpoint = import_checkpoint("hf", tmp_path / "hf", tmp_path / "run", BACKENDS[framework])
    export_hf(checkpoint, tmp_path / "back", BACKENDS[framework], dtype)
    before = load_all(tmp_path / "hf")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == getattr(torch, dtype)
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


@pytest.mark.extended
def test_transformers_reads_exported_shards(tmp_path: Path) -> None:
    """transformers reads the shards and the index that we write."""
    config = MODELS["gqa"]
    weights = random_weights(config)
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(config, "bfloat16")))
    write_hf_weights(tmp_path, config, weights, "bfloat16", shard_bytes=60_000)
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    embedding = weights["model.embed_tokens.weight"].nbytes // 2
    assert max(path.stat().st_size for path in shards) < max(60_000, embedding) + 2000
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * array.size for array in weights.values())  # bytes
    llama = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in llama.state_dict().items():
        if name in weights:
            assert np.array_equal(tensor.float().numpy(), weights[name].astype(ml_dtypes.bfloat16).astype(np.float32))
    assert all(np.isfinite(array).all() for _, array in open_hf(tmp_path).tensors())


@pytest.fixture
def text_checkpoint(tokenizer: Tokenizer, tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint of random weights with a real tokenizer."""

    def make(framework: str) -> Path:
        hf = tmp_path / "source"
        hf.mkdir()
        (hf / "config.json").write_text(json.dumps(to_hf_config(TINY, "float32")))
        write_hf_weights(hf, TINY, random_weights(TINY), "float32")
        shutil.copyfile(tokenizer.path, hf / "tokenizer.model")
        return import_checkpoint("hf", hf, tmp_path / "run", BACKENDS[framework])

    return make


@pytest.mark.extended
@pytest.mark.parametrize("framework", BACKENDS)
def test_export_works_with_auto_classes(
    framework: str, text_checkpoint: Callable[[str], Path], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """AutoModel and AutoTokenizer load the export and give the same text; imported again, it gives the same ids."""
    checkpoint = text_checkpoint(framework)
    folder = export_hf(checkpoint, tmp_path / "exported", BACKENDS[framework], "float32")
    llama, auto = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id) == (tokenizer.bos_id, tokenizer.eos_id, 3)
    assert llama.generation_config.eos_token_id == tokenizer.eos_id
    ours = BACKENDS[framework].Generator(BACKENDS[framework].load(checkpoint), tokenizer)
    for prompt in ("The Congress", "Fellow citizens of", "In 1790 \n"):
        ids = auto(prompt, return_tensors="pt").input_ids
        assert ids[0].tolist() == tokenizer.encode(prompt, bos=True)
        out = llama.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
        completion = ours.generate([prompt], max_new_tokens=40, temperature=0, logprobs=True)[0]
        assert completion.tokens == [i for i in out.tolist() if i != tokenizer.eos_id]
        pieces = [i for i in completion.tokens if i >= 4 + 256]  # invalid UTF-8 has different replacement characters
        assert auto.decode(pieces) == tokenizer.decode(pieces)
        assert len(pieces) > 10
    assert auto.model_max_length == TINY.context_length
    assert not (folder / "loss.png").exists()  # an imported model has no loss curve
    card = (folder / "README.md").read_text()
    assert "n_kv_heads: 2" in card
    assert f"{sum(array.size for array in random_weights(TINY).values()):,} parameters" in card
    again = import_checkpoint("hf", folder, tmp_path / "again", BACKENDS[framework])
    assert load_tokenizer(again, TINY.vocab_size).encode("The Congress") == tokenizer.encode("The Congress")


def test_different_weights_in_one_run_are_refused(tmp_path: Path) -> None:
    """Importing the same model in both frameworks works; a model with the same configuration but different weights is
    refused."""
    save_llama(TINY, tmp_path / "hf", torch.float32)
    save_file({k: v + 1 for k, v in load_all(tmp_path / "hf").items()}, tmp_path / "other.safetensors")
    import_checkpoint("hf", tmp_path / "hf", tmp_path / "run", BACKENDS["jax"])
    import_checkpoint("hf", tmp_path / "hf", tmp_path / "run", BACKENDS["torch"])
    shutil.rmtree(tmp_path / "run" / "torch")
    for shard in [*(tmp_path / "hf").glob("*.safetensors"), tmp_path / "hf" / "model.safetensors.index.json"]:
        shard.unlink()
    (tmp_path / "other.safetensors").rename(tmp_path / "hf" / "model.safetensors")
    with pytest.raises(InputError, match="uses different weights"):
        import_checkpoint("hf", tmp_path / "hf", tmp_path / "run", BACKENDS["torch"])
    assert not (tmp_path / "run" / "torch").exists()


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_nothing_is_overwritten(text_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = text_checkpoint("torch")
    with pytest.raises(InputError, match="already has checkpoints"):
        import_checkpoint("hf", tmp_path / "source", tmp_path / "run", BACKENDS["torch"])
    with pytest.raises(InputError, match="destination exists"):
        export_hf(checkpoint, tmp_path / "source", BACKENDS["torch"], "float32")
    (tmp_path / "full").write_text("a file where a folder should be")
    with pytest.raises((InputError, OSError)):
        export_hf(checkpoint, tmp_path / "full" / "hf", BACKENDS["torch"], "float32")
    assert not list(tmp_path.glob(".*.partial"))
