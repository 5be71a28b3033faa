from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision

from compressor.errors import MetricError, ModelError
from compressor.structure.describe import diff, rebuild
from compressor.structure.trace import copy_model
from compressor.training.tasks import TaskModel, compute_metrics, named_metrics
from compressor.training.tasks.base import held_metrics

SCORES = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.8, 0.1], [0.2, 0.5, 0.3], [0.7, 0.2, 0.1]])
LABELS = torch.tensor([0, 1, 2, 1])  # two of four are right


class Task(TaskModel):
    def __init__(self, metrics: Any = ()) -> None:
        super().__init__()
        self.model = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(()))
        self.metrics = held_metrics(metrics)

    def forward(self, batch: Any) -> Tensor:
        outputs: Tensor = self.scale * self.model(batch[0])
        return outputs

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])

    def get_metrics(self, is_train: bool = False) -> Any:
        return self.metrics

    def update_metric(self, batch: Any, outputs: Any, metric: Any) -> None:
        metric.update(outputs, batch[1])


class Mean:
    """A metric that is no module."""

    def __init__(self) -> None:
        self.reset()

    def update(self, outputs: Tensor, _: Tensor) -> None:
        self.values.append(outputs.mean().item())

    def compute(self) -> float:
        return sum(self.values) / len(self.values)

    def reset(self) -> None:
        self.values: list[float] = []


def make_collection() -> MetricCollection:
    kinds = (MulticlassAccuracy, MulticlassPrecision)
    return MetricCollection([kind(num_classes=3, average="macro") for kind in kinds])


def test_a_task_without_forward_or_loss_is_abstract() -> None:
    class Half(TaskModel):
        def forward(self, batch: Any) -> Any:
            return batch

    with pytest.raises(TypeError, match="loss"):
        Half()  # type: ignore[abstract]


def test_outputs_that_are_known_are_not_computed_again() -> None:
    task, batch = Task(), (SCORES, LABELS)
    assert torch.equal(task.eval_forward(batch), task(batch))
    assert task.eval_forward(batch, "known") == "known"


def test_a_task_with_metrics_needs_an_update_metric() -> None:
    with pytest.raises(NotImplementedError, match=r"Task has metrics and no update_metric"):
        TaskModel.update_metric(Task(), (SCORES, LABELS), SCORES, Mean())
    assert TaskModel.get_metrics(Task()) == {}


def test_batches_are_counted_and_split_by_dimension_0() -> None:
    parts = Task().split_batch((SCORES, LABELS), 3)
    assert Task().sample_count((SCORES, LABELS)) == 4
    assert [part[1].tolist() for part in parts] == [[0, 1, 2], [1]]


@pytest.mark.parametrize("form", ["single", "list", "dict", "modules", "own"])
def test_metrics_have_names_in_every_form(form: str) -> None:
    metric = MulticlassAccuracy(num_classes=3)
    returned: Any = {
        "single": metric,
        "list": [metric],
        "dict": {"right": metric},
        "modules": nn.ModuleDict({"right": metric}),
        "own": Mean(),
    }[form]
    name = {"dict": "right", "modules": "right", "own": "Mean"}.get(form, "MulticlassAccuracy")
    assert named_metrics(returned) == {name: returned if form == "own" else metric}


def test_no_metrics_is_no_names() -> None:
    assert named_metrics({}) == named_metrics(()) == {}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([Mean(), Mean()], "two metrics of the class Mean"),
        ({"a": Mean}, r"is a class. Give an instance: Mean\(...\)"),
        ({"a": lambda x: x}, "A function is no metric"),
        (nn.Linear(1, 1), "A Linear is no metric"),
        (None, "A NoneType is no metric"),
    ],
)
def test_what_is_no_metric_is_an_error(returned: Any, message: str) -> None:
    with pytest.raises(MetricError, match=message):
        named_metrics(returned)


def test_a_collection_stays_together_and_gives_its_own_names() -> None:
    collection = make_collection()
    metrics = named_metrics(collection)
    for metric in metrics.values():
        metric.update(SCORES, LABELS)
        metric.update(SCORES[:1], LABELS[:1])
    assert list(metrics.values()) == [collection]
    assert collection.compute_groups == {0: ["MulticlassAccuracy", "MulticlassPrecision"]}
    values = compute_metrics(metrics)
    # By hand: class 0 has 2 of 2 right and 2 of 3 of its predictions, 1 has 1/2 and 1/2, 2 nothing.
    assert values["MulticlassAccuracy"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert values["MulticlassPrecision"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_values_are_floats_and_a_dict_is_spread() -> None:
    class Two(Mean):
        def compute(self) -> Any:
            return {"low": torch.tensor([1.0]), "high": 2, "classes": torch.tensor([0, 1])}

    mean = Mean()
    mean.update(torch.ones(2), torch.ones(2))
    assert compute_metrics({"mean": mean, "two": Two()}) == {"mean": 1.0, "low": 1.0, "high": 2.0}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(3), r"'value' has 3 values, shape \(3,\).*average='macro'"),
        (torch.ones(0), "'value' has 0 values"),
        ("0.5", "'value' is a str"),
        (None, "'value' is a NoneType"),
    ],
)
def test_a_value_that_is_not_one_number_is_an_error(value: Any, message: str) -> None:
    class Odd(Mean):
        def compute(self) -> Any:
            return value

    with pytest.raises(MetricError, match=message):
        compute_metrics({"value": Odd()})


