"""Two real processes over gloo and a file, compared with one process on all of the data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from compressor.training import Trainer
from compressor.training.checkpoint import LATEST
from tests.training.helpers import cross_entropy, make_dataset, make_model, make_trainer

pytestmark = pytest.mark.slow


def run_ranks(work: Callable[[int, Path], Any], folder: Path) -> list[Any]:
    """What `work(rank, folder)` returns in each of two processes."""
    start_processes(_run_rank, (work, folder), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _run_rank(rank: int, work: Callable[[int, Path], Any], folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(work(rank, folder), folder / f"{rank}.pt")
    dist.destroy_process_group()


def make_plain_model(seed: int = 0) -> nn.Module:
    model = make_model(seed)
    model[1] = nn.Identity()
    return model


def halves(rank: int) -> list[tuple[Tensor, Tensor]]:
    """Of every batch of eight, the four of one rank."""
    x, y = make_dataset().tensors
    return [(x[first + 4 * rank :][:4], y[first + 4 * rank :][:4]) for first in range(0, len(x), 8)]


def train_half(rank: int, folder: Path) -> Any:
    trainer = make_trainer(
        make_plain_model(seed=rank),  # rank 0 decides
        train_dataloader=halves(rank),
        save_dir=folder / f"run{rank}",
    )
    trainer.fit()
    return {"weights": trainer.model.state_dict(), "losses": trainer.state.train_metrics}


class HungryOnOne(nn.Module):
    """Runs out of memory on rank 1, above two samples."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.net = make_plain_model()

    def forward(self, x: Tensor) -> Tensor:
        if self.rank == 1 and len(x) > 2:
            torch.empty(2**60, dtype=torch.uint8)
        return self.net(x)


def train_hungry(rank: int, folder: Path) -> Any:
    trainer: Trainer = make_trainer(
        HungryOnOne(rank), train_dataloader=halves(rank), micro_batch_size="auto"
    )
    trainer.fit()
    return {"size": trainer._gradients.micro_batch_size, "weights": trainer.model.state_dict()}


def test_two_processes_train_like_one_on_the_whole_batch(tmp_path: Path) -> None:
    results = run_ranks(train_half, tmp_path)
    alone = make_trainer(make_plain_model(), step=cross_entropy)
    alone.fit()
    for name, value in alone.model.state_dict().items():
        assert torch.equal(results[0]["weights"][name], results[1]["weights"][name])
        # 1e-6: float32 sums in another order
        torch.testing.assert_close(results[0]["weights"][name], value, rtol=0, atol=1e-6)
    assert results[0]["losses"] == pytest.approx(alone.state.train_metrics, abs=1e-6)
    assert (tmp_path / "run0" / LATEST).exists()
    assert not (tmp_path / "run1").exists()


def test_processes_agree_when_one_runs_out_of_memory(tmp_path: Path) -> None:
    results = run_ranks(train_hungry, tmp_path)
    assert [result["size"] for result in results] == [2, 2]
    alone = make_trainer(make_plain_model(), step=cross_entropy)
    alone.fit()
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(results[0]["weights"][f"net.{name}"], value, rtol=0, atol=1e-6)
