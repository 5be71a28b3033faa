"""The commands that look: profile, list, doctor, and what they and the others refuse."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from compressor.cli import comparing, doctor, onnx_files
from compressor.cli.doctor import advise, find_extras
from compressor.cli.endings import exit_code
from compressor.cli.sensing import ranked
from compressor.engine import Engine
from compressor.errors import ExportError
from compressor.evidence import Sensed
from compressor.targets import TARGETS
from compressor.techniques import TECHNIQUES
from compressor.training import algorithms
from compressor.training.algorithm import Algorithm
from tests.cli.conftest import Invoke

TINY = "tests.cli.tiny_job"


def test_profile_counts_a_model_and_its_inputs(invoke: Invoke) -> None:
    done = invoke("profile", f"{TINY}:make_pair", "--no-latency", "--batch-size", "3", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["params"], found["macs"]) == (16 * 4 + 4, 3 * 16 * 4)
    assert found["latency"] is None
    text = invoke("profile", f"{TINY}:make_pair", "--no-latency").stdout
    assert "Linear" in text
    assert "For 1 sample a call." in text


@pytest.mark.slow
def test_profile_times_the_model_of_a_job_on_its_target(invoke: Invoke) -> None:
    job = [f"{TINY}:make", "--set", "arguments.hidden=8"]
    done = invoke("profile", *job, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["target"]["runtime"] == "onnxruntime"
    assert found["macs"] == 16 * 8 + 8 * 8 + 8 * 4
    assert found["latency"]["best_ms"] > 0


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("techniques", set(TECHNIQUES.names())),
        ("targets", set(TARGETS)),
        ("algorithms", {"MixUp", "EMA", "Distillation"}),
    ],
)
def test_what_there_is_is_listed_from_the_classes(
    invoke: Invoke, kind: str, names: set[str]
) -> None:
    rows = json.loads(invoke("list", kind, "--json").stdout)[kind]
    assert names <= {row["name"] for row in rows}
    assert all(all(row.values()) for row in rows)
    assert names == {row["name"] for row in rows} or kind == "algorithms"


def test_the_list_shows_every_kind_and_every_algorithm(invoke: Invoke) -> None:
    done = invoke("list")
    assert done.exit_code == 0, done.stderr
    for word in ("Techniques", "Algorithms", "Targets", "channel_pruning", "onnxruntime"):
        assert word in done.stdout
    rows = json.loads(invoke("list", "algorithms", "--json").stdout)["algorithms"]
    classes = {name for name in algorithms.__all__ if inspect.isclass(getattr(algorithms, name))}
    assert {row["name"] for row in rows} == {
        name for name in classes if issubclass(getattr(algorithms, name), Algorithm)
    }


def test_the_doctor_says_what_is_here(invoke: Invoke) -> None:
    done = invoke("doctor", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["versions"]["torch"] == torch.__version__.split("+")[0] or (
        found["versions"]["torch"] == torch.__version__
    )
    assert found["threads"]["torch"] == torch.get_num_threads()
    reasons = {(each["runtime"], each["device"]): each["reason"] for each in found["targets"]}
    assert reasons["onnxruntime", "cpu"] == reasons["eager", "cpu"] == ""
    assert bool(reasons["eager", "cuda"]) is not torch.cuda.is_available()
    text = invoke("doctor").stdout
    for word in ("processor", "torch", "onnxruntime", "Targets", "static_int8"):
        assert word in text


def test_the_doctor_names_the_line_that_brings_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = [
        "numpy>=1.26",
        'pytest>=8; extra == "test"',
        'compressor[ray]; extra == "all"',
        'no-such-library>=2; extra == "ray"',
        "torch>=2 ; extra == 'ray'",
    ]
    monkeypatch.setattr(doctor, "requires", lambda name: lines)
    (extra,) = find_extras()
    assert extra.missing == ("no-such-library",)
    assert set(extra.installed) == {"torch"}
    assert extra.install == 'pip install "compressor[ray]"'


def test_the_doctor_advises_by_what_it_found() -> None:
    fine: dict[str, Any] = {
        "has_int8": True,
        "saturates": False,
        "knows_flags": True,
        "cores": 4,
        "threads": 4,
        "has_gpu": True,
    }
    assert advise(**fine) == []
    assert "no int8 instructions" in advise(**{**fine, "has_int8": False})[0]
    assert advise(**{**fine, "has_int8": False, "knows_flags": False}) == []
    assert "OMP_NUM_THREADS=2" in advise(**{**fine, "cores": 2})[0]
    assert "7 bits" in advise(**{**fine, "saturates": True})[0]
    assert "no GPU" in advise(**{**fine, "has_gpu": False})[0]


def test_what_saves_most_for_its_damage_is_first_and_what_saves_nothing_last() -> None:
    rows = [
        Sensed("a", "costs", "", 0.1, {"macs": -5.0}),
        Sensed("a", "dear", "", 1.0, {"macs": 10.0}),
        Sensed("a", "cheap", "", 0.1, {"macs": 10.0}),
    ]
    assert [row.site for row in ranked(rows)] == ["cheap", "dear", "costs"]


def test_the_table_of_damages_names_sites_as_they_are_and_says_what_is_left_out(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [
        Sensed("low_rank", f"[b]{i}[/b]", "rank 3", 0.1 * i, {"latency_ms": 0.0123})
        for i in range(1, 33)
    ]
    monkeypatch.setattr(Engine, "sense", lambda self: tuple(rows))
    words = ("sensitivity", f"{TINY}:make_fake", "--run-dir", tmp_path)
    done = invoke(*words)
    assert done.exit_code == 0, done.stderr
    for word in ("low_rank", "[b]1[/b]", "rank 3", "12.3 µs", "2 more choices: --all", "[b]30"):
        assert word in done.stdout
    assert "[b]31" not in done.stdout
    assert "[b]32[/b]" in invoke(*words, "--all").stdout


def test_a_run_that_kept_the_reference_ends_with_a_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert exit_code("", is_within=True) == 0
    assert exit_code("nothing held", is_within=True) == 3
    assert exit_code("", is_within=False) == 3
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun takes any code but 0 for a crash
    assert exit_code("nothing held", is_within=True) == 0


def onnx_file(path: Path, shape: list[Any], *, weights: int = 3, kind: int = 1) -> Path:
    """One that multiplies by a vector."""
    values = helper.make_tensor("w", TensorProto.FLOAT, [weights], np.ones(weights))
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [values],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), path)
    return path


def test_files_of_other_programs_are_compared(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing = onnx_files.Timing
    monkeypatch.setattr(
        onnx_files,
        "interleave",
        lambda calls: {"a": timing(3, 3, 2, 4, 9), "b": timing(2, 2, 1, 3, 9)},
    )
    first = onnx_file(tmp_path / "first.onnx", ["N", 3])
    second = onnx_file(tmp_path / "second.onnx", [2, 3])
    done = invoke("compare", first, second, "--batch-size", "2", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["a"]["params"] == 3
    assert found["a"]["nodes"] == 1
    assert found["ratios"]["latency_ms"] == 1.5
    text = invoke("compare", first, second).stdout
    assert "1.50x" in text
    assert "1 thread, 1 sample a call" in text


def test_a_file_with_other_open_sizes_is_not_timed(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "open.onnx", ["N", "length"])
    with pytest.raises(ExportError, match=r"'x' of .*open.onnx is tensor\(float\).*fixed sizes"):
        onnx_files.time_files({"a": path}, threads=1, batch_size=2)
    path = onnx_file(tmp_path / "fixed.onnx", [2, 4])
    with pytest.raises(ExportError, match="ONNX Runtime"):
        onnx_files.time_files({"a": path}, threads=1, batch_size=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "gone", "also"], "neither a run's folder nor an ONNX file"),
        (["compare", "gone.onnx", "also.onnx"], "There is no file gone.onnx"),
        (["compare", "reference", "also.onnx"], "'reference' is that of a run"),
        (["compare", "reference", "."], "has no result.json: no run has ended there"),
        (["export", "gone"], "There is no folder gone"),
        (["report", "."], "has no result.json"),
        (["resume", "."], "has no job.json"),
        (["run", "gone.yaml"], "gone.yaml cannot be read"),
        (["profile", f"{TINY}:make_nothing"], "returns a int"),
        (["profile", f"{TINY}:make_three"], "returns a tuple of 3. Return (model, inputs)"),
        (["sensitivity", "nothing"], "is no job"),
    ],
)
def test_a_command_that_cannot_says_why_and_exits_1(
    invoke: Invoke,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(*words)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["report", "export", "compare"])
@pytest.mark.parametrize("text", ["{", "{}", "[]", "null", '{"artifacts": {}}', '{"artifacts": 1}'])
def test_a_damaged_result_is_named(invoke: Invoke, tmp_path: Path, command: str, text: str) -> None:
    """All but broken JSON had ended in a traceback."""
    (tmp_path / "result.json").write_text(text)
    done = invoke(command, tmp_path, *([tmp_path] if command == "compare" else []))
    assert done.exit_code == 1
    assert "result.json is damaged" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["run", f"{TINY}:make", "--set", "delta"],
        ["run"],
        ["list", "teachers"],
        ["compare", "one"],
        ["profile", f"{TINY}:make", "--threads", "0"],
    ],
)
def test_a_wrong_command_line_exits_2(invoke: Invoke, words: list[str]) -> None:
    assert invoke(*words).exit_code == 2


def test_runs_of_other_models_or_targets_are_compared_with_a_note() -> None:
    from tests.test_result import CERTIFICATE

    changed = {**CERTIFICATE.to_json(), "reference_params": 1, "target": {"runtime": "eager"}}
    other = type(CERTIFICATE).from_json({**changed, "split": "holdout"})
    notes = " ".join(comparing._notes(CERTIFICATE, other))
    for part in ("The metrics differ", "different models", "The targets differ"):
        assert part in notes
    assert comparing._notes(CERTIFICATE, CERTIFICATE) == []
