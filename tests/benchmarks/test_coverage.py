"""The checks of `benchmarks.coverage` say yes to what is right and no to what is not."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import coverage, coverage_peer
from benchmarks.common import ROOT
from benchmarks.coverage_checks import (
    check_ours,
    draw_cuts,
    equals_masked,
    mask,
    outputs_of,
    prunable_fraction,
    relative_error,
    reloads,
    settle,
)
from benchmarks.coverage_models import Case, list_cases
from benchmarks.limits import Report, run_limited
from compressor.interfaces.inputs import ModelInputs
from compressor.structure.channels import find_groups
from compressor.structure.cutting import keep_many
from compressor.structure.groups import ChannelMap
from compressor.structure.trace import copy_model
from compressor.testing.models import TinyMLP, TinyResNet

INPUTS = ModelInputs((torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)),))


def build_resnet() -> tuple[nn.Module, ModelInputs]:
    return TinyResNet(width=8).eval(), INPUTS


def build_mlp() -> tuple[nn.Module, ModelInputs]:
    return TinyMLP(hidden=8).eval(), INPUTS


CASE = Case("tiny/resnet", "classifier", build_resnet)


def ignore(**facts: Any) -> None:
    del facts


def collect(facts: dict[str, Any]) -> Report:
    return lambda **more: facts.update(more)


def test_every_library_is_on_the_list() -> None:
    names = [case.name for case in list_cases()]
    assert len(names) == len(set(names))
    kinds = [case.kind for case in list_cases()]
    assert kinds.count("classifier") >= 80
    assert kinds.count("detector") >= 12
    assert kinds.count("segmenter") >= 6
    assert kinds.count("timm") >= 60
    assert kinds.count("transformers") >= 20


def test_settled_weights_hide_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    nn.init.zeros_(model[2].weight)
    settle(model, ModelInputs((torch.randn(8, 4),)))
    for parameter in model.parameters():
        assert parameter.unique().numel() == parameter.numel()
    assert not model[1].training
    assert model[1].momentum == 0.1


@pytest.mark.slow
def test_a_pruned_model_that_is_right_equals_the_masked_one() -> None:
    model, _ = build_resnet()
    settle(model, INPUTS)
    cuts = draw_cuts(find_groups(model, INPUTS), seed=0)
    pruned = copy_model(model)
    keep_many(pruned, cuts)
    facts: dict[str, Any] = {}
    assert equals_masked(model, pruned, INPUTS, cuts, collect(facts)) is True
    assert facts["effect"] > 1e-3
    with torch.no_grad():
        pruned.conv1.weight[0, 0, 0, 0] += 1e-3
    assert "off by" in str(equals_masked(model, pruned, INPUTS, cuts, ignore))


def test_removing_nothing_is_no_proof() -> None:
    model, _ = build_mlp()
    assert "no proof" in str(equals_masked(model, copy_model(model), INPUTS, [], ignore))


def test_masked_channels_are_zero_in_every_member() -> None:
    model, _ = build_mlp()
    groups = find_groups(model, INPUTS).groups
    cuts = draw_cuts(ChannelMap(groups), seed=0)
    mask(model, cuts)
    for group, kept in cuts:
        assert len(kept) == 6  # of 8
        for channel in set(range(group.size)) - set(kept):
            assert not model.get_submodule(group.name).weight[channel].any()


def test_the_prunable_fraction_of_a_perceptron_is_all_but_its_outputs() -> None:
    model, _ = build_mlp()
    assert prunable_fraction(model, find_groups(model, INPUTS).groups) == 16 / 26
    assert prunable_fraction(model, []) == 0


def test_other_shapes_and_nan_are_no_equality() -> None:
    ones = [torch.ones(2)]
    assert relative_error([torch.ones(3)], ones) == float("inf")
    assert relative_error([torch.tensor([1.0, float("nan")])], ones) == float("inf")
    assert relative_error([torch.tensor([1.0, 0.5])], [torch.tensor([1.0, 2.0])]) == 0.75


def test_a_file_of_another_model_does_not_reload(tmp_path: Path) -> None:
    model, _ = build_resnet()
    other = Case("tiny/mlp", "classifier", build_mlp)
    with pytest.raises(ValueError, match="Give an instance of the same class"):
        reloads(other, model, copy_model(model), INPUTS, 0, tmp_path)


@pytest.mark.slow
def test_a_model_that_is_fine_gets_a_yes_everywhere() -> None:
    # in this process: one that was forked from it could not train, and would say nothing of it
    facts: dict[str, Any] = {}
    check_ours(CASE, 0, lambda **found: facts.update(found))
    row = {"kind": "classifier", "note": "", "model": CASE.name, **facts, "stopped": None}
    assert coverage.is_fine(row), coverage.reason(row)
    assert row["trains"] is True
    assert row["verified"]
    assert 0.3 < row["prunable_fraction"] < 1


@pytest.mark.slow
def test_work_is_stopped_and_what_it_had_found_comes_back() -> None:
    def work(report: Report) -> None:
        report(stage="counting", found=3)
        while True:
            time.process_time()

    outcome = run_limited(work, seconds=0.2, memory_gib=1)
    assert outcome.facts == {"found": 3}
    assert outcome.stopped == "over the limit of 0.2 s while counting"


def test_an_error_is_the_reason() -> None:
    def work(report: Report) -> None:
        report(stage="dividing")
        print(1 / 0)

    outcome = run_limited(work, seconds=5, memory_gib=1)
    assert outcome.stopped == "ZeroDivisionError: division by zero while dividing"


def test_the_reason_names_the_first_thing_that_failed() -> None:
    row = {"removed": 3, "runs": True, "equal": False, "equal_reason": "off by 1", "onnx": False}
    assert not coverage.is_fine(row)
    assert coverage.reason(row) == "equal: off by 1"
    nothing = {"removed": 0, "frozen": [["No rule for aten.foo", 4, ["a"]]]}
    assert coverage.reason(nothing) == "Nothing was pruned: No rule for aten.foo (4 layers)"


def test_torch_pruning_is_right_about_a_perceptron() -> None:
    torch.manual_seed(0)
    model, _ = build_mlp()
    model, inputs = model.double(), INPUTS.double()
    whole = copy_model(model)
    removed = coverage_peer.prune(model, inputs)
    assert {side: len(entries) for side, entries in removed.items()} == {
        ("fc1", "out"): 3,
        ("fc2", "in"): 3,
        ("fc2", "out"): 3,
        ("fc3", "in"): 3,  # 0.7 * 8 rounded down are kept
    }
    dense = outputs_of(whole, inputs)
    assert coverage_peer.equals_masked(model, copy_model(whole), inputs, removed) is True
    assert relative_error(outputs_of(model, inputs), dense) > 1e-3
    kept = set(range(8)) - removed["fc3", "in"]
    wrong = {**removed, ("fc3", "in"): kept}
    assert coverage_peer.equals_masked(model, whole, inputs, wrong) is not True


def test_an_interrupted_run_goes_on_and_failures_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def measure(case: Case, known: coverage.Row, _: object) -> coverage.Row:
        measured.append(case.name)
        ok = case.name == "a"
        return {"model": case.name, "kind": "timm", "note": "", "ok": ok, "stopped": None} | {
            "why not": "" if ok else "it fails",
            **known,
        }

    def run(*options: str) -> list[str]:
        measured.clear()
        program = str(ROOT / "benchmarks" / "coverage.py")
        monkeypatch.setattr(
            "sys.argv", [program, "--json", str(tmp_path / "rows.json"), "--no-peer", *options]
        )
        coverage.main()
        return list(measured)

    cases = [Case(name, "timm", build_mlp) for name in "abc"]
    monkeypatch.setattr(coverage, "measure", measure)
    monkeypatch.setattr(coverage, "list_cases", lambda: cases)
    monkeypatch.setattr(coverage, "load_libraries", lambda: None)
    assert run("--only", "a|b") == ["a", "b"]
    assert run() == ["c"]
    assert run("--again", "failed") == ["b", "c"]
    assert run("--again", "all", "--only", "a") == ["a"]
    document = json.loads((tmp_path / "rows.json").read_text())
    assert [row["model"] for row in document["models"]] == ["a", "b", "c"]
    assert document["summary"]["models"] == 1
