"""Configurations of Hugging Face that are read or refused, and damaged folders."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minillm_core.errors import InputError
from minillm_core.interop.hf import open_hf, write_hf_weights
from minillm_core.interop.hf_config import NEUTRAL, ORDINARY, READ, from_hf_config, to_hf_config
from minillm_core.interop.imports import import_checkpoint
from minillm_core.model.rope import inverse_frequencies
from minillm_core.tensors import Tensors
from parity_tests.conftest import BACKENDS, MODELS, TINY, random_weights
from parity_tests.test_hf import rewrite, save_llama

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
GOOD: dict[str, Any] = to_hf_config(TINY, "float32")
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sliding_window": 4096}, "sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "mixtral"}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is out of range"),
        ({"model_type": "mistral", "sliding_window": "none"}, "sliding_window: expected int"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"is_causal": False}, "is_causal"),
        ({"rms_norm_eps": 10**400}, "finite number"),
        ({"rms_norm_eps": float("inf")}, "finite number"),
        ({"initializer_range": -(10**400)}, "finite number"),
        ({"max_position_embeddings": 10**15}, "at most"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10**400}}, "above 0"),
        ({"layer_types": 5}, "layer_types"),
        ({"rope_theta": 5e5}, "rope_theta"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "low_freq_factor"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "low_freq_factor < high_freq_factor"),
        ({"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64.5}}, "whole original_max_position"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, "above 0"),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 5.0}}, "differ"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"hidden_size": -1}, "width"),
        ({"num_key_value_heads": 3}, "n_kv_heads"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_unsupported_models_are_refused(change: dict[str, Any], named: str) -> None:
    assert from_hf_config(GOOD, "x") == TINY
    with pytest.raises(InputError, match=named):
        from_hf_config(GOOD | change, "config.json")


def test_older_configurations() -> None:
    """transformers 4's keys, the defaults of LlamaConfig, and both forms of Llama 3's scaling."""
    for config in (MODELS["gqa"], MODELS["mha-narrow-heads-scaled"]):
        theirs = {key: value for key, value in to_hf_config(config, "bfloat16").items() if key != "rope_parameters"}
        assert from_hf_config(theirs, "x") == replace(config, head_dim=config.resolved_head_dim)
        assert theirs["torch_dtype"] == "bfloat16"
    new = to_hf_config(config, "float32")
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    assert from_hf_config(new, "x") == from_hf_config(old, "x") == from_hf_config({**new, "rope_scaling": None}, "x")
    unknown = {
        "_attn_implementation_autoset": True,
        "return_dict": True,
        "output_hidden_states": False,
        "unsloth_fixed": True,
    }
    assert from_hf_config(new | unknown, "x") == from_hf_config(new, "x")
    nulls = {"rope_scaling": {"rope_type": None, "type": "default"}, "rope_parameters": None}
    assert from_hf_config(GOOD | nulls, "x") == from_hf_config(GOOD, "x")
    for window in (None, 4096):
        mistral = from_hf_config(GOOD | {"model_type": "mistral", "sliding_window": window}, "x")
        assert mistral == replace(from_hf_config(GOOD, "x"), sliding_window=window)
        assert window is None or from_hf_config(to_hf_config(mistral, "float32"), "x") == mistral
    bare = {key: GOOD[key] for key in ("model_type", "vocab_size", "hidden_size", "intermediate_size")}
    bare |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    config, llama = from_hf_config(bare, "x"), LlamaConfig(**{k: v for k, v in bare.items() if k != "model_type"})
    assert (config.n_kv_heads, config.init_std) == (llama.num_key_value_heads, llama.initializer_range)
    assert (config.context_length, config.norm_eps) == (llama.max_position_embeddings, llama.rms_norm_eps)
    assert (config.tie_embeddings, config.rope_theta) == (
        llama.tie_word_embeddings,
        llama.rope_parameters["rope_theta"],
    )


INTERNAL = {
    "base_model_ep_plan",
    "base_model_fsdp_plan",
    "base_model_pp_plan",
    "base_model_tp_plan",
    "dict_dtype_to_str",
}
INTERNAL |= {"get_text_config", "gradient_checkpointing", "to_dict", "vision_aspect_ratio", "vision_feature_layer"}
INTERNAL |= {"vision_feature_select_strategy"}
"""Attributes that transformers asks for and that no config.json of such a model sets, or that change no logits."""
WRONG_KIND = (AttributeError, IndexError, RuntimeError, TypeError, ValueError, StrictDataclassError)
"""What transformers raises for a value of the wrong kind: then there is no model to compare with."""
VALUES = (True, False, 0, 1, 7, 0.5, "x", [1], {})


@pytest.mark.parametrize(("kind", "model"), [(LlamaConfig, LlamaForCausalLM), (MistralConfig, MistralForCausalLM)])
def test_every_key_that_transformers_reads_is_known(
    kind: Any, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded while transformers finds, loads and runs a model of a folder. A key that it does not read cannot change
    the logits."""
    model(kind(**SMALL)).save_pretrained(tmp_path)
    asked: set[str] = set()
    get = kind.__getattribute__

    def recording(self: Any, name: str) -> Any:
        asked.add(name)
        return get(self, name)

    monkeypatch.setattr(kind, "__getattribute__", recording)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, model)
    with torch.no_grad():
        loaded(torch.arange(12)[None])
    asked = {name for name in asked if not name.startswith("_") and not callable(getattr(kind, name, None))}
    assert " ".join(sorted(asked - READ - NEUTRAL.keys() - ORDINARY - INTERNAL)) == "auto_map"
    assert len(asked) > 20


