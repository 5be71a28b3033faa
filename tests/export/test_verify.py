from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.errors import ExportError
from compressor.export.verify import agreement, parity
from compressor.interfaces.inputs import ModelInputs

INPUTS = ModelInputs((torch.tensor([[1.0, -2.0], [4.0, 3.0]]),))


def test_errors_are_absolute_and_relative_to_the_largest_output() -> None:
    found = parity(nn.Identity(), lambda x: x + torch.tensor([0.0, 0.5]), INPUTS)
    assert (found.max_abs_error, found.max_rel_error, found.samples) == (0.5, 0.125, 2)


def test_the_model_is_compared_in_evaluation_mode_and_has_its_mode_back() -> None:
    model = nn.Dropout(0.9)
    assert parity(model, nn.Identity(), INPUTS).max_abs_error == 0
    assert model.training


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_an_error(value: float) -> None:
    with pytest.raises(ExportError, match="not finite"):
        parity(nn.Identity(), lambda x: x * value, INPUTS)


def test_another_shape_is_an_error() -> None:
    def wrong(x: Tensor) -> Tensor:
        return x.flatten()

    with pytest.raises(ExportError, match=r"shapes \[\(4,\)\], the model \[\(2, 2\)\]"):
        parity(nn.Identity(), wrong, INPUTS)


class Scores(nn.Module):
    """Gives the rows of a table that its input names."""

    def __init__(self, *rows: Any) -> None:
        super().__init__()
        self.table = torch.tensor(rows).float()

    def forward(self, x: Tensor) -> Tensor:
        return self.table[x]


def test_samples_of_which_the_file_names_another_class_are_counted() -> None:
    file = Scores([0, 1, 0], [0, 0, 9], [2, 1, 0], [0, 3, 3])
    simulation = Scores([0, 2, 0], [0, 0, 1], [1, 2, 0], [0, 3, 3])
    reference = Scores([5, 0, 0], [0, 9, 1], [1, 0, 0], [0, 1, 0])
    batches = [ModelInputs((torch.tensor(rows),)) for rows in ([0, 1, 2], [3])]
    found = agreement(file, simulation.train(), reference, batches)
    assert found is not None
    assert (found.simulation_differs_fraction, found.reference_differs_fraction) == (0.25, 0.5)
    assert found.samples == 4
    assert simulation.training, "as it was"


def test_of_a_segmentation_the_positions_are_counted() -> None:
    classes = torch.randint(5, (3, 2, 6, 4), generator=torch.Generator().manual_seed(0))
    masks = F.one_hot(classes).movedim(-1, 2).float()  # three models', (2, K, 6, 4) each
    models = [Scores(*mask.tolist()) for mask in masks]
    batches = [ModelInputs((torch.tensor([row]),)) for row in (0, 1)]
    found = agreement(*models, batches, has_positions=True)
    assert found is not None
    file, simulation, reference = classes
    expected = [float((file != other).double().mean()) for other in (simulation, reference)]
    actual = [found.simulation_differs_fraction, found.reference_differs_fraction]
    assert actual == pytest.approx(expected)
    assert found.samples == 2
    assert agreement(*models, batches) is None, "whether rows or columns are classes is not known"


def test_what_names_no_classes_has_no_agreement() -> None:
    inputs = [ModelInputs((torch.zeros(2, 1, 3),))]
    assert agreement(nn.Identity(), nn.Identity(), nn.Identity(), inputs) is None
    assert agreement(nn.Identity(), nn.Identity(), nn.Identity(), []) is None
