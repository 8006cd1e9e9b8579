"""The table of parameters: counts, names and initial weights, and that both frameworks agree with it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import minillm_jax
import minillm_torch
from minillm_core.config import ModelConfig, load_config, preset_names
from minillm_core.errors import InputError
from minillm_core.model.params import count_params, forward_flops, init_param, init_params, param_table
from minillm_jax import weights as jax_weights
from minillm_torch import weights as torch_weights
from parity_tests.conftest import MODELS, random_weights, run_config

PUBLISHED_COUNTS = {
    "mini-llm-50m": 50_049_408,  # the original project
    "llama-1b": 1_235_814_400,  # meta-llama/Llama-3.2-1B
    "llama-8b": 8_030_261_248,  # meta-llama/Llama-3.1-8B
    "llama-70b": 70_553_706_496,  # meta-llama/Llama-3.1-70B
}


@pytest.mark.parametrize("preset", preset_names())
def test_presets_agree_without_allocating(preset: str) -> None:
    config = load_config(preset).model
    for backend in (minillm_jax, minillm_torch):
        assert backend.count_params(config) == count_params(config), backend.FRAMEWORK
        assert backend.count_forward_flops(config, 2, 64) == forward_flops(config, 2, 64), backend.FRAMEWORK
    assert count_params(config) == PUBLISHED_COUNTS.get(preset, count_params(config))


def test_preset_sizes() -> None:
    assert 3e6 < count_params(load_config("quickstart").model) < 5e6
    assert 78e6 < count_params(load_config("mini-llm-80m").model) < 82e6
    assert 79e9 < count_params(load_config("llama-80b").model) < 82e9


def test_names_are_a_bijection(config: ModelConfig) -> None:
    for weights in (jax_weights, torch_weights):
        paths = weights.param_paths(config)
        assert list(paths) == list(param_table(config))
        assert len(set(paths.values())) == len(paths)
        assert [weights.canonical_name(path) for path in paths.values()] == list(paths)


def test_round_trip_in_memory(config: ModelConfig) -> None:
    """Canonical -> framework -> canonical is exact, bit for bit; JAX kernels are laid out (in, out)."""
    tensors = random_weights(config)
    in_jax = jax_weights.from_canonical(config, tensors, np.float32)
    in_torch = torch_weights.from_canonical(config, tensors, torch.float32)
    for back in (jax_weights.to_canonical(config, in_jax), torch_weights.to_canonical(config, in_torch)):
        assert list(back) == list(tensors)
        assert all(np.array_equal(back[name], tensors[name]) for name in tensors)
    kernel = jax_weights.to_framework(config, tensors)["model.layers.0.mlp.up_proj.kernel"]
    assert kernel.shape == (config.width, config.hidden)


def test_stacked_layers() -> None:
    """Twelve layers, whose numbers are not in alphabetical order: one array for all of them, and back."""
    config = replace(MODELS["gqa"], n_layers=12)
    tensors = random_weights(config)
    stacked = jax_weights.from_canonical(config, tensors, np.float32, scan_layers=True)
    assert len(stacked) == len(jax_weights.to_framework(config, tensors)) - 11 * 9
    for layer, kernel in enumerate(stacked["model.layers.mlp.up_proj.kernel"]):
        assert np.array_equal(kernel.T, tensors[f"model.layers.{layer}.mlp.up_proj.weight"])
    back = jax_weights.to_canonical(config, jax_weights.unstack_layers(stacked))
    assert list(back) == list(tensors)
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("weights", [jax_weights, torch_weights], ids=["jax", "torch"])
def test_all_mismatched_tensors_in_one_message(weights: object) -> None:
    config = MODELS["gqa"]
    tensors = random_weights(config)
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = np.zeros((3, 3), np.float32)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((1, 2), np.float32)
    with pytest.raises(InputError) as error:
        weights.to_framework(config, tensors)
    for line in (
        "missing: model.norm.weight (96,)",
        "unexpected: lm_head.weight (3, 3)",
        "shape: model.layers.0.mlp.up_proj.weight: expected (160, 96), found (1, 2)",
    ):
        assert line in str(error.value)


def test_initial_weights() -> None:
    """The configured distribution; a slice of rows equals that slice of the whole; names and seeds are independent."""
    config = load_config("quickstart").model
    table = param_table(config)
    whole = init_params(config, seed=7)
    for name, spec in table.items():
        array = whole[name]
        assert array.dtype == np.float32
        if spec.std is None:
            assert (array == 1).all()
            continue
        assert abs(array.std() / spec.std - 1) < 0.02, name
        assert abs(array.mean()) < 5 * spec.std / np.sqrt(array.size), name
        rows = spec.shape[0]
        for start, stop in ((0, 1), (rows // 3, rows // 2), (rows - 1, rows)):
            assert np.array_equal(init_param(spec, 7, start, stop), array[start:stop]), name
    for name, spec in table.items():
        is_residual_output = name.endswith(("o_proj.weight", "down_proj.weight"))
        expected = 0.02 / np.sqrt(8) if is_residual_output else 0.02  # 4 layers
        assert spec.std is None or spec.std == pytest.approx(expected), name
    embedding = table["model.embed_tokens.weight"]
    assert not np.array_equal(init_param(embedding, 8), whole[embedding.name])
    q, o = (whole[f"model.layers.0.self_attn.{n}_proj.weight"].ravel() for n in "qo")
    assert abs(np.corrcoef(q, o)[0, 1]) < 0.02


@pytest.mark.parametrize("backend", [minillm_jax, minillm_torch], ids=["jax", "torch"])
@pytest.mark.parametrize("seed", [1, 2])
def test_training_starts_from_initial_weights(backend: object, seed: int) -> None:
    config = run_config(MODELS["gqa"], seed=seed)
    state = backend.export_state(config, backend.init_state(config))
    expected = init_params(config.model, seed)
    assert all(np.array_equal(state.weights[name], array) for name, array in expected.items())
    assert all((array == 0).all() for array in (*state.exp_avg.values(), *state.exp_avg_sq.values()))


def test_initial_weights_are_frozen() -> None:
    """A frozen sample: if these bits change, every run changes."""
    spec = param_table(MODELS["gqa"])["model.layers.1.mlp.gate_proj.weight"]
    frozen = [0.02610214240849018, 0.03391113504767418, 0.014867681078612804, -0.020043442025780678]
    assert np.array_equal(init_param(spec, 1337)[5, :4], np.array(frozen, np.float32))
