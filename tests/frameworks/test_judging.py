"""Evaluations of a model are the same, whatever was evaluated before."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from compressor.config import Config
from compressor.frameworks.judging import Judging
from compressor.interfaces.inputs import ModelInputs
from compressor.interfaces.task import Task
from compressor.search.interval import Paired


def first_and_noise(model: nn.Module, loader: Iterable[Any]) -> dict[str, float]:
    """Depends on the order of the samples and on the global generator."""
    return {"metric": float(next(iter(loader))[0]) + float(torch.rand(()))}


def judging(loader: DataLoader[Tensor]) -> Judging:
    unused: Any = None
    return Judging(
        Config.from_dict({"delta": 1.0, "device": "CPU", "eval_split": "test"}),
        Task(unused, unused, first_and_noise, "metric"),
        {"test": loader},
        nn.Linear(1, 1),
        ModelInputs((torch.zeros(1, 1),)),
        unused,
    )


def test_an_evaluation_draws_the_same_whatever_was_drawn_before() -> None:
    """Also of a loader that shuffles, by a generator of its own or without."""
    model, data = nn.Linear(1, 1), torch.arange(1000.0)
    for own in (None, torch.Generator().manual_seed(1)):
        judged = judging(DataLoader(data, shuffle=True, generator=own))  # type: ignore[arg-type]
        before = torch.get_rng_state()
        first = judged.evaluate(model, "test")
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
        assert judged.evaluate(model, "test") == first
        assert judged.looks == 2


def test_the_chunks_of_a_pair_are_the_same_whatever_was_drawn_before() -> None:
    model, data = nn.Linear(1, 1), torch.arange(64.0)
    judged = judging(DataLoader(data, batch_size=4, shuffle=True))  # type: ignore[arg-type]
    first = judged.pair(model, "test", "metric", (1.0, 1.0))
    assert isinstance(first, Paired)
    torch.rand(3)
    assert judged.pair(model, "test", "metric", (1.0, 1.0)) == first
    assert first.reference == first.compressed
