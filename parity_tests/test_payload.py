"""The files of a checkpoint's tensors: their names and content, what they assume of Orbax, checkpoints of 0.1.0."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import LlamaForCausalLM

import minillm_jax
import minillm_torch
from minillm_core.config import ModelConfig
from minillm_core.data.batches import Batch
from minillm_core.errors import InputError
from minillm_core.model.params import param_table
from minillm_core.tensors import Tensors
from minillm_core.training.checkpoints import TrainingState, find_checkpoint, read_info, verify_checkpoint
from minillm_jax import payload as jax_payload
from minillm_jax.weights import to_framework
from parity_tests.conftest import (
    BACKENDS,
    MODELS,
    ROOT,
    TIERS,
    TINY,
    assert_close,
    assert_same_bits,
    random_tokens,
    random_weights,
    run_config,
    to_numpy,
    to_torch,
)

CHANGED = (
    f"orbax-checkpoint {ocp.__version__} lays out a checkpoint in a way that minillm_jax/payload.py does not know: "
    "adapt that file, the only one that depends on it"
)


def read_with_orbax(folder: Path) -> Any:
    """A pytree as Orbax's own reader gives it, in numpy."""
    tree = ocp.PyTreeCheckpointHandler().metadata(folder).tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(folder, restore_args=as_numpy)


