"""What a further pass may offer, and that the engine's second level trains what it recovered."""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compressor.frameworks.further import further
from compressor.result import Choice, Plan
from compressor.testing.models import TinyResNet
from tests.runs import compress, fit


def pruned(*kept: int) -> Choice:
    return Choice("channel_pruning", "group", {"kept": list(kept)}, modules=("conv1", "bn1"))


BLOCK = Choice("block_removal", "block", {"removed": True}, modules=("block", "block.conv"))
INSIDE = Choice("low_rank", "block.conv", {"rank": 4}, modules=("block.conv",))
BESIDE = Choice("low_rank", "conv1", {"rank": 4}, modules=("conv1",))


def test_a_pruned_group_can_only_lose_more_of_its_channels() -> None:
    made = Plan((pruned(0, 1, 2),))
    offered = [pruned(0, 1, 2, 3), pruned(0, 1, 2), pruned(0, 1), pruned(0, 4)]
    assert further(offered, made) == [pruned(0, 1)]


def test_nothing_is_offered_in_a_block_that_is_gone_and_no_technique_twice() -> None:
    assert further([BLOCK, INSIDE, BESIDE], Plan((BLOCK,))) == [BESIDE]
    assert further([BLOCK, INSIDE, BESIDE], Plan((BESIDE,))) == [BLOCK, INSIDE]


def digits() -> tuple[TensorDataset, TensorDataset]:
    """To train on, and to judge on."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(found.target)
    return TensorDataset(images[:640], labels[:640]), TensorDataset(images[1400:], labels[1400:])


def test_the_second_level_cuts_more_from_a_variant_that_was_recovered(tmp_path: Path) -> None:
    first, second = digits()
    train, test = DataLoader(first, batch_size=64), DataLoader(second, batch_size=200)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = fit(TinyResNet(), list(train) * 4)
    tuned = {"optimizer": {"name": "SGD", "lr": 0.02}, "epochs": 1}
    result = compress(
        model,
        {"train": train, "test": test},
        tmp_path,
        level=2,
        delta=3.0,
        optimization="macs",
        techniques=["channel_pruning", "block_removal"],
        target={"runtime": "eager"},
        export={"formats": []},
        budget={"trials": 4},
        fine_tuner=tuned,
        full_trainer=tuned,
    )
    by_id = {record.id: record for record in result.variants}
    further_ones = [record for record in result.variants if record.base]
    assert further_ones
    for record in further_ones:
        base = by_id[record.base]
        assert record.status == "done"
        assert record.cost is not None
        assert base.cost is not None
        assert record.cost.macs < base.cost.macs
        assert record.epochs > base.epochs