def test_two_values_of_one_name_are_an_error() -> None:
    first, second = make_collection(), make_collection()
    for collection in (first, second):
        collection.update(SCORES, LABELS)
    with pytest.raises(MetricError, match=r"named 'MulticlassAccuracy', one of them is 'second'"):
        compute_metrics({"first": first, "second": second})


def test_metrics_leave_weights_and_structure_alone() -> None:
    bare, task = Task(), Task([make_collection(), MulticlassAccuracy(num_classes=3)])
    reference = copy_model(task)
    for metric in named_metrics(task.get_metrics()).values():
        metric.update(SCORES, LABELS)
    assert task.state_dict().keys() == bare.state_dict().keys()
    assert [name for name, _ in task.named_parameters()] == [n for n, _ in bare.named_parameters()]
    assert not set(dict(task.named_buffers())) - set(dict(bare.named_buffers()))
    rebuilt = rebuild(reference, diff(reference, task))
    rebuilt.load_state_dict(task.state_dict())
    assert torch.equal(rebuilt((SCORES, LABELS)), task((SCORES, LABELS)))


def test_metrics_of_a_copy_gather_for_themselves() -> None:
    task = Task(MulticlassAccuracy(num_classes=3, average="micro"))
    copied = copy_model(task)
    named_metrics(task.get_metrics())["MulticlassAccuracy"].update(SCORES, LABELS)
    metrics = named_metrics(copied.get_metrics())  # type: ignore[operator]
    metrics["MulticlassAccuracy"].update(SCORES[:2], LABELS[:2])
    assert compute_metrics(metrics) == {"MulticlassAccuracy": 1.0}
    assert compute_metrics(named_metrics(task.get_metrics())) == {"MulticlassAccuracy": 0.5}


def test_metrics_that_are_modules_follow_the_task_to_its_device() -> None:
    task = Task({"right": MulticlassAccuracy(num_classes=3)}).to("meta")
    assert task.metrics["right"].tp.device.type == "meta"  # type: ignore[union-attr]
    assert isinstance(Task({"mean": Mean()}).metrics, dict)


@pytest.mark.parametrize("name", ["train", "top.1"])
def test_a_name_that_torch_does_not_take_is_an_error(name: str) -> None:
    with pytest.raises(MetricError, match=f"cannot be named '{name}'"):
        held_metrics({name: MulticlassAccuracy(num_classes=3)})


def test_a_task_around_another_network_shares_all_else() -> None:
    task, teacher = Task(Mean()), nn.Linear(3, 3).eval()
    student = task.model
    other = task.around(teacher)
    assert (other.model, task.model) == (teacher, student)
    assert other.scale is task.scale
    assert other.metrics is task.metrics
    assert not other.training
    assert task.training
    assert torch.equal(other((SCORES, LABELS)), teacher(SCORES))
    assert type(other) is Task


def test_a_task_around_another_network_has_no_hooks_of_the_first() -> None:
    task, calls = Task(), []
    before = task.register_forward_hook(lambda *_: calls.append("before"))
    other = task.around(nn.Linear(3, 3))
    task.register_forward_pre_hook(lambda *_: calls.append("later"))
    other((SCORES, LABELS))
    assert calls == []
    task((SCORES, LABELS))
    assert sorted(calls) == ["before", "later"]
    before.remove()


def test_what_is_added_to_the_other_task_is_not_added_to_the_first() -> None:
    task = Task()
    other = task.around(nn.Linear(3, 3))
    other.register_buffer("extra", torch.ones(1))
    other.head = nn.Linear(1, 1)
    assert not hasattr(task, "extra")
    assert not hasattr(task, "head")
    assert copy.deepcopy(other).model is not other.model


def test_a_task_without_self_model_cannot_be_around_another() -> None:
    task = Task()
    del task.model
    with pytest.raises(ModelError, match=r"Task has no `self.model`"):
        task.around(nn.Linear(3, 3))
