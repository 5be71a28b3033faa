"""Two real processes over gloo and a file, compared with one process on all of the data."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from compressor.training import Callback, Trainer
from compressor.training.callbacks import EarlyStopping
from compressor.training.checkpoint import LATEST
from tests.training.helpers import (
    are_equal,
    cross_entropy,
    make_dataset,
    make_model,
    make_trainer,
)
from tests.training.test_resume import Interrupt

pytestmark = pytest.mark.slow


def run_ranks(work: Callable[[int, Path], Any], folder: Path) -> list[Any]:
    """What `work(rank, folder)` returns in each of two processes.

    They are new ones: autograd refuses to run in a fork of a process that has exported and trained.
    """
    start_processes(_run_rank, (work, folder), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _run_rank(rank: int, work: Callable[[int, Path], Any], folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(work(rank, folder), folder / f"{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # not through the destructors: a thread of autograd that still runs would abort


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
    return {"size": trainer.micro_batch_size, "weights": trainer.model.state_dict()}


class Branches(nn.Module):
    """Each rank uses a layer of its own."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([make_plain_model(seed=1), make_plain_model(seed=2)])
        self.rank = rank

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers[self.rank](x)
        return out


def train_branches(rank: int, folder: Path) -> Any:
    trainer = make_trainer(Branches(rank), train_dataloader=halves(rank), max_duration="1ba")
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.fit()
    after = trainer.model.state_dict()
    moved = sorted({name.split(".")[1] for name in before if (before[name] != after[name]).any()})
    return {"weights": after, "moved": moved}


def stop_in_different_ways(rank: int, folder: Path) -> Any:
    stopping = EarlyStopping("loss", 1 if rank else 3, "min")
    trainer = make_trainer(
        make_plain_model(),
        train_dataloader=halves(rank),
        callbacks=[stopping],
        evaluate=lambda model: {"loss": 1.0 + rank},  # the mean of both is what counts
        max_duration="9ep",
    )
    trainer.fit()
    clocked = make_trainer(
        make_plain_model(), train_dataloader=halves(rank) * 2000, max_duration="1s"
    )
    if rank:
        time.sleep(0.3)
    clocked.fit()
    return {
        "epochs": trainer.state.clock.epoch,
        "metrics": trainer.state.metrics,
        "batches": clocked.state.clock.batch,
    }


def resume_within_an_epoch(rank: int, folder: Path) -> Any:
    def make(name: str, *callbacks: Callback) -> Trainer:
        model = make_model(dropout=0.5)
        model[1] = nn.Identity()
        return make_trainer(
            model,
            train_dataloader=halves(rank),
            callbacks=list(callbacks),
            save_dir=folder / name,
            save_interval="1ba",
            autoresume=True,
        )

    straight = make("a")
    straight.fit()
    try:
        make("b", Interrupt(3)).fit()
    except KeyboardInterrupt:
        dist.barrier()
    resumed = make("b")
    resumed.fit()
    return [
        {"weights": each.model.state_dict(), "losses": each.state.train_metrics}
        for each in (straight, resumed)
    ]


def test_a_layer_that_only_one_process_uses_is_trained_alike_in_both(tmp_path: Path) -> None:
    results = run_ranks(train_branches, tmp_path)
    assert [result["moved"] for result in results] == [["0", "1"], ["0", "1"]]
    assert are_equal(results[0]["weights"], results[1]["weights"])


def test_processes_end_together(tmp_path: Path) -> None:
    results = run_ranks(stop_in_different_ways, tmp_path)
    assert results[0] == results[1]
    assert results[0]["epochs"] == 2
    assert results[0]["metrics"] == {"loss": 1.5}


def test_processes_go_on_bit_equal_within_an_epoch(tmp_path: Path) -> None:
    for straight, resumed in run_ranks(resume_within_an_epoch, tmp_path):
        assert are_equal(straight["weights"], resumed["weights"])
        assert straight["losses"] == resumed["losses"]


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
