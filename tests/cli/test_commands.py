"""The commands on one small finished run, each against what the run itself says."""

from __future__ import annotations

import json
import shutil
import webbrowser
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

import compressor
from compressor.testing.models import TinyMLP
from tests.cli.conftest import Invoke

pytestmark = pytest.mark.slow

Finished = tuple[Path, dict[str, Any]]


def test_a_run_prints_its_result_as_json_alone_and_keeps_its_job(finished: Finished) -> None:
    run_dir, printed = finished
    written = json.loads((run_dir / "result.json").read_text())
    assert printed.pop("run_dir") == str(run_dir)
    assert {name: written[name] for name in printed} == printed
    printed["run_dir"] = str(run_dir)
    assert written["certificate"]["delta"] == 25.0
    job = json.loads((run_dir / "job.json").read_text())
    assert job["factory"] == "tests.cli.tiny_job:make"
    assert job["arguments"] == {"hidden": 32}
    assert job["config"] == {"delta": 25.0}


def test_resuming_a_finished_run_prints_the_same_and_makes_nothing(
    invoke: Invoke, finished: Finished
) -> None:
    run_dir, printed = finished
    before = {path: path.stat().st_mtime_ns for path in (run_dir / "variants").rglob("*")}
    done = invoke("resume", run_dir, "--json", "-q")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["certificate"] == printed["certificate"]
    assert {path: path.stat().st_mtime_ns for path in (run_dir / "variants").rglob("*")} == before


def test_the_damages_of_sensitivity_are_those_that_the_run_found(
    invoke: Invoke, finished: Finished
) -> None:
    run_dir, printed = finished
    job = ["tests.cli.tiny_job:make", "--set", "arguments.hidden=32", "--set", "delta=25"]
    done = invoke("sensitivity", *job, "--run-dir", run_dir, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)["choices"]

    def by_site(rows: list[Any]) -> list[Any]:
        return sorted(rows, key=lambda row: (row["site"], row["label"]))

    assert by_site(found) == by_site(printed["damages"])
    worth = [row["damage"] / row["saved"]["size_bytes"] for row in found]
    assert worth == sorted(worth)


def test_a_run_is_compared_with_its_reference_by_the_certificate(
    invoke: Invoke, finished: Finished
) -> None:
    run_dir, printed = finished
    certificate = printed["certificate"]
    done = invoke("compare", "reference", run_dir, "--json")
    assert done.exit_code == 0, done.stderr
    ratios = json.loads(done.stdout)["ratios"]
    assert ratios["size_bytes"] == certificate["size_ratio"]
    assert ratios["latency_ms"] == pytest.approx(certificate["latency_ratio"])
    table = invoke("compare", "reference", run_dir).stdout
    assert f"{certificate['size_ratio']:.2f}x" in table
    assert "is the reference" in table
    assert set(json.loads(invoke("compare", run_dir, run_dir, "--json").stdout)["ratios"]) == {
        "latency_ms",
        "size_bytes",
        "macs",
        "params",
    }


def test_a_file_is_timed_beside_the_file_of_a_run(invoke: Invoke, finished: Finished) -> None:
    run_dir, printed = finished
    float_file = printed["artifacts"]["onnx_float"]
    done = invoke("compare", float_file, run_dir, "--batch-size", "8", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["b"]["path"] == printed["artifacts"]["onnx"]
    assert found["b"]["size_bytes"] == Path(found["b"]["path"]).stat().st_size
    assert found["target"] == {"runtime": "onnxruntime", "threads": 1, "batch_size": 8}
    best = [found[side]["timing"]["best_ms"] for side in "ab"]
    assert found["ratios"]["latency_ms"] == pytest.approx(best[0] / best[1])


def test_files_are_listed_and_copied_out(
    invoke: Invoke, finished: Finished, tmp_path: Path
) -> None:
    run_dir, printed = finished
    listed = json.loads(invoke("export", run_dir, "--json").stdout)
    assert listed == {kind: path for kind, path in printed["artifacts"].items() if kind != "report"}
    done = invoke("export", run_dir, "--format", "onnx", "--format", "model_dir", "--to", tmp_path)
    assert done.exit_code == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"model_int8.onnx", "model"}
    copied = tmp_path / "model_int8.onnx"
    assert copied.read_bytes() == Path(printed["artifacts"]["onnx"]).read_bytes()


def test_a_format_that_was_not_written_is_made_from_the_saved_model(
    invoke: Invoke, finished: Finished, tmp_path: Path
) -> None:
    run_dir, printed = finished
    done = invoke("export", run_dir, "--format", "exported_program", "--to", tmp_path, "--json")
    assert done.exit_code == 0, done.stderr
    path = json.loads(done.stdout)["exported_program"]
    inputs = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    program = torch.export.load(path).module()
    model = compressor.load(printed["artifacts"]["model_dir"], TinyMLP(16, 32, 4))
    torch.testing.assert_close(program(inputs), model.eval()(inputs))
    session = ort.InferenceSession(printed["artifacts"]["onnx_float"])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    np.testing.assert_allclose(outputs, program(inputs).detach().numpy(), atol=1e-4)


def test_a_format_that_is_made_in_the_run_is_named_by_it(
    invoke: Invoke, finished: Finished, tmp_path: Path
) -> None:
    run_dir = tmp_path / "copied"
    shutil.copytree(finished[0], run_dir)
    done = invoke("export", run_dir, "--format", "exported_program", "--json")
    assert done.exit_code == 0, done.stderr
    path = json.loads(done.stdout)["exported_program"]
    assert Path(path).parent == run_dir / "exports"
    listed = json.loads(invoke("export", run_dir, "--json").stdout)
    assert listed["exported_program"] == path
    assert all(Path(each).is_relative_to(run_dir) for each in listed.values())
    resumed = json.loads(invoke("resume", run_dir, "--json", "-q").stdout)
    assert resumed["artifacts"]["exported_program"] == path
    assert resumed["certificate"] == finished[1]["certificate"]


def test_the_page_is_written_again_and_opened(
    invoke: Invoke, finished: Finished, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_dir, _ = finished
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    page = tmp_path / "page.html"
    done = invoke("report", run_dir, "--to", page, "--open")
    assert done.exit_code == 0, done.stderr
    assert page.read_text() == (run_dir / "report.html").read_text()
    assert opened == [page.as_uri()]
    assert f"Written: {page}" in done.stdout