@pytest.mark.extended
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about some of its own keys
@pytest.mark.parametrize(("kind", "model"), [(LlamaConfig, LlamaForCausalLM), (MistralConfig, MistralForCausalLM)])
def test_a_key_that_is_passed_over_changes_no_logits(kind: Any, model: Any) -> None:
    """Every key of a configuration of transformers, with values of every kind: if the folder is read here and by
    transformers, the logits are those without the key."""
    torch.manual_seed(0)
    plain = kind(**SMALL)
    base, tokens = json.loads(plain.to_json_string(use_diff=False)), torch.arange(12)[None]
    weights = model(plain).state_dict()

    def logits(data: dict[str, Any]) -> torch.Tensor:
        made = model(kind.from_dict(data)).eval()
        made.load_state_dict(weights)
        with torch.no_grad():
            return made(tokens, return_dict=True, use_cache=False).logits

    expected, ours = logits(base), from_hf_config(base, "x")
    keys = {*base, *vars(plain), *ORDINARY, *NEUTRAL, *PretrainedConfig().to_dict(), *GenerationConfig().to_dict()}
    compared = 0
    for key in sorted(keys - READ - ({"sliding_window"} if kind is MistralConfig else set())):
        for value in VALUES:
            try:
                found = from_hf_config(base | {key: value}, "x")
            except InputError:
                continue
            try:
                theirs = logits(base | {key: value})
            except WRONG_KIND:
                continue
            assert found == ours
            assert torch.equal(theirs, expected), (key, value)
            compared += 1
    assert compared > 300


def test_keys_that_transformers_does_not_read(caplog: pytest.LogCaptureFixture) -> None:
    more = {"logits_scaling": 8.0, "auto_map": {"AutoModel": "other.Model"}, "tokenizer_class": "LlamaTokenizer"}
    assert from_hf_config(GOOD | more, "config.json") == TINY
    assert "so they are ignored: logits_scaling" in caplog.text
    assert "the model's own code (auto_map) is not run" in caplog.text


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4, "factor": 8.0, "beta_fast": 3},
        {"rope_theta": 1e4, "factor": 8.0},
        LLAMA3 | {"beta_fast": 3.0},
        {key: value for key, value in LLAMA3.items() if not key.startswith("original")},
    ],
)
@pytest.mark.parametrize("outer", [{}, {"original_max_position_embeddings": 24}])
def test_frequencies_are_those_of_transformers(rope: dict[str, Any], outer: dict[str, Any]) -> None:
    """Keys of other types of scaling are ignored, and missing ones have its defaults."""
    config = LlamaConfig.from_dict(SMALL | {"rope_parameters": dict(rope)} | outer)
    theirs = LlamaRotaryEmbedding(config).inv_freq.numpy()
    ours = inverse_frequencies(from_hf_config(SMALL | {"model_type": "llama", "rope_parameters": rope} | outer, "x"))
    assert np.allclose(ours, theirs, rtol=1e-6)


