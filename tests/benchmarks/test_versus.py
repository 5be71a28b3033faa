"""What `benchmarks.versus` makes of its files: one harness, a cache of rows, what peers count."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from cifar_resnet_model import CifarResNet

from benchmarks import versus
from benchmarks.versus import Comparison, credited_ratio, summarize
from benchmarks.versus_cases import Batches, Case, Recipe, drawn
from benchmarks.versus_files import judge, peak_memory_mib, time_files
from benchmarks.versus_pruning import (
    Bisection,
    accuracy,
    affordable_epochs,
    better_estimated,
    fine_tune,
    prune_and_bisect,
    reestimate,
    torch_pruning,
)
from benchmarks.versus_report import over_seeds, tables
from benchmarks.versus_rows import DELTA, FILE, MADE, MISSING, counted, failure


def row(model: str, name: str, ratio: float | None, drop: float = 0.0, seed: int = 0) -> Any:
    found = ratio is not None
    return {
        "model": model,
        "row": name,
        "seed": seed,
        "accuracy %": 91.5 - drop if found else None,
        "drop": drop if found else None,
        "within delta": drop <= DELTA if found else None,
        "latency ratio, batch 1": ratio,
        "latency ratio, batch 32": ratio,
        "ms, batch 1": 0.8 / ratio if ratio else None,
        "ms, batch 32": 20 / ratio if ratio else None,
        "spread %, batch 1": 1.0 if found else None,
        "spread %, batch 32": 2.0 if found else None,
        "size ratio": 4.0 if found else None,
        "peak MiB": 12.0 if found else None,
        "judged": 1000 if found else None,
        "sha256": "0123456789abcdef" * 4 if found else None,
        "minutes": 1.0,
        "how": "" if found else MISSING,
        "evidence": {},
    }


def test_the_best_peer_is_the_fastest_one_within_delta() -> None:
    rows = [
        row("a", "float32", 1.0),
        row("a", "int8", 2.0),
        row("a", "expert", 3.0, drop=1.5),  # fast, and outside
        row("a", "nncf", None),
        row("a", "ours", 2.6),
    ]
    summary = summarize(rows)
    assert summary["a_latency_ratio"] == 2.6
    assert summary["ours_over_best_peer"] == pytest.approx(1.3)
    assert summary["all_within_delta"] == 1.0


def test_the_network_where_we_lead_least_counts_with_the_median_over_seeds() -> None:
    rows = [row("a", "ours", ratio, seed=seed) for seed, ratio in enumerate((2.0, 3.0, 4.0))]
    rows += [row("a", "int8", 2.0, seed=seed) for seed in range(3)]
    rows += [row("b", "ours", 2.2), row("b", "int8", 2.0)]
    summary = summarize(rows)
    assert summary["a_latency_ratio"] == 3.0
    assert summary["ours_over_best_peer"] == pytest.approx(1.1)


def test_ours_outside_delta_earns_nothing() -> None:
    outside = row("a", "ours", 5.0, drop=1.2)
    assert credited_ratio(outside) == 1.0
    summary = summarize([outside, row("a", "int8", 2.0)])
    assert summary["all_within_delta"] == 0.0
    assert summary["ours_over_best_peer"] == 0.5


def test_the_row_of_bounded_bytes_counts_for_its_size_and_is_no_peer() -> None:
    rows = [row("a", "int8", 2.0), row("a", "ours", 3.0), row("a", "ours, small", 4.0)]
    rows[-1]["size ratio"] = 6.5
    summary = summarize(rows)
    assert summary["ours_over_best_peer"] == 1.5
    assert summary["a_size_ratio"] == 6.5
    rows[-1] |= {"drop": 1.2, "within delta": False}
    assert summarize(rows)["a_size_ratio"] == 1.0
    assert "a_latency_ratio" not in summarize(rows[2:])


def test_without_a_row_of_ours_there_is_nothing_to_sum_up() -> None:
    assert summarize([row("a", "int8", 2.0)]) == {}


def linear_file(path: Path, weight: torch.Tensor) -> Path:
    """A file that multiplies (batch, in) by a weight (in, out)."""
    shapes: dict[str, list[str | int | None]] = {
        "input": ["batch", weight.shape[0]],
        "output": ["batch", weight.shape[1]],
    }
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    ]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "weight"], ["output"])],
        "g",
        values[:1],
        values[1:],
        [numpy_helper.from_array(weight.numpy().astype(np.float32), "weight")],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    onnx.save(model, path)
    return path


def test_a_file_is_judged_by_the_classes_that_it_names(tmp_path: Path) -> None:
    classes = torch.tensor([4, 0, 1, 2] * 5)
    labels = torch.tensor([4, 0, 1, 3] * 5)
    loader = Batches(torch.eye(5)[classes], labels, batch_size=3)
    judgement = judge(linear_file(tmp_path / "eye.onnx", torch.eye(5)), loader)
    assert (judgement.right, judgement.judged, judgement.percent) == (15, 20, 75.0)


def test_a_larger_file_takes_longer_and_more_memory(tmp_path: Path) -> None:
    small = linear_file(tmp_path / "small.onnx", torch.ones(8, 8))
    large = linear_file(tmp_path / "large.onnx", torch.ones(8, 500_000))  # 16 MB
    assert peak_memory_mib(large) - peak_memory_mib(small) > 15
    times = time_files({"small": small, "large": large}, torch.ones(2, 8), is_quick=True)
    assert list(times) == [1, 32]
    for size in times:
        assert times[size]["large"].best_ms > times[size]["small"].median_ms


class Clock:
    """Of which an attempt takes 10 seconds."""

    def __init__(self, seconds: float) -> None:
        self.left = seconds
        self.asked: list[float] = []

    def make(self, ratio: float) -> tuple[Path, float] | None:
        self.left -= 10
        self.asked.append(ratio)
        return None if ratio > 0.7 else (Path(f"{ratio}"), 100 * (1 - ratio**2))


def test_the_ratio_is_bisected_until_the_time_is_up() -> None:
    clock = Clock(45)
    bisection = Bisection(clock.make, 80.0, lambda: clock.left, epochs=3)
    assert bisection.run() == Path("0.4375")  # 1 - 0.4375² = 0.81, and 0.5² is too much
    assert clock.asked == [0.5, 0.25, 0.375, 0.4375]
    assert [round(attempt.minutes, 3) for attempt in bisection.attempts] == [0.167] * 4
    assert clock.left == 5  # no time for another one


def test_what_cannot_be_pruned_so_far_counts_as_lost() -> None:
    clock = Clock(35)
    bisection = Bisection(clock.make, 30.0, lambda: clock.left, epochs=3)
    assert bisection.run() == Path("0.625")
    assert clock.asked == [0.5, 0.75, 0.625]
    assert [attempt.percent is None for attempt in bisection.attempts] == [False, True, False]


def test_nothing_holds_gives_no_file() -> None:
    clock = Clock(35)
    assert Bisection(clock.make, 100.5, lambda: clock.left, epochs=3).run() is None


def test_a_larger_ratio_that_prunes_less_is_not_taken(tmp_path: Path) -> None:
    """As where a library leaves layers alone rather than remove all of their channels."""
    widths = {0.5: 3, 0.75: 6, 0.625: 2, 0.6875: 4}
    case: Any = SimpleNamespace(
        model=nn.Linear(8, 8),
        recipe=SimpleNamespace(epochs=0),
        train=[],
        judged=[(torch.zeros(1, 8), torch.zeros(1, dtype=torch.long))],
    )

    def prune(ratio: float) -> nn.Module | None:
        return nn.Linear(8, widths[ratio]) if ratio in widths else None

    best, told = prune_and_bisect(
        prune, case, lambda *_: 90.0, tmp_path, least_percent=80.0, deadline=math.inf, seed=0
    )
    assert best == tmp_path / "ratio-0.6250.onnx"
    made = {each["ratio"] for each in told["attempts"] if each["percent"] is not None}
    assert made == {0.5, 0.625}


@pytest.fixture
def resnet() -> Case:
    torch.manual_seed(0)
    labels = torch.arange(32) % 2
    images = torch.randn(32, 3, 32, 32) + 4 * labels.view(-1, 1, 1, 1)
    loader = Batches(images, labels, batch_size=16)
    recipe = Recipe({"name": "Adam", "lr": 0.01}, 5, 0.1, 1.0, precision="fp32")
    return Case("tiny", CifarResNet(8).eval(), loader, loader, images, recipe)


@pytest.mark.slow
def test_the_expert_cuts_what_is_inside_the_blocks_and_trains_it(resnet: Case) -> None:
    before = {name: value.clone() for name, value in resnet.model.state_dict().items()}
    pruned = torch_pruning(resnet, 0.5)
    assert pruned is not None
    widths = {name: len(m.weight) for name, m in pruned.named_modules() if "conv" in name}
    assert [widths[f"layer{stage}.0.conv2"] for stage in (1, 2, 3)] == [16, 32, 64]
    inside = [widths[f"layer{stage}.0.conv1"] for stage in (1, 2, 3)]
    assert sum(inside) < 16 + 32 + 64
    assert all(width % 16 == 0 for width in inside)
    assert torch_pruning(resnet, 0.0) is None
    assert accuracy(pruned, resnet.judged) <= 50
    fine_tune(pruned, resnet, affordable_epochs(resnet, 100.0, 0), 0)
    assert accuracy(pruned, resnet.judged) > 50
    for name, value in resnet.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_no_epochs_are_affordable_where_nothing_may_be_trained(resnet: Case) -> None:
    case = Case(
        "t", resnet.model, resnet.train, resnet.judged, resnet.calibration, Recipe(epochs=0)
    )
    assert affordable_epochs(case, 1e9, 0) == 0


def test_reestimated_norms_are_those_of_the_data() -> None:
    model = nn.BatchNorm2d(3)
    images = 5 + 2 * torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    loader = Batches(images, torch.zeros(64).long(), batch_size=32)
    reestimate(model, Case("norm", model, loader, loader, images))
    assert model.running_mean is not None
    assert model.running_var is not None
    assert torch.allclose(model.running_mean, images.mean((0, 2, 3)), atol=1e-3)
    assert torch.allclose(model.running_var, images.var((0, 2, 3)), rtol=0.01)
    assert not model.training


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_norms_are_re_estimated_only_where_that_helps(shift: float) -> None:
    images = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = (images.mean((1, 2, 3)) > images.mean()).long()
    norm = nn.BatchNorm2d(1)
    with torch.no_grad():
        assert norm.running_mean is not None
        norm.running_mean.fill_(shift)
    head = nn.Linear(1, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        head.bias.copy_(torch.tensor([images.mean(), -images.mean()]))
    model = nn.Sequential(norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()
    train = Batches(images + 5 - shift, labels, batch_size=64)  # like the judged ones, or not
    case = Case("norm", model, train, Batches(images, labels, batch_size=64), images)
    assert (better_estimated(model, case) is model) == (shift == 0.0)


def test_calibration_is_drawn_by_the_seed_without_repetition() -> None:
    samples = torch.arange(500)
    first, second = drawn(samples, 0), drawn(samples, 1)
    assert torch.equal(first, drawn(samples, 0))
    assert len(set(first.tolist())) == len(first) == 128
    assert not torch.equal(first, second)


def test_a_shuffled_loader_has_every_sample_once_with_its_label() -> None:
    loader = Batches(torch.arange(10), torch.arange(10) * 2, batch_size=4, shuffle=True)
    torch.manual_seed(0)
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    samples = torch.cat([samples for samples, _ in batches])
    assert torch.equal(torch.cat([labels for _, labels in batches]), 2 * samples)
    assert samples.tolist() != sorted(samples.tolist()) == list(range(10))


def options(**changed: Any) -> argparse.Namespace:
    values = {"minutes": 1.0, "threads": 1, "jpeg": False, "quick": True, "trial_epochs": None}
    return argparse.Namespace(**(values | changed))


class Counted(Comparison):
    """Rows that are made here at once."""

    started: ClassVar[list[tuple[str, int]]] = []

    def start(self, row: str, seed: int, folder: Path) -> None:
        self.started.append((row, seed))
        if row == "nncf":
            (folder / "log.txt").write_text("Traceback\nKilled\n")
            return
        if row == "modelopt":
            (folder / MADE).write_text(json.dumps({"error": MISSING}))
            return
        (folder / FILE).write_bytes(b"x")
        (folder / MADE).write_text(json.dumps({"minutes": 2.0, "how": f"{row} {seed}"}))


def test_a_row_is_made_once_and_again_with_other_settings(tmp_path: Path) -> None:
    Counted.started.clear()
    comparison = Counted("resnet20", tmp_path, options())
    assert comparison.make("int8", 1) == comparison.make("int8", 1)
    assert comparison.make("int8", 2)["how"] == "int8 2"
    Counted("resnet20", tmp_path, options(minutes=5.0)).make("int8", 1)
    assert Counted.started == [("int8", 1), ("int8", 2), ("int8", 1)]


def test_a_row_that_was_interrupted_goes_on_in_its_folder(tmp_path: Path) -> None:
    comparison = Counted("resnet20", tmp_path, options())
    comparison.make("ours", 0)
    folder = comparison.folder("ours", 0)
    (folder / MADE).unlink()
    (folder / "checkpoint").write_text("half")
    comparison.make("ours", 0)
    assert (folder / "checkpoint").exists()
    Counted("resnet20", tmp_path, options(minutes=5.0)).make("ours", 0)
    assert not (folder / "checkpoint").exists()


def test_what_was_not_installed_is_tried_again(tmp_path: Path) -> None:
    Counted.started.clear()
    comparison = Counted("resnet20", tmp_path, options())
    for _ in range(2):
        assert comparison.make("modelopt", 0) == {"error": MISSING}
        assert comparison.make("nncf", 0) == {"error": "Killed"}
    assert Counted.started == [("modelopt", 0), ("nncf", 0), ("modelopt", 0)]


def test_a_row_whose_process_died_says_its_last_line(tmp_path: Path) -> None:
    assert Counted("resnet20", tmp_path, options()).make("nncf", 0) == {"error": "Killed"}


def test_equal_files_are_measured_once_and_a_failure_has_no_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resnet: Case
) -> None:
    made: dict[tuple[str, int], dict[str, Any]] = {}
    weights = {"float32": torch.eye(5), "int8": torch.eye(5), "ours": torch.eye(5).flip(1)}
    comparison = Comparison("resnet20", tmp_path, options())
    loader = Batches(torch.eye(5), torch.arange(5), batch_size=2)
    case = Case("eye", resnet.model, loader, loader, torch.eye(5))
    monkeypatch.setitem(comparison.__dict__, "case", case)
    for name, weight in weights.items():
        folder = comparison.folder(name, 0)
        folder.mkdir(parents=True)
        linear_file(folder / FILE, weight)
        made[name, 0] = {"minutes": 2.0, "how": name, "variants": 3}
    made["ours", 0] |= {"MACs": 25, "parameters": 25}
    made["nncf", 0] = {"error": MISSING}
    timed: list[int] = []

    def time_some(files: dict[str, Path], *others: Any, **options: Any) -> Any:
        timed.append(len(files))
        return time_files(files, *others, **options)

    monkeypatch.setattr(versus, "time_files", time_some)
    monkeypatch.setattr(versus, "peak_memory_mib", lambda path: 7.0)
    rows = {row["row"]: row for row in comparison.measure(made)}
    assert timed == [2]
    assert rows["float32"]["sha256"] == rows["int8"]["sha256"] != rows["ours"]["sha256"]
    assert rows["int8"]["latency ratio, batch 1"] == 1.0
    assert rows["ours"]["accuracy %"] == 20.0  # the middle one of five
    assert rows["ours"]["drop"] == 80.0
    assert [rows[name]["within delta"] for name in rows] == [True, True, False, None]
    assert rows["nncf"]["how"] == MISSING
    assert rows["nncf"]["latency ratio, batch 1"] is None
    assert rows["ours"]["evidence"] == {"variants": 3}
    assert [rows[name]["MACs"] for name in rows] == [None, None, 25, None], "as rows told"


def test_rows_tell_the_macs_of_one_sample_and_the_parameters() -> None:
    layer = nn.Conv2d(3, 8, 3, padding=1)
    loader = Batches(torch.zeros(4, 3, 6, 6), torch.zeros(4), batch_size=2)
    case = Case("one", layer, loader, loader, torch.zeros(4, 3, 6, 6))
    assert counted(layer, case) == {"MACs": 8 * 36 * 27, "parameters": 8 * 27 + 8}


def test_a_missing_peer_is_told_from_a_broken_one() -> None:
    absent = ModuleNotFoundError("No module named 'nncf'", name="nncf")
    assert failure("nncf", absent) == MISSING
    broken = ModuleNotFoundError("No module named 'pydot'", name="pydot")
    assert failure("nncf", broken) == "ModuleNotFoundError: No module named 'pydot'"
    assert failure("ours", RuntimeError("no\nsecond line")) == "RuntimeError: no"


def test_the_tables_have_medians_ranges_and_evidence_but_no_folders() -> None:
    assert over_seeds([2.0, None, 4.0]) == "3 (2 – 4)"
    rows = [row("resnet20", "float32", 1.0), row("resnet20", "nncf", None)]
    rows += [row("resnet20", "ours", 2.0 + seed, drop=0.5, seed=seed) for seed in range(3)]
    document = {
        "rows": rows,
        "summary": {"ours_over_best_peer": 1.5},
        "machine": {"cpu": "C", "cores": 2, "int8_instructions": ["avx512_vnni"]},
        "versions": {"torch": "2.15"},
        "command": "python -m benchmarks.versus --data /home/me/data --minutes 20",
    }
    text = tables(document)
    lines = text.splitlines()
    ours = next(line for line in lines if line.startswith("| this package"))
    assert ours == (
        "| this package | 91.00 | 0.5 | 3 (2 – 4) | 3 (2 – 4) | 4 | 12.00 | 1 | 3 of 3 |"
    )
    nncf = next(line for line in lines if line.startswith("| nncf"))
    assert nncf == "| nncf | 0 | – | – | – | – | – / – | not installed |"
    assert "| ours | 1 | 0123456789ab | 910 of 1000 | 0.267 | 6.67 | 1 / 2 | – |" in lines
    assert "ours_over_best_peer: 1.5" in lines
    assert "command: python -m benchmarks.versus --data PATH --minutes 20" in lines
