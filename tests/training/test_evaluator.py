from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from compressor.errors import ConfigError, DataError, MetricError
from compressor.training import (
    Callback,
    Evaluator,
    Event,
    ManualStep,
    State,
    TaskModel,
    Trainer,
)
from tests.training.helpers import (
    cross_entropy,
    make_dataset,
    make_loader,
    make_model,
    make_trainer,
)


class Mean:
    """A metric like those of torchmetrics: the mean of what it is given."""

    def __init__(self) -> None:
        self.reset()

    def update(self, values: Tensor) -> None:
        self.sum += values.float().sum().item()
        self.count += len(values)

    def compute(self) -> float:
        return self.sum / self.count

    def reset(self) -> None:
        self.sum, self.count = 0.0, 0


class Judged(TaskModel):
    """Two metrics of evaluation and one of training."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()
        self.right, self.label, self.train_right = Mean(), Mean(), Mean()

    def forward(self, batch: Any) -> Tensor:
        return self.model(batch[0])

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])

    def get_metrics(self, is_train: bool = False) -> Any:
        if is_train:
            return {"right": self.train_right}
        return {"right": self.right, "label": self.label}

    def update_metric(self, batch: Any, outputs: Any, metric: Any) -> None:
        is_right = outputs.argmax(1) == batch[1]
        metric.update(batch[1] if metric is self.label else is_right)


def make_task_trainer(**options: Any) -> Trainer:
    options = {"max_duration": "2ep", "optimizers": {"name": "SGD", "lr": 0.1}, **options}
    return Trainer(Judged(), train_dataloader=make_loader(), **options)


def right_by_hand(model: nn.Module) -> float:
    x, y = make_dataset().tensors
    model.eval()
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def test_a_task_is_judged_by_its_own_metrics() -> None:
    trainer = make_task_trainer(eval_dataloader=make_loader())
    trainer.fit()
    assert trainer.state.metrics == {
        "right": right_by_hand(trainer.model.model),
        "label": make_dataset().tensors[1].float().mean().item(),
    }


def test_metrics_of_training_are_those_of_the_outputs_on_the_way() -> None:
    expected: list[float] = []

    class Watch(Callback):
        events = frozenset({Event.AFTER_FORWARD})

        def on(self, event: Event, state: State) -> None:
            if state.clock.epoch == 1:
                expected.extend((state.outputs.argmax(1) == state.batch[1]).tolist())

    for size in (None, 3):
        expected.clear()
        trainer = make_task_trainer(callbacks=[Watch()], micro_batch_size=size)
        trainer.fit()
        assert trainer.state.train_metrics["train/right"] == pytest.approx(
            sum(expected) / len(expected)
        )


def test_evaluators_have_their_own_intervals_and_names() -> None:
    seen: list[tuple[int, str, frozenset[str]]] = []

    class Watch(Callback):
        events = frozenset({Event.EVAL_END})

        def on(self, event: Event, state: State) -> None:
            seen.append((state.clock.batch, state.evaluator, state.evaluated))

    often = Evaluator(make_loader(), "often", metric_names=("right",), interval="3ba")
    rare = Evaluator(make_loader(), "rare", max_batches=1)
    trainer = make_task_trainer(eval_dataloader=[often, rare], callbacks=[Watch()])
    trainer.fit()
    both = [
        ("often", frozenset({"often/right"})),
        ("rare", frozenset({"rare/right", "rare/label"})),
    ]
    assert seen == [
        (3, *both[0]),
        (4, *both[1]),
        (6, *both[0]),
        (8, *both[0]),
        (8, *both[1]),
    ]
    assert trainer.state.metrics.keys() == {"often/right", "rare/right", "rare/label"}
    first = make_dataset().tensors[1][:8].float().mean().item()
    assert trainer.state.metrics["rare/label"] == first


def test_without_metrics_the_mean_loss_is_the_judgement() -> None:
    loader: DataLoader[Any] = DataLoader(make_dataset(20), batch_size=8)  # 8, 8 and 4 samples
    trainer = make_trainer(eval_dataloader=loader)
    trainer.fit()
    x, y = make_dataset(20).tensors
    trainer.model.eval()
    loss = cross_entropy(trainer.model, (x, y))["loss"].item()
    assert trainer.state.metrics == {"loss": pytest.approx(loss, abs=1e-6)}


def test_a_metric_name_that_matches_none_names_the_nearest() -> None:
    evaluator = Evaluator(make_loader(), metric_names=("rihgt",))
    with pytest.raises(MetricError, match=r"'rihgt'.*Did you mean 'right'"):
        make_task_trainer(eval_dataloader=evaluator)


def test_metric_names_are_regular_expressions() -> None:
    evaluator = Evaluator(make_loader(), metric_names=("la.*",))
    assert make_task_trainer(eval_dataloader=evaluator).eval().keys() == {"label"}


def test_an_evaluation_without_a_batch_is_an_error() -> None:
    with pytest.raises(DataError, match="yields no batch"):
        make_task_trainer(eval_dataloader=Evaluator([])).eval()


def test_two_evaluators_of_one_label_are_refused() -> None:
    with pytest.raises(ConfigError, match="label 'a'"):
        make_task_trainer(
            eval_dataloader=[Evaluator(make_loader(), "a"), Evaluator(make_loader(), "a")]
        )


def test_an_evaluator_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        Evaluator(label="x")
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        make_trainer().eval()


def test_predictions_are_those_of_the_task_in_eval_mode() -> None:
    trainer = make_task_trainer()
    trainer.fit()
    predictions = torch.cat(trainer.predict(make_loader()))
    net = trainer.model.model.eval()
    assert torch.equal(predictions, net(make_dataset().tensors[0]))
    assert trainer.model.training


def test_a_net_without_a_task_cannot_predict() -> None:
    with pytest.raises(ConfigError, match="ClassifierTask"):
        make_trainer().predict(make_loader())


class Shared(Judged):
    """The same metric for training and evaluation."""

    def get_metrics(self, is_train: bool = False) -> Any:
        return {"right": self.right}


def test_a_metric_of_training_that_an_evaluation_would_empty_is_refused() -> None:
    options = {"train_dataloader": make_loader(), "eval_dataloader": make_loader()}
    Trainer(Shared(), **options)  # between epochs nothing is lost
    with pytest.raises(MetricError, match="the same object 'right'"):
        Trainer(Shared(), eval_interval="2ba", **options)


class Collected(Judged):
    """Two metrics in a collection of torchmetrics."""

    def __init__(self) -> None:
        super().__init__()
        accuracy = {
            "micro": MulticlassAccuracy(num_classes=2, average="micro"),
            "macro": MulticlassAccuracy(num_classes=2, average="macro"),
        }
        self.collection = MetricCollection(accuracy)

    def get_metrics(self, is_train: bool = False) -> Any:
        return {} if is_train else self.collection

    def update_metric(self, batch: Any, outputs: Any, metric: Any) -> None:
        metric.update(outputs, batch[1])


def test_members_of_a_collection_can_be_named() -> None:
    evaluator = Evaluator(make_loader(), metric_names=("micro",))
    trainer = Trainer(Collected(), train_dataloader=make_loader(), eval_dataloader=evaluator)
    assert trainer.eval() == {"micro": pytest.approx(right_by_hand(trainer.model.model))}


@pytest.mark.parametrize("given", [[0, 1], [0], [1, 0]])
def test_loaders_and_evaluators_may_be_mixed(given: list[int]) -> None:
    kinds = [make_loader(), Evaluator(make_loader(), "b")]
    trainer = make_task_trainer(eval_dataloader=[kinds[number] for number in given])
    names = {0: {"right", "label"}, 1: {"b/right", "b/label"}}
    assert trainer.eval().keys() == set().union(*(names[number] for number in given))


def test_an_interval_of_0_evaluates_only_at_the_end() -> None:
    seen: list[int] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        seen.append(trainer.state.clock.batch)
        return {"a": 1.0}

    trainer = make_trainer(eval_dataloader=Evaluator(function=evaluate), eval_interval="0ep")
    trainer.fit()
    assert seen == [8]


def test_a_schedule_steps_only_with_the_evaluator_that_gives_its_metric() -> None:
    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"loss": 1.0}

    plateau = {"name": "ReduceLROnPlateau", "patience": 0, "factor": 0.5}
    trainer = make_trainer(
        eval_dataloader=[
            Evaluator(label="often", function=evaluate, interval="1ba"),
            Evaluator(label="rare", function=evaluate, interval="2ep"),
        ],
        eval_key="rare/loss",
        schedulers=plateau,
        max_duration="6ep",
    )
    trainer.fit()
    assert trainer.optimizer is not None
    # Evaluated after 2, 4 and 6 epochs: the first is the best, the others do not improve.
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**2)


def test_a_stop_in_an_evaluation_within_an_epoch_ends_the_fit_at_once() -> None:
    class Stop(Callback):
        events = frozenset({Event.EVAL_END})

        def on(self, event: Event, state: State) -> None:
            state.stop("enough")

    trainer = make_trainer(eval_dataloader=make_loader(), eval_interval="2ba", callbacks=[Stop()])
    trainer.fit()
    assert trainer.state.clock.batch == 2


def test_a_manual_step_has_nothing_to_be_judged_by() -> None:
    trainer = Trainer(make_model(), ManualStep(lambda batch: {}), eval_dataloader=make_loader())
    with pytest.raises(ConfigError, match="a function of the model"):
        trainer.eval()
