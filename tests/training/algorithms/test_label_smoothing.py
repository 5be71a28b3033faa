from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ConfigError, DataError
from compressor.training import Evaluator, TaskModel, Trainer
from compressor.training.algorithms.label_smoothing import LabelSmoothing, smooth_labels
from compressor.training.algorithms.soft_targets import soft_targets
from tests.training.helpers import cross_entropy, make_loader, make_model, make_trainer


@pytest.mark.parametrize("shape", [(6,), (2, 3, 4)], ids=["classes", "maps"])
def test_cross_entropy_is_the_one_that_torch_smooths_itself(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape[0], 5, *shape[1:], generator=generator)
    targets = torch.randint(5, shape, generator=generator)
    smooth = smooth_labels(logits, targets, 0.3)
    expected = F.cross_entropy(logits, targets, label_smoothing=0.3)
    torch.testing.assert_close(F.cross_entropy(logits, smooth), expected)


@pytest.mark.parametrize("ignored", [-100, -1])
def test_ignored_targets_have_no_weight_and_are_not_counted(ignored: int) -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, ignored, 2, ignored, 1])
    smooth = smooth_labels(logits, targets, 0.2, ignore_index=ignored)
    assert smooth[1].tolist() == smooth[3].tolist() == [0, 0, 0]
    expected = F.cross_entropy(logits, targets, label_smoothing=0.2, ignore_index=ignored)
    torch.testing.assert_close(F.cross_entropy(logits, smooth), expected)


def test_pixels_that_are_ignored_are_not_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=generator)
    targets = torch.randint(3, (2, 4, 5), generator=generator)
    targets[0, :2] = -100
    expected = F.cross_entropy(logits, targets, label_smoothing=0.3)
    twice = smooth_labels(logits, smooth_labels(logits, targets, 0.3), 0.0)  # is taken as it is
    torch.testing.assert_close(F.cross_entropy(logits, twice), expected)


def test_where_nothing_counts_the_loss_is_zero() -> None:
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    smooth = smooth_labels(logits, torch.tensor([-100, -100]))
    assert F.cross_entropy(logits, smooth) == 0


@pytest.mark.parametrize("length", [3, 4], ids=["as many as classes", "more"])
def test_classes_of_tokens_come_last(length: int) -> None:
    # With as many tokens as classes positions were taken for classes, without any error.
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, length, 3, generator=generator)
    targets = torch.randint(3, (2, length), generator=generator)
    targets[0, 0] = -100
    smooth = smooth_labels(logits, targets, 0.2, class_dim=-1)
    assert smooth.shape == logits.shape
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.2)
    torch.testing.assert_close(
        F.cross_entropy(logits.flatten(0, 1), smooth.flatten(0, 1)), expected
    )


class Tagger(TaskModel):
    """Scores (N, T, K); as many tokens as classes."""

    def __init__(self, class_dim: int | None) -> None:
        super().__init__()
        self.model = nn.Linear(3, 3)
        if class_dim is not None:
            self.class_dim = class_dim
        self.seen: list[Tensor] = []

    def forward(self, batch: Any) -> Tensor:
        scores: Tensor = self.model(batch[0])
        return scores

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        self.seen.append(batch[1])
        return F.cross_entropy(outputs.flatten(0, 1), batch[1].flatten(0, 1))


@pytest.mark.parametrize(("own", "option"), [(-1, None), (None, -1), (1, -1)])
def test_the_task_or_the_option_says_where_the_classes_are(
    own: int | None, option: int | None
) -> None:
    task = Tagger(own)
    batch = (torch.randn(2, 3, 3), torch.tensor([[0, 1, 1], [2, 2, 0]]))
    Trainer(
        task,
        train_dataloader=[batch],
        max_duration="1ba",
        algorithms=[LabelSmoothing(0.3, class_dim=option)],
    ).fit()
    torch.testing.assert_close(task.seen[0], 0.7 * F.one_hot(batch[1], 3) + 0.1)


def test_classes_that_come_last_are_named_in_the_error() -> None:
    with pytest.raises(DataError, match=r"dimension 1\. If the classes come last.*class_dim=-1"):
        smooth_labels(torch.zeros(2, 4, 3), torch.zeros(2, 4, dtype=torch.long))


@pytest.mark.parametrize(
    "targets",
    [
        torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]),
        torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]),
        torch.tensor([[-1.0, 1.0, 1.0], [0.5, 0.5, 0.0]]),
        torch.tensor([[20.0, 3.0, 5.0], [1.0, 8.0, 2.0]]),
    ],
    ids=["several labels", "none", "below 0", "regression"],
)
def test_targets_that_are_no_weights_are_refused(targets: Tensor) -> None:
    # They were bent without a word.
    with pytest.raises(DataError, match=r"no weights of the classes.*Leave label smoothing out"):
        smooth_labels(torch.zeros(2, 3), targets)


def test_weights_of_classes_are_smoothed_too() -> None:
    soft = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    expected = torch.tensor([[0.45, 0.45, 0.05, 0.05]])
    torch.testing.assert_close(smooth_labels(torch.zeros(1, 4), soft, 0.2), expected)


def test_half_precision_outputs_have_targets_in_float32() -> None:
    targets = torch.tensor([1, 0])
    for dtype, wanted in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert smooth_labels(torch.zeros(2, 3, dtype=dtype), targets).dtype == wanted


def test_a_trainer_smooths_what_the_loss_sees_and_nothing_else() -> None:
    seen = []

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        batch = next(iter(make_loader()))
        seen.append(batch[1].dtype)
        return {"loss": cross_entropy(model, batch)["loss"].item()}

    trainer = make_trainer(
        algorithms=[LabelSmoothing(0.2)],
        max_duration="1ba",
        eval_dataloader=Evaluator(function=evaluate),
    )
    trainer.fit()
    x, y = next(iter(make_loader()))
    expected = F.cross_entropy(make_model()(x), y, label_smoothing=0.2).item()
    assert trainer.state.train_metrics["train/loss"] == pytest.approx(expected)
    assert seen == [torch.int64]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 3]), "the class 3, and the model has 3 classes.*ignore_index"),
        (torch.tensor([0, -1]), "the class -1"),
        (torch.zeros(3, dtype=torch.long), r"shape \(3,\) do not fit outputs of shape \(2, 3\)"),
        (torch.zeros(2), r"targets\.long\(\)\. If they are no classes.*interpolate_loss=True"),
    ],
)
def test_targets_that_do_not_fit_are_refused(targets: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        soft_targets(torch.zeros(2, 3), targets)


def test_one_class_and_odd_shares_are_refused() -> None:
    for targets in (torch.zeros(2, 1), torch.zeros(2, dtype=torch.long)):
        with pytest.raises(DataError, match="have 1 class"):
            smooth_labels(torch.zeros(2, 1), targets)
    with pytest.raises(ConfigError, match=r"smoothing=1\.5"):
        LabelSmoothing(1.5)
