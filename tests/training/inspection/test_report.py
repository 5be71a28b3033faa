"""The report as a callback: right model, right moment, and training goes on as without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ConfigError, MetricError
from compressor.training import Evaluator, Event, State, TaskModel, Trainer
from compressor.training.algorithm import Algorithm
from compressor.training.inspection import VisualReport
from compressor.training.tasks.classifier import ClassifierTask
from tests.training.inspection.helpers import CLASSES, make_loader, make_net, make_tensors


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def make_task() -> ClassifierTask:
    return ClassifierTask(make_net(), train_metrics=(), eval_metrics=())


def train(report: VisualReport | None, model: nn.Module | None = None, **options: Any) -> Trainer:
    model = model or make_task()
    options = {"step": None if isinstance(model, TaskModel) else cross_entropy, **options}
    trainer = Trainer(
        model,
        train_dataloader=make_loader(shuffle=True),
        optimizers={"name": "SGD", "lr": 0.1},
        max_duration="2ep",
        callbacks=[report] if report else [],
        **options,
    )
    trainer.fit()
    return trainer


def accuracy(net: nn.Module) -> float:
    images, labels = make_tensors()
    with torch.no_grad():
        return (net.eval()(images).argmax(1) == labels).float().mean().item()


def test_report_is_of_the_finished_model(tmp_path: Path) -> None:
    report = VisualReport(make_loader(), CLASSES, tmp_path / "new")
    trainer = train(report)
    assert report.inspection is not None
    assert report.inspection.accuracy == pytest.approx(accuracy(trainer.model.model))
    assert report.inspection.notes == ()
    assert all(sample.saliency is not None for sample in report.inspection.worst)
    assert "after epoch 2, batch 8" in (tmp_path / "new" / "inspection.html").read_text()


def test_report_of_a_model_with_a_loss_function_has_the_outputs_of_the_model(
    tmp_path: Path,
) -> None:
    report = VisualReport(make_loader(), CLASSES, tmp_path)
    net = make_net()
    train(report, net)
    assert report.inspection is not None
    assert report.inspection.accuracy == pytest.approx(accuracy(net))
    assert all(sample.saliency is not None for sample in report.inspection.worst)
    assert not net._forward_hooks


def test_training_goes_on_as_without_a_report(tmp_path: Path) -> None:
    report = VisualReport(make_loader(shuffle=True), CLASSES, tmp_path, at="eval_end")
    watched = train(report, eval_dataloader=make_loader())
    alone = train(None, eval_dataloader=make_loader())
    assert report.inspection is not None
    assert watched.state.metrics == alone.state.metrics
    for a, b in zip(watched.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(module.training for module in watched.model.modules())


def test_report_at_every_evaluation_sees_the_weights_that_were_evaluated(tmp_path: Path) -> None:
    class OtherWeights(Algorithm):
        """Has other weights in the model while it is evaluated, as an average would."""

        events = (Event.EVAL_START, Event.EVAL_END)
        pairs = ((Event.EVAL_START, Event.EVAL_END),)
        own: Tensor

        def on(self, event: Event, state: State) -> None:
            bias: Tensor = state.model.model[6].bias.data
            if event is Event.EVAL_START:
                self.own = bias.clone()
                bias.copy_(torch.tensor([0.0, 0.0, 100.0]))
            else:
                bias.copy_(self.own)

    report = VisualReport(make_loader(), CLASSES, tmp_path, at="eval_end")
    trainer = train(report, eval_dataloader=make_loader(), algorithms=[OtherWeights()])
    assert report.inspection is not None
    assert report.inspection.confusion[:, 2].sum() == 20
    assert trainer.model.model[6].bias[2] < 50


def test_several_evaluators_make_one_report_for_a_batch(tmp_path: Path) -> None:
    passes = []

    class Counted:
        def __iter__(self) -> Any:
            passes.append(1)
            return iter(make_loader())

    report = VisualReport(Counted(), CLASSES, tmp_path, at="eval_end")
    evaluators = [Evaluator(make_loader(), label=label) for label in ("a", "b")]
    trainer = train(report, eval_dataloader=evaluators)
    assert len(passes) == 2  # one an epoch
    trainer.eval()
    assert len(passes) == 3  # asked for anew, of a model that may be another


def test_outputs_that_are_no_logits_are_refused(tmp_path: Path) -> None:
    report = VisualReport(make_loader(), range(4), tmp_path)
    with pytest.raises(MetricError, match=r"shape \(6, 3\), and 6 samples of 4 classes"):
        train(report)
    assert not report.path.exists()


def test_what_contradicts_itself_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at='never' is no moment"):
        VisualReport(make_loader(), CLASSES, tmp_path, at="never")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="samples=0"):
        VisualReport(make_loader(), CLASSES, tmp_path, samples=0)
    with pytest.raises(ConfigError, match="two classes"):
        VisualReport(make_loader(), ["cat"], tmp_path)


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    report = VisualReport(make_loader(), CLASSES, tmp_path)
    report.on(Event.FIT_END, State(make_task(), "1ep", rank=1))
    assert not report.path.exists()
