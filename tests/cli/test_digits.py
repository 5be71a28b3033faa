"""The demo's data and model."""

from __future__ import annotations

import torch

from compressor.cli.digits import DigitsNet, digit_loaders, shift


def test_shift_moves_each_image_by_its_own_offset() -> None:
    images = torch.rand(9, 2, 5, 4)
    offsets = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    moved = shift(images, offsets)
    for image, result, (row, column) in zip(images, moved, offsets.tolist(), strict=True):
        slow = torch.full((2, 7, 6), -1.0)
        slow[:, 1:6, 1:5] = image
        assert result.equal(slow[:, row : row + 5, column : column + 4])


def test_the_split_is_fixed_and_disjoint() -> None:
    first, second = digit_loaders(), digit_loaders()
    train, test = (first[split].dataset.tensors[0] for split in ("train", "test"))  # type: ignore[attr-defined]
    assert (len(train), len(test)) == (1200, 597)
    assert test.equal(second["test"].dataset.tensors[0])  # type: ignore[attr-defined]
    rows = torch.cat([train, test]).flatten(1)
    assert len(rows.unique(dim=0)) == len(rows)
    assert rows.min() == -1
    assert rows.max() == 1


def test_all_digits_are_in_both_splits() -> None:
    for loader in digit_loaders().values():
        labels = torch.cat([labels for _, labels in loader])
        assert labels.unique().tolist() == list(range(10))


def test_the_net_takes_any_batch_size() -> None:
    net = DigitsNet().eval()
    assert net(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert net(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