def test_orbax_reads_what_we_write(tmp_path: Path) -> None:
    """Our files are ordinary Orbax checkpoints: its own reader gives the same bits, of several chunks too."""
    large = np.random.default_rng(0).standard_normal((3 * jax_payload.CHUNK_BYTES // 32, 8)).astype(np.float32)
    weights = {"a.b.kernel": large, "a.scale": jnp.ones(5, jnp.bfloat16)}
    jax_payload.start_writing(tmp_path, TINY, {"weights": weights})()
    found = read_with_orbax(tmp_path / "orbax" / "weights")
    assert found.keys() == weights.keys(), CHANGED
    for name, array in weights.items():
        assert np.asarray(found[name]).tobytes() == np.asarray(array).tobytes(), CHANGED


@pytest.mark.parametrize("group", ["weights", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("n_bytes", [1 << 10, 3 * jax_payload.CHUNK_BYTES], ids=["one chunk", "several chunks"])
def test_we_read_what_orbax_writes(n_bytes: int, group: str, tmp_path: Path) -> None:
    """A tree that Orbax has written by itself, as one chunk or in several."""
    array = np.random.default_rng(0).standard_normal((n_bytes // 32, 8)).astype(np.float32)
    tree: Any = {"a.b.kernel": array}
    folder = "weights" if group == "weights" else "optimizer"
    tree = tree if group == "weights" else {"exp_avg": {}, "exp_avg_sq": {}, group: tree}
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=jax_payload.CHUNK_BYTES), tree)
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(tmp_path / "orbax" / folder, tree, save_args=save_args)
    try:
        assert jax_payload.saved_shapes(tmp_path, group) == {"a.b.kernel": array.shape}, CHANGED
        found = jax_payload.read_tensor(tmp_path, group, "a.b.kernel")
    except (InputError, TypeError, AttributeError) as error:
        pytest.fail(f"{CHANGED}: {error!r}")
    assert found.tobytes() == array.tobytes(), CHANGED


def random_state(config: ModelConfig, seed: int = 0) -> TrainingState:
    """Weights and both moments, all different, float32."""
    rng = np.random.default_rng(seed)
    groups = [
        {name: rng.standard_normal(spec.shape).astype(np.float32) for name, spec in param_table(config).items()}
        for _ in range(3)
    ]
    return TrainingState(*groups)


def write_payload(framework: str, folder: Path, state: TrainingState) -> None:
    BACKENDS[framework].write_payload(folder, run_config(TINY), state)


def start_payload(framework: str, folder: Path, state: TrainingState) -> None:
    backend, config = BACKENDS[framework], run_config(TINY)
    backend.start_payload(folder, config, backend.import_state(config, state, 3))()


@pytest.mark.parametrize("write", [write_payload, start_payload])
def test_files_hold_what_their_names_say(write: Callable[[str, Path, TrainingState], None], tmp_path: Path) -> None:
    """Literal names, read without this project's code: weights, first and second moments are not exchanged."""
    state = random_state(TINY)
    for framework in BACKENDS:
        (tmp_path / framework).mkdir()
        write(framework, tmp_path / framework, state)
    assert_same_tensors(load_file(tmp_path / "torch/model.safetensors"), state.weights)
    moments = {f"exp_avg.{name}": array for name, array in state.exp_avg.items()}
    moments |= {f"exp_avg_sq.{name}": array for name, array in state.exp_avg_sq.items()}
    assert_same_tensors(load_file(tmp_path / "torch/optimizer.safetensors"), moments)
    weights = read_with_orbax(tmp_path / "jax/orbax/weights")
    kernel = "model.layers.1.mlp.up_proj"
    assert np.array_equal(weights[f"{kernel}.kernel"], state.weights[f"{kernel}.weight"].T)
    assert_same_tensors(weights, to_framework(TINY, state.weights))
    optimizer = read_with_orbax(tmp_path / "jax/orbax/optimizer")
    assert optimizer.keys() == {"exp_avg", "exp_avg_sq"}
    assert_same_tensors(optimizer["exp_avg"], to_framework(TINY, state.exp_avg))
    assert_same_tensors(optimizer["exp_avg_sq"], to_framework(TINY, state.exp_avg_sq))


def assert_same_tensors(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype, name
        assert np.array_equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("config", [TINY, replace(TINY, tie_embeddings=False)], ids=["tied", "untied"])
@pytest.mark.parametrize("has_moments", [False, True])
def test_states_come_back(framework: str, dtype: str, config: ModelConfig, has_moments: bool, tmp_path: Path) -> None:
    """The same bits; without moments there are no files for them."""
    backend, settings = BACKENDS[framework], run_config(config)
    state = random_state(config)
    groups = [{name: array.astype(dtype) for name, array in group.items()} for group in vars(state).values()]
    state = TrainingState(groups[0], *(groups[1:] if has_moments else [{}, {}]))
    backend.write_payload(tmp_path, settings, state)
    found = backend.read_payload(tmp_path, settings)
    for ours, theirs in zip(vars(found).values(), vars(state).values(), strict=True):
        assert_same_tensors(ours, theirs)
    payload = {"jax": minillm_jax.payload, "torch": minillm_torch.payload}[framework]
    assert payload.has_group(tmp_path, "weights")
    assert payload.has_group(tmp_path, "exp_avg") == has_moments


@pytest.mark.parametrize("framework", BACKENDS)
def test_checkpoint_of_an_earlier_version(framework: str) -> None:
    """A checkpoint that an earlier 0.1.0 wrote, with the state of `random_state`: the same bits, the same function, and
    the run continues."""
    run = ROOT / "parity_tests/checkpoints_0.1"
    checkpoint = find_checkpoint(run, framework)
    verify_checkpoint(checkpoint)
    info = read_info(checkpoint)
    assert (info.step, info.updates, info.config.model.tie_embeddings) == (7, 6, False)
    state = random_state(info.config.model)
    assert_same_bits(BACKENDS[framework].read_payload(checkpoint, info.config), state)
    tokens = random_tokens(info.config.model, 1, 9)
    logits, _ = BACKENDS[framework].load(run)(jnp.asarray(tokens) if framework == "jax" else to_torch(tokens))
    dtypes = {"param_dtype": torch.float32, "compute_dtype": torch.float32}
    exact = minillm_torch.build_model(info.config.model, state.weights, **dtypes).requires_grad_(False)
    expected = exact(to_torch(tokens))[0]
    assert_close(framework, to_numpy(logits), to_numpy(expected), TIERS["float32"].logits)
    backend, config = BACKENDS[framework], info.config
    assert not config.train.remat  # a field that the checkpoint does not know
    batch = Batch.from_rows(random_tokens(config.model, config.train.batch_size, config.train.seq_len + 1))
    before = backend.import_state(config, backend.read_payload(checkpoint, config), info.updates)
    _, metrics = backend.make_train_step(config)(before, batch, 1e-3)
    assert float(metrics["updates"]) == info.updates + 1
    log_probs = torch.log_softmax(exact(to_torch(batch.tokens_BT))[0].double(), -1)
    loss = -torch.gather(log_probs, -1, to_torch(batch.targets_BT)[..., None]).mean()
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("framework", BACKENDS)
def test_unknown_tensors_are_refused(framework: str, tmp_path: Path) -> None:
    """A bias, a name without a dot, a third moment: named, in one message where they are of one kind."""
    backend, config, state = BACKENDS[framework], run_config(TINY), random_state(TINY)
    payload = {"jax": minillm_jax.payload, "torch": minillm_torch.payload}[framework]
    paths = to_framework(TINY, state.weights) if framework == "jax" else state.weights
    more = {"model.layers.0.self_attn.q_proj.bias": np.zeros(4, np.float32), "undotted": np.zeros(2, np.float32)}
    payload.start_writing(tmp_path, TINY, {"weights": paths | more})()
    for read in (backend.read_payload, backend.open_weights):
        with pytest.raises(InputError, match=r"(?s)unexpected: model\.layers\.0\.self_attn\.q_proj\.bias.*: undotted"):
            read(tmp_path, config)
    third = tmp_path / "third"
    third.mkdir()
    backend.write_payload(third, config, state)
    if framework == "torch":
        file = third / "optimizer.safetensors"
        save_file(load_file(file) | {"momentum.model.norm.weight": np.zeros(48, np.float32)}, file)
    else:
        tree = read_with_orbax(third / "orbax/optimizer") | {"momentum": {"a": np.zeros(2, np.float32)}}
        with ocp.PyTreeCheckpointer() as writer:
            writer.save(third / "orbax/optimizer", tree, force=True)
    with pytest.raises(InputError, match=r"(?s)momentum"):
        backend.read_payload(third, config)


def test_transformers_loads_a_torch_checkpoint(tmp_path: Path) -> None:
    """The folder as it is, without an export."""
    config = MODELS["gqa"]
    weights = random_weights(config, sharpness=1.0)
    minillm_torch.write_payload(tmp_path, run_config(config), TrainingState(weights, {}, {}))
    tokens = to_torch(random_tokens(config, 1, 50))
    with torch.inference_mode():
        theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(tokens).logits
        ours, _ = minillm_torch.build_model(config, weights, param_dtype=torch.float32, compute_dtype=torch.float32)(
            tokens
        )
    assert_close("logits", to_numpy(ours), to_numpy(theirs), TIERS["float32"].logits)
