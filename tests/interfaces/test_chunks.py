"""Parts of a split."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from compressor.interfaces.chunks import chunks
from compressor.interfaces.data import DataLoaderView


@pytest.mark.parametrize("samples", [1, 3, 8, 20, 100])
def test_every_sample_is_in_one_part(samples: int) -> None:
    loader = DataLoader(TensorDataset(torch.arange(50), torch.arange(50) * 2), batch_size=8)
    parts = list(chunks(loader, samples))
    rows = [torch.stack(batch) for part in parts for batch in part]
    assert torch.equal(torch.cat(rows, 1), torch.stack([torch.arange(50), torch.arange(50) * 2]))
    assert all(part.samples >= samples for part in parts[:-1])


def test_a_part_tells_its_length_as_a_loader_does() -> None:
    (part,) = chunks([torch.zeros(4, 2), torch.zeros(3, 2)], 7)
    view = DataLoaderView(part)
    assert (len(view), view.dataset_size, view.batch_size, len(view.dataset)) == (2, 7, 4, 7)


def test_one_part_at_a_time_is_read() -> None:
    read: list[int] = []

    def batches() -> object:
        for number in range(10):
            read.append(number)
            yield torch.zeros(4)

    parts = chunks(batches(), 8)  # type: ignore[arg-type]
    next(parts)
    assert len(read) == 2


def test_batches_that_cannot_be_cut_stay_whole() -> None:
    images = [torch.zeros(3, 4, 4), torch.zeros(3, 5, 4)]  # of different sizes: a list of samples
    batches: list[tuple[list[Tensor], list[dict[str, Tensor]]]] = [(images, [{}, {}])] * 3
    parts = list(chunks(batches, 8))
    whole = [batch for part in parts for batch in part]
    assert all(part is batch for part, batch in zip(whole, batches, strict=True))