def test_missing_keys_have_the_defaults_of_transformers() -> None:
    for kind in (LlamaConfig, MistralConfig):
        whole = json.loads(kind().to_json_string(use_diff=False))
        assert from_hf_config({"model_type": kind.model_type}, "x") == replace(
            from_hf_config(whole, "x"), head_dim=None
        )


@pytest.mark.parametrize("change", ["no prefix", "./", "a folder", "unlisted frequencies", "index and file"])
def test_folders_that_transformers_reads(change: str, tmp_path: Path) -> None:
    """What transformers loads with the same logits is imported."""
    folder = tmp_path / "hf"
    save_llama(TINY, folder, torch.float32, shard="1GB" if change in ("no prefix", "index and file") else "40KB")
    index = folder / "model.safetensors.index.json"
    if change == "no prefix":
        tensors = load_file(folder / "model.safetensors")
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    elif change == "index and file":
        index.write_text("{}", encoding="utf-8")
    elif change == "unlisted frequencies":
        shard = sorted(folder.glob("*.safetensors"))[0]
        H = TINY.resolved_head_dim
        more = {FREQUENCIES: TINY.rope_theta ** (-torch.arange(0, H, 2) / H)}
        save_file(load_file(shard) | more, shard, {"format": "pt"})
    else:
        data = json.loads(index.read_text(encoding="utf-8"))
        place = {"./": "./", "a folder": "part/"}[change]
        data["weight_map"] = {name: place + file for name, file in data["weight_map"].items()}
        index.write_text(json.dumps(data), encoding="utf-8")
        (folder / "part").mkdir()
        for path in list(folder.glob("*.safetensors")) * (change == "a folder"):
            path.rename(folder / "part" / path.name)
    theirs = LlamaForCausalLM.from_pretrained(folder).requires_grad_(False)
    expected = {name: tensor.numpy() for name, tensor in theirs.named_parameters()}
    found = dict(open_hf(folder).tensors())
    assert found.keys() == random_weights(TINY).keys()
    for name, array in found.items():
        assert np.array_equal(array, expected[name])


Change = Callable[[dict[str, torch.Tensor]], object]


def _index(folder: Path, file: str, change: dict[str, str | None] | None = None) -> None:
    weights = dict.fromkeys(random_weights(TINY), file) | (change or {})
    weights = {name: place for name, place in weights.items() if place}
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def _edit(change: Change) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit


