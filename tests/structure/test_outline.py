"""What a trainer keeps of a model, to describe its edits later."""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compressor.structure import surgery
from compressor.structure.describe import apply_difference, diff, outline
from compressor.structure.trace import copy_skeleton
from compressor.testing.models import CifarResNet, TiedModel, TinyMLP


def test_an_outline_takes_no_memory_and_holds_none() -> None:
    model = CifarResNet(14)
    before = outline(model)
    assert all(tensor.is_meta for tensor in before.state_dict(keep_vars=True).values())
    gone = weakref.ref(model.layer1[0].conv1.weight)
    surgery.slice_parameter(model, "layer1.0.conv1.weight", 0, [0])
    gc.collect()
    assert gone() is None


class Counting(nn.Module):
    """What forward may leave in a module."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.sizes: list[int] = []
        self.table: Any = torch.zeros(3)
        self.weight = nn.Parameter(torch.zeros(2))


def test_an_outline_stays_as_the_model_was() -> None:
    model = Counting()
    before = outline(model)
    model.calls, model.table = 3, 2
    model.sizes.append(8)
    model.half()
    assert diff(before, model)["changed"][""] == {
        "attributes": {"calls": 3, "sizes": [8], "table": 2},
        "parameters": {"weight": {"shape": [2], "dtype": "float16", "requires_grad": True}},
    }


def test_a_tensor_that_became_a_number_is_not_compared_with_it() -> None:
    reference, model = Counting(), Counting()
    model.table = 2
    assert diff(reference, model)["changed"][""] == {"attributes": {"table": 2}}


def test_an_outline_can_be_taken_of_what_cannot_be_copied() -> None:
    model = TinyMLP()
    model.fc2.cached = model.fc2.weight * 2  # deepcopy refuses tensors with a history
    model.fc2.source = (i for i in range(3))
    model.register_buffer("mask", torch.ones(4), persistent=False)
    model.register_module("nothing", None)
    assert diff(outline(model), model)["changed"] == {}
    assert diff(outline(nn.LazyLinear(2)), nn.Linear(3, 2))["replaced"].keys() == {""}


@pytest.mark.parametrize("take", [outline, copy_skeleton])
@pytest.mark.parametrize("make", [TiedModel, lambda: CifarResNet(14), Counting])
def test_what_is_taken_of_a_model_does_not_differ_from_it(
    take: Callable[[nn.Module], nn.Module], make: Callable[[], nn.Module]
) -> None:
    model = make()
    before = take(model)
    assert diff(before, model) == diff(model, model)


@pytest.mark.parametrize("take", [outline, copy_skeleton])
def test_a_shared_module_is_shared_in_what_is_taken_of_a_model(
    take: Callable[[nn.Module], nn.Module],
) -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    before = take(model)
    surgery.replace(model, "0", nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2)))
    resumed = nn.Sequential(twin := nn.Linear(2, 2), nn.ReLU(), twin)
    apply_difference(resumed, diff(before, model))
    resumed.load_state_dict(model.state_dict(), strict=True)
    assert resumed[0] is resumed[2]
    assert repr(resumed) == repr(model)


def test_a_skeleton_copies_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Counting()
    model.seen = [torch.ones(2), {"mean": (model.weight * 2, "name")}]
    monkeypatch.setattr(torch.Tensor, "__deepcopy__", None)
    skeleton = copy_skeleton(model)
    assert skeleton is not model
    assert skeleton.seen is not model.seen
    assert skeleton.seen[1]["mean"][0] is model.seen[1]["mean"][0]
    assert skeleton.table is model.table


class Seen(nn.Module):
    """A metric: all that it has is what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.values, self.result = 0, [], None

    def update(self, x: torch.Tensor) -> None:
        self.count += 1
        self.values.append(x)
        self.add_module(f"part{self.count}", Seen())

    def compute(self) -> int:
        return self.count

    def reset(self) -> None:
        self.__init__()


def test_what_a_metric_has_seen_is_no_structure() -> None:
    model = TinyMLP()
    model.metric = Seen()
    for take in (outline, copy_skeleton):
        before = take(model)
        model.metric.update(torch.ones(2))
        surgery.slice_parameter(model, "fc1.weight", 1, range(model.fc1.weight.shape[1] // 2))
        assert diff(before, model)["changed"].keys() == {"fc1"}
    before = outline(model)
    model.metric.reset()
    assert diff(before, model) == diff(model, model)


def test_a_module_that_is_trained_is_no_metric() -> None:
    model = TinyMLP()
    model.metric = Seen()
    model.metric.weight = nn.Parameter(torch.zeros(2))
    before = outline(model)
    model.metric.count = 4
    assert diff(before, model)["changed"].keys() == {"metric"}


@pytest.mark.slow
def test_metrics_of_torchmetrics_do_not_disturb() -> None:
    torchmetrics = importlib.import_module("torchmetrics")
    kinds = torchmetrics.classification
    model = TinyMLP()
    model.metrics = torchmetrics.MetricCollection(
        [kinds.MulticlassAccuracy(num_classes=10), kinds.MulticlassAUROC(num_classes=10)]
    )
    model.mean = torchmetrics.MeanMetric()
    scores, labels = torch.rand(10, 10), torch.arange(10)
    for take in (outline, copy_skeleton):
        for is_seen_first in (False, True):
            if is_seen_first:
                model.metrics.update(scores, labels)
            before = take(model)
            model.metrics.update(scores, labels)
            model.mean(scores)
            model.metrics.compute()
            assert diff(before, model) == diff(model, model)
            model.metrics.reset()
            model.mean.reset()
            assert diff(before, model) == diff(model, model)


def test_numbers_of_numpy_become_plain_ones() -> None:
    model = Counting()
    before = outline(model)
    model.calls = np.float64(0.5)
    assert type(diff(before, model)["changed"][""]["attributes"]["calls"]) is float
