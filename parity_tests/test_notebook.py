"""The notebook runs from its first to its last cell, at a small size; its own checks are those of its cells."""

from pathlib import Path

import nbclient
import nbformat
import pytest

from parity_tests.conftest import ROOT

pytestmark = pytest.mark.extended

NOTEBOOK = ROOT / "notebooks" / "demo.ipynb"


def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMO_STEPS", "6")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert (tmp_path / "runs/from-torch/jax/checkpoints/6").is_dir()


def test_outputs_are_kept() -> None:
    """The file shows the results of one run in order, without errors."""
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    data = [kind for output in outputs for kind in output.get("data", {})]
    assert {"image/svg+xml", "image/png"} <= {*data}
