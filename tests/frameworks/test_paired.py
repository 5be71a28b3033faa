"""Two models on the parts of a split."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compressor.frameworks.paired import evaluate_pairs
from compressor.result import Interval
from compressor.search.interval import Paired, drop_interval


class Answers(nn.Module):
    """Right for every sample but those of which it is told."""

    def __init__(self, wrong: Iterable[int]) -> None:
        super().__init__()
        self.wrong = set(wrong)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return torch.tensor([int(number) not in self.wrong for number in numbers])


@torch.no_grad()
def accuracy(model: nn.Module, loader: Iterable[Any]) -> dict[str, float]:
    answers = torch.cat([model(batch[0]) for batch in loader])
    return {"accuracy": 100 * answers.double().mean().item()}


@pytest.fixture
def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(500)), batch_size=64)


def test_the_drop_of_the_parts_is_that_of_the_whole(loader: DataLoader[Any]) -> None:
    reference, compressed = Answers(range(0, 500, 10)), Answers(range(0, 500, 9))
    whole = accuracy(reference, loader)["accuracy"], accuracy(compressed, loader)["accuracy"]
    paired = evaluate_pairs(accuracy, reference, compressed, loader, "accuracy", whole)
    assert isinstance(paired, Paired)
    assert sum(paired.samples) == 500
    means = [
        sum(map(float.__mul__, metrics, map(float, paired.samples))) / 500
        for metrics in (paired.reference, paired.compressed)
    ]
    assert means == pytest.approx(whole)
    interval = drop_interval(paired, 2.0, is_larger_better=True, looks=1)
    assert isinstance(interval, Interval)
    assert interval.low < whole[0] - whole[1] < interval.high


def test_equal_models_are_surely_within_a_delta_of_a_few_samples(loader: DataLoader[Any]) -> None:
    model = Answers(range(0, 500, 10))
    paired = evaluate_pairs(
        accuracy, model, Answers([0, *range(10, 500, 10)]), loader, "accuracy", (90.0, 90.0)
    )
    assert isinstance(paired, Paired)
    interval = drop_interval(paired, 1.5, is_larger_better=True, looks=1)
    assert isinstance(interval, Interval)
    assert interval.high <= 1.5


def test_an_evaluation_of_the_whole_data_set_says_that_it_takes_no_part(
    loader: DataLoader[Any],
) -> None:
    def of_tensors(model: nn.Module, loader: Any) -> dict[str, float]:
        return accuracy(model, [(loader.dataset.tensors[0],)])

    found = evaluate_pairs(of_tensors, Answers([]), Answers([]), loader, "accuracy", (100.0, 100.0))
    assert isinstance(found, str)
    assert "tensors" in found


def test_a_rank_correlation_has_no_interval(loader: DataLoader[Any]) -> None:
    def spread(model: nn.Module, loader: Any) -> dict[str, float]:
        numbers = torch.cat([batch[0] for batch in loader]).double()
        return {"spread": (numbers * model(numbers)).std().item()}

    one, other = Answers([1, 2]), Answers([400])
    whole = spread(one, loader)["spread"], spread(other, loader)["spread"]
    paired = evaluate_pairs(spread, one, other, loader, "spread", whole)
    assert isinstance(paired, Paired)
    assert "not the mean over its parts" in str(
        drop_interval(paired, 1.0, is_larger_better=True, looks=1)
    )


def test_a_loader_is_read_once_and_its_generator_is_as_it_was() -> None:
    class Counted(DataLoader[Any]):
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            return super().__iter__()

    own = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.arange(100))
    loader = Counted(data, batch_size=16, shuffle=True, generator=own)
    before = own.get_state()
    model = Answers(range(0, 100, 10))
    evaluate_pairs(accuracy, model, model, loader, "accuracy", (90.0, 90.0))
    assert loader.passes == 1
    assert own.get_state().equal(before)