def _set(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return _edit(lambda tensors: tensors.__setitem__(name, tensor))


NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "config.json").write_text("{"), "damaged JSON"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "damaged JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "not a configuration"),
        (lambda f: (f / "generation_config.json").write_text("[]"), "generation_config"),
        (lambda f: rewrite(f / "config.json", bos_token_id="1"), "not token ids: bos_token_id"),
        (lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
        (lambda f: rewrite(f / "generation_config.json", eos_token_id=[2, "</s>"]), "eos_token_id"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "damaged safetensors"),
        (lambda f: _index(f, "../model.safetensors"), "points outside"),
        (lambda f: _index(f, "/etc/passwd"), "points outside"),
        (lambda f: _index(f, "model-2.safetensors"), "shards are missing"),
        (lambda f: _index(f, "model-1.safetensors", {"more": "model-1.safetensors"}), "lacks tensors"),
        (lambda f: _index(f, "model-1.safetensors", {NORM: None}), "does not list"),
        (lambda f: rewrite(f / "config.json", num_hidden_layers=10**6), "more layers than tensors"),
        (_edit(lambda tensors: tensors.pop(NORM)), NORM),
        (_set("model.layers.0.self_attn.q_proj.bias", torch.ones(4)), "unexpected"),
        (_set("model.layers.9.self_attn.q_proj.bias", torch.zeros(64)), "unexpected"),
        (_set("norm.weight", torch.zeros(TINY.width)), "unexpected"),
        (_edit(lambda t: t.update({n.removeprefix("model."): t[n].clone() for n in (EMBEDDING, NORM)})), "unexpected"),
        (_set("model.layers.0.mlp.experts.w1", torch.zeros(4)), "unexpected"),
        (_set(NORM, torch.zeros(3)), "shape"),
        (
            _edit(lambda t: [t.update({f"_orig_mod.{name}": t.pop(name)}) for name in list(t)]),
            "begins with '_orig_mod.'",
        ),
        (_set(NORM, torch.full((TINY.width,), torch.nan)), "not finite"),
        (_set(NORM, torch.zeros(TINY.width, dtype=torch.int8)), "quantised"),
        (_set("lm_head.weight", torch.zeros(TINY.vocab_size, TINY.width)), "head differs"),
        (_set(FREQUENCIES, torch.ones(TINY.resolved_head_dim // 2)), "rotary frequencies"),
        (_set(FREQUENCIES, 1.2e4 ** -torch.arange(0, 1, 2 / TINY.resolved_head_dim)), "rotary frequencies"),
    ],
)
def test_damaged_folders(damage: Callable[[Path], None], named: str, tmp_path: Path) -> None:
    """The message names the damage, and nothing is written."""
    folder, run = tmp_path / "hf", tmp_path / "run"
    save_llama(TINY, folder, torch.float32, shard="1GB")
    damage(folder)
    with pytest.raises(InputError, match=named) as refused:
        import_checkpoint("hf", folder, run, BACKENDS["torch"])
    assert "what to do: " in str(refused.value)
    assert not run.exists()


def test_float16_overflow_is_refused(tmp_path: Path) -> None:
    weights = random_weights(TINY)
    weights[NORM][0] = 7e4
    with pytest.raises(InputError, match="float16 cannot hold"):
        write_hf_weights(tmp_path, TINY, weights, "float16")


def test_redundant_tensors_are_left_out(tmp_path: Path) -> None:
    save_llama(TINY, tmp_path / "hf", torch.float32, shard="1GB")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
        H = TINY.resolved_head_dim
        tensors[FREQUENCIES] = TINY.rope_theta ** (-torch.arange(0, H, 2) / H)
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[name.replace("weight", "bias")] = torch.zeros(len(tensors[name]))

    save_llama(TINY, tmp_path / "plain", torch.float32, shard="1GB")
    expected = dict(open_hf(tmp_path / "plain").tensors())
    rewrite(tmp_path / "hf/config.json", attention_bias=True, mlp_bias=True)
    _edit(add)(tmp_path / "hf")
    found: Tensors = dict(open_hf(tmp_path / "hf").tensors())
    assert found.keys() == expected.keys()


@pytest.mark.extended
def test_damaged_files_never_crash(tmp_path: Path) -> None:
    """1,200 mutations of the header, the data and the JSON files: each is read or refused with an InputError."""
    folder = tmp_path / "hf"
    save_llama(TINY, folder, torch.float32, shard="1GB")
    rng = np.random.default_rng(0)
    outcomes = {"read": 0, "refused": 0}
    for path, count in ((folder / "model.safetensors", 800), (folder / "config.json", 400)):
        content = path.read_bytes()
        header = (
            min(len(content), 8 + int.from_bytes(content[:8], "little")) if path.suffix != ".json" else len(content)
        )
        for i in range(count):
            mutated = bytearray(content)
            kind = i % 4
            if kind == 0:
                del mutated[int(rng.integers(header + 1)) :]
            elif kind == 1:
                for at in rng.integers(0, header, rng.integers(1, 6)):
                    mutated[at] = rng.integers(256)
            elif kind == 2:
                at = int(rng.integers(header))
                mutated[at:at] = rng.bytes(int(rng.integers(1, 30)))
            else:
                digits = [at for at in range(header) if chr(mutated[at]).isdigit()] or [0]
                mutated[rng.choice(digits)] = rng.choice(list(b"0123456789-e"))
            path.write_bytes(mutated)
            try:
                for _ in open_hf(folder).tensors():
                    pass
                outcomes["read"] += 1
            except InputError:
                outcomes["refused"] += 1
        path.write_bytes(content)
    assert outcomes["refused"] > 600
    assert sum(outcomes.values()) == 1200
