"""The notebook is stored without outputs, and runs from its first cell to its last."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

PATH = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
QUICK = """from tests.brevity import be_brief
be_brief()
EPOCHS, WIDTH, RUN_DIR = 2, 8, "run"
SEARCH = {"budget": {"trials": 1}, "techniques": ["block_removal"]}"""


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(PATH, as_version=4)


def test_no_outputs_are_stored(notebook: Any) -> None:
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 7
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.slow
def test_every_cell_runs(notebook: Any, tmp_path: Path) -> None:
    (settings,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    settings.source = QUICK
    for cell in notebook.cells:
        cell.source = cell.source.replace('{"epochs": 15}', '{"epochs": 1}')
    resources = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=250, kernel_name="python3", resources=resources)
    client.execute(env={**os.environ, "PYTHONPATH": str(PATH.parents[1])})
    texts = "".join(
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    )
    assert "accuracy" in texts
    assert "says [" in texts
    assert (tmp_path / "run" / "saved" / "model.safetensors").is_file()
