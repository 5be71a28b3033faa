"""Where the files of a run are looked for, whose folder is elsewhere by now."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.search.finished import found_in

NEW = Path("/new/run")
FILES = {"onnx": "exports/model.onnx", "model_dir": "exports/model", "report": "report.html"}


@pytest.mark.parametrize("was", ["/old/run", "runs/one", ""])
def test_files_of_the_folder_are_found_where_it_is_now(was: str) -> None:
    written = {kind: str(Path(was, path)) for kind, path in FILES.items()}
    assert found_in(NEW, written) == {kind: str(NEW / path) for kind, path in FILES.items()}


def test_files_elsewhere_stay_where_they_are() -> None:
    written = {"onnx": "/deploy/model.onnx", "report": "/old/run/report.html"}
    assert found_in(NEW, written)["onnx"] == "/deploy/model.onnx"
    without_page = {"onnx": "/old/run/exports/model.onnx"}
    assert found_in(NEW, without_page) == without_page
