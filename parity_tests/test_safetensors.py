"""Safetensors files: tensors in parts, the layout of the data, files that cannot be read."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minillm_core.errors import InputError
from minillm_core.interop import safetensors_files
from minillm_core.interop.hf import write_hf_weights
from minillm_core.interop.safetensors_files import read_tensor
from parity_tests.conftest import TINY, random_weights

pytestmark = pytest.mark.extended


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_tensors_are_handled_in_parts(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written and read in parts of a few rows, every tensor has the bits that the library reads. The data begins at a
    multiple of 8 bytes."""
    monkeypatch.setattr(safetensors_files, "PART_BYTES", 1000)
    weights, path = random_weights(TINY), tmp_path / "model.safetensors"
    write_hf_weights(tmp_path, TINY, weights, dtype)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, torch.from_numpy(weights[name]).to(getattr(torch, dtype))), name
        assert np.array_equal(read_tensor(path, name).astype(np.float32), tensor.float().numpy()), name


def test_missing_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is not called damaged if this user may not read it."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match=r"no permission to read it(?s:.*)change its permissions"):
        read_tensor(tmp_path / "model.safetensors", "model.norm.weight")
