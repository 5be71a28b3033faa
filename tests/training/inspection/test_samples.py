"""What the collector keeps, against sorting everything."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from compressor.errors import ConfigError, MetricError
from compressor.training.inspection.samples import Sample, SampleCollector


def collect(logits: Tensor, labels: Tensor, count: int, batch_size: int) -> SampleCollector:
    collector = SampleCollector(count)
    images = torch.arange(len(labels), dtype=torch.float32).view(-1, 1, 1, 1)
    parts = zip(*(each.split(batch_size) for each in (images, logits, labels)), strict=True)
    for part in parts:
        collector.update(*part)
    return collector


def indices(samples: list[Sample]) -> list[int]:
    return [sample.index for sample in samples]


@given(
    seed=st.integers(0, 1000),
    samples=st.integers(1, 40),
    count=st.integers(1, 6),
    batch_size=st.integers(1, 12),
    is_coarse=st.booleans(),  # few different logits: many equals
)
def test_what_is_kept_is_what_sorting_everything_gives(
    seed: int, samples: int, count: int, batch_size: int, is_coarse: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, 4, generator=generator)
    logits = logits.round() if is_coarse else logits
    labels = torch.randint(0, 4, (samples,), generator=generator)
    collector = collect(logits, labels, count, batch_size)

    rows = []
    for index in range(samples):
        probabilities = F.softmax(logits[index].double(), 0)
        first, second = sorted(probabilities.tolist(), reverse=True)[:2]
        loss = F.cross_entropy(logits[index : index + 1].double(), labels[index : index + 1])
        is_right = probabilities.argmax().item() == labels[index]
        rows.append((index, round(loss.item(), 9), bool(is_right), round(first - second, 9)))

    def key(sample: Sample) -> tuple[float, float]:
        return round(sample.loss, 9), round(sample.margin, 9)

    best = sorted((row for row in rows if row[2]), key=lambda row: row[1])[:count]
    worst = sorted(rows, key=lambda row: -row[1])[:count]
    confused = sorted(rows, key=lambda row: row[3])[:count]
    assert [key(each)[0] for each in collector.best] == [row[1] for row in best]
    assert [key(each)[0] for each in collector.worst] == [row[1] for row in worst]
    assert [key(each)[1] for each in collector.most_confused] == [row[3] for row in confused]
    if not is_coarse:
        assert indices(collector.best) == [row[0] for row in best]
        assert indices(collector.worst) == [row[0] for row in worst]
        assert indices(collector.most_confused) == [row[0] for row in confused]


def test_of_equals_the_earlier_is_kept_however_the_batches_are_cut() -> None:
    logits, labels = torch.zeros(7, 2), torch.zeros(7, dtype=torch.int64)
    for batch_size in (1, 2, 7):
        collector = collect(logits, labels, 3, batch_size)
        assert indices(collector.best) == [0, 1, 2]
        assert indices(collector.worst) == [0, 1, 2]
        assert indices(collector.most_confused) == [0, 1, 2]


def test_a_sample_is_kept_with_its_own_image_and_probabilities() -> None:
    logits = torch.tensor([[0.0, 0.0, 9.0], [3.0, 1.0, 2.0]])
    (sample,) = collect(logits, torch.tensor([2, 1]), 1, 2).worst
    own = F.softmax(logits[1], 0)
    assert (sample.index, sample.image.item()) == (1, 1.0)
    assert (sample.label, sample.prediction, sample.runner_up) == (1, 0, 2)
    assert sample.label_probability == pytest.approx(own[1].item())
    assert sample.prediction_probability == pytest.approx(own[0].item())
    assert sample.runner_up_probability == pytest.approx(own[2].item())
    assert sample.loss == pytest.approx(-own[1].log().item())
    assert not sample.is_right


def test_nothing_is_best_where_nothing_is_right() -> None:
    collector = collect(torch.tensor([[1.0, 0.0]] * 3), torch.tensor([1, 1, 1]), 2, 2)
    assert collector.best == []
    assert len(collector.worst) == 2


def test_memory_is_for_the_kept_images_alone() -> None:
    collector = SampleCollector(1)
    images = torch.zeros(64, 3, 8, 8)
    collector.update(images, torch.randn(64, 3), torch.zeros(64, dtype=torch.int64))
    for sample in collector.kept.values():
        assert sample.image.untyped_storage().nbytes() == 3 * 8 * 8 * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_without_an_order_are_refused(value: float) -> None:
    with pytest.raises(MetricError, match="NaN or infinite"):
        collect(torch.tensor([[value, 0.0]]), torch.tensor([0]), 1, 1)


def test_a_label_that_is_no_class_is_refused() -> None:
    with pytest.raises(MetricError, match="a label 2, and there are 2 classes"):
        collect(torch.zeros(1, 2), torch.tensor([2]), 1, 1)


def test_no_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="samples=0 shows nothing"):
        SampleCollector(0)
