from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from compressor.errors import ConfigError, DataError
from compressor.training import Evaluator
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


def test_ignored_targets_have_no_weight() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, -100, 2, -100])
    smooth = smooth_labels(logits, targets, 0.2)
    assert smooth[1].tolist() == smooth[3].tolist() == [0, 0, 0]
    expected = F.cross_entropy(logits, targets, label_smoothing=0.2, reduction="sum")
    torch.testing.assert_close(F.cross_entropy(logits, smooth, reduction="sum"), expected)


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
        (torch.tensor([0, 3]), "the class 3, and the model has 3 classes"),
        (torch.tensor([0, -1]), "the class -1"),
        (torch.zeros(3, dtype=torch.long), r"shape \(3,\) do not fit outputs of shape \(2, 3\)"),
        (torch.zeros(2), r"targets\.long\(\)"),
    ],
)
def test_targets_that_do_not_fit_are_refused(targets: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        soft_targets(torch.zeros(2, 3), targets)


def test_one_class_and_odd_shares_are_refused() -> None:
    with pytest.raises(DataError, match="have 1 class"):
        smooth_labels(torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(ConfigError, match=r"smoothing=1\.5"):
        LabelSmoothing(1.5)
