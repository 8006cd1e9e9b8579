"""The tensor files of a checkpoint: Orbax still has the file layout that our adapter assumes."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import minillm_jax
import minillm_torch
from minillm_core.errors import InputError
from minillm_core.training.checkpoints import TrainingState
from minillm_jax import payload as jax_payload
from parity_tests.conftest import BACKENDS, TINY, assert_same_bits, random_weights, run_config

CHANGED = (
    f"orbax-checkpoint {ocp.__version__} lays out a checkpoint in a way that minillm_jax/payload.py does not know: "
    "adapt that file, the only one that depends on it"
)


def test_orbax_reads_what_we_write(tmp_path: Path) -> None:
    """Our files are an ordinary Orbax checkpoint: its own reader gives the same bits."""
    weights = {"a.b.kernel": jnp.arange(12.0).reshape(3, 4), "a.scale": jnp.ones(5, jnp.bfloat16)}
    jax_payload.start_writing(tmp_path, TINY, {"weights": weights})()
    with ocp.PyTreeCheckpointer() as reader:
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in weights}
        found = reader.restore(tmp_path / "orbax" / "weights", restore_args=as_numpy)
    assert found.keys() == weights.keys(), CHANGED
    for name, array in weights.items():
        assert np.asarray(found[name]).tobytes() == np.asarray(array).tobytes(), CHANGED


@pytest.mark.parametrize("n_bytes", [1 << 10, 3 * jax_payload.CHUNK_BYTES], ids=["one chunk", "several chunks"])
def test_we_read_what_orbax_writes(n_bytes: int, tmp_path: Path) -> None:
    """A tree that Orbax wrote itself, in one chunk or in several."""
    array = np.random.default_rng(0).standard_normal((n_bytes // 32, 8)).astype(np.float32)
    save_args = {"a.b.kernel": ocp.SaveArgs(chunk_byte_size=jax_payload.CHUNK_BYTES)}
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(tmp_path / "orbax" / "weights", {"a.b.kernel": array}, save_args=save_args)
    try:
        assert jax_payload.saved_shapes(tmp_path, "weights") == {"a.b.kernel": array.shape}, CHANGED
        found = jax_payload.read_tensor(tmp_path, "weights", "a.b.kernel")
    except (InputError, TypeError, AttributeError) as error:
        pytest.fail(f"{CHANGED}: {error!r}")
    assert found.tobytes() == array.tobytes(), CHANGED


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize("has_moments", [False, True])
def test_groups(framework: str, has_moments: bool, tmp_path: Path) -> None:
    """Writing and reading gives the same state; without Adam moments, there are no files for them."""
    config, backend = run_config(TINY), BACKENDS[framework]
    moments = [random_weights(TINY, seed) for seed in (1, 2)] if has_moments else [{}, {}]
    state = TrainingState(random_weights(TINY), *moments)
    backend.write_payload(tmp_path, config, state)
    found = backend.read_payload(tmp_path, config)
    assert bool(found.exp_avg) == bool(found.exp_avg_sq) == has_moments
    if has_moments:
        assert_same_bits(state, found)
    payload = {"jax": minillm_jax.payload, "torch": minillm_torch.payload}[framework]
    assert payload.has_group(tmp_path, "weights")
    assert payload.has_group(tmp_path, "exp_avg") == has_moments
