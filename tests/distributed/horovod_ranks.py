"""What each process does that horovodrun starts for `test_horovod`; one start serves many tests.

`horovodrun -np 2 --gloo python -m tests.distributed.horovod_ranks FOLDER talk reduce`
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from compressor.cli.digits import digit_loaders
from compressor.config import Config
from compressor.distributed import Context, current_context
from compressor.distributed.context import Replica
from compressor.distributed.horovod_context import require_horovod
from compressor.frameworks.recovery import Recovery
from compressor.interfaces.data import DataLoaderView
from compressor.interfaces.optimizers import NativeOptimizerFactory
from compressor.progress import Progress
from compressor.structure import surgery
from compressor.testing.models import TinyResNet
from compressor.training import Algorithm, Event, State
from tests.runs import accuracy, compress
from tests.runs import fit as fit_alone
from tests.training.helpers import cross_entropy, make_dataset, make_loader, make_trainer


def make_net(seed: int = 0) -> nn.Sequential:
    """Without batch norm, so that only sums differ between one process and two."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def batch_of(rank: int, samples: int = 8) -> tuple[Tensor, Tensor]:
    x, y = make_dataset(64).tensors
    return x[samples * rank :][:samples], y[samples * rank :][:samples]


def backward(replica: Replica, rank: int, parts: int = 1) -> None:
    """The gradients of this rank's batch, in so many micro-batches."""
    x, y = batch_of(rank)
    chunks = list(zip(x.chunk(parts), y.chunk(parts), strict=True))
    for number, (inputs, labels) in enumerate(chunks):
        with replica.accumulating(number == len(chunks) - 1):
            share = len(inputs) / len(x)
            (share * F.cross_entropy(replica.runner(inputs), labels)).backward()
    replica.finish()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {name: None if grad is None else grad.clone() for name, grad in grads.items()}


def talk(context: Context, folder: Path) -> Any:
    rank = context.rank
    floats = torch.full((3, 2), float(rank))
    strided = torch.full((2, 3, 4, 4), float(rank)).to(memory_format=torch.channels_last)
    halves = torch.full((2,), float(rank), dtype=torch.bfloat16)
    sent = [
        torch.tensor(float(rank)),
        torch.tensor([rank == 0, rank == 1]),
        torch.tensor([rank, 2**40 + rank]),
        torch.full((2,), 1.5 + rank, dtype=torch.bfloat16),
        torch.empty(0),
        torch.full((2, 3), float(rank)).t(),
        nn.Parameter(torch.full((2,), float(rank))),
    ]
    context.broadcast(sent)
    context.broadcast([])
    context.average([floats, strided, halves])
    context.barrier()
    return {
        "rank": rank,
        "size": context.world_size,
        "is_main": context.is_main,
        "splits": context.splits_batches,
        "most": context.most(float(rank)),
        "total": context.total({"a": 1.0, f"b{rank}": rank}),
        "order": list(context.total({f"b{rank}": 0.0, "a": 0.0})),
        "gather": context.gather({"text": "x" * (1 + 99 * rank)}),
        "kinds": context.gather("text" if rank else 1),  # of types that differ
        "share": context.share([1, "a", None] if not rank else None),
        "sent": [each.detach() for each in sent],
        "averages": [floats, strided, halves],
        "is_current": type(current_context()).__name__,
    }


def reduce(context: Context, folder: Path) -> Any:
    """The gradient of a batch, whole and in micro-batches that the ranks count differently."""
    results = []
    for parts in (1, 4, 1 + context.rank):
        model = make_net()
        replica = context.replicate(model)
        for _ in range(2):  # hooks work more than once
            model.zero_grad()
            backward(replica, context.rank, parts)
        replica.close()
        results.append(gradients(model))
    return results


def reduce_all_at_once(context: Context, folder: Path) -> Any:
    """No micro-batch is called last, as where memory may run out in any of them."""
    model = make_net()
    replica = context.replicate(model)
    x, y = batch_of(context.rank)
    for _ in range(2):  # the first time is given up, before anything was sent
        model.zero_grad()
        for inputs, labels in zip(x.chunk(2), y.chunk(2), strict=True):
            with replica.accumulating(False):
                (F.cross_entropy(replica.runner(inputs), labels) / 2).backward()
    replica.finish()
    return gradients(model)


def reduce_in_halves(context: Context, folder: Path) -> Any:
    os.environ["HVD_FP16"] = "1"
    model = make_net()
    replica = context.replicate(model)
    os.environ["HVD_FP16"] = "0"
    whole = make_net()
    other = context.replicate(whole)
    del os.environ["HVD_FP16"]
    backward(replica, context.rank)
    backward(other, context.rank)
    return {"halves": gradients(model), "whole": gradients(whole)}


def leave_out(context: Context, folder: Path) -> Any:
    """A layer that one rank uses, one that none does, and one that is frozen, then thawed."""
    model = nn.ModuleDict({name: make_net(seed) for seed, name in enumerate("abc")})
    replica = context.replicate(model)

    def train(names: str) -> dict[str, Tensor | None]:
        model.zero_grad()
        x, y = batch_of(context.rank)
        with replica.accumulating(True):
            sum(F.cross_entropy(model[name](x), y) for name in names).backward()  # type: ignore[union-attr]
        replica.finish()
        return gradients(model)

    first = train("a" if context.rank else "ab")
    model["a"].requires_grad_(False)
    frozen = train("b")
    model["a"].requires_grad_(True)
    return {"first": first, "frozen": frozen, "thawed": train("ab")}


def rebuild(context: Context, folder: Path) -> Any:
    """After surgery, with the graph of the batch before still alive."""
    model = make_net()
    replica = context.replicate(model)
    x, y = batch_of(context.rank)
    kept = F.cross_entropy(model(x), y)
    backward(replica, context.rank)
    replica.close()
    surgery.replace(model, "0", make_net(seed=5 + context.rank)[0])
    with torch.no_grad():
        model[2].bias += context.rank
    replica = context.replicate(model)
    weights = copy.deepcopy(model.state_dict())
    results = []
    for _ in range(2):
        model.zero_grad()
        backward(replica, context.rank)
        results.append(gradients(model))
    assert kept.requires_grad  # until here: it holds the hooks of the first replica
    return {"weights": weights, "gradients": results}


def fit(context: Context, folder: Path) -> Any:
    """Each rank takes every other batch; the metrics are those of all."""
    trainer = make_trainer(
        make_net(seed=context.rank),  # rank 0 decides
        train_dataloader=make_loader(),
        evaluate=lambda model: {
            "loss": cross_entropy(model, make_dataset().tensors)["loss"].item()
        },
    )
    trainer.fit()
    return {
        "weights": trainer.model.state_dict(),
        "losses": trainer.state.train_metrics,
        "metrics": trainer.state.metrics,
        "batches": trainer.state.clock.batch,
        "samples": trainer.state.clock.sample,
    }


class Exchange(Algorithm):
    """Puts another layer in the place of one, in the middle of a fit."""

    events = frozenset({Event.BATCH_END})

    def on(self, event: Event, state: State) -> None:
        if state.clock.batch == 2:
            new = make_net(seed=7)[0]
            state.edit(lambda model: surgery.replace(model, "0", new))


def fit_with_surgery(context: Context, folder: Path) -> Any:
    trainer = make_trainer(make_net(), train_dataloader=make_loader(), algorithms=[Exchange()])
    trainer.fit()
    return trainer.model.state_dict()


class Recorded(NativeOptimizerFactory):
    """SGD that remembers the rate of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def make(self, native_model: nn.Module) -> Optimizer:
        rates = self.rates

        class Recording(SGD):
            def step(self, closure: Any = None) -> Any:
                rates.append(float(self.param_groups[0]["lr"]))
                return super().step(closure)

        return Recording(native_model.parameters(), lr=0.1)


class LinesTask:
    def loss(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        return cross_entropy(model, batch)


def recover(context: Context, folder: Path) -> Any:
    """As the engine fine-tunes a variant: 4 batches for 2 ranks, 40 epochs."""
    factory, task = Recorded(), LinesTask()
    config = Config.from_dict({"delta": 1.0, "device": "cpu", "use_horovod": True})
    steady = {"name": "ConstantLR", "factor": 1.0}
    tuner = replace(
        Config.from_dict({"fine_tuner": {"scheduler": {"factory": steady}}}).fine_tuner,
        optimizer=factory,
        distillation=None,
    )
    recovery = Recovery(
        replace(config, fine_tuner=tuner),
        "loss",
        task,  # type: ignore[arg-type]
        lambda: make_net(seed=1),
        {"train": DataLoaderView(make_loader())},
        lambda model: {"loss": cross_entropy(model, make_dataset().tensors)["loss"].item()},
        Progress(enabled=False),
    )
    model = make_net()
    own = folder / f"fit{context.rank}"
    recovered = recovery.fit(model, 40, own, is_final=False)
    return {
        "rates": factory.rates,
        "epochs": recovered.epochs,
        "weights": model.state_dict(),
        "wrote": own.exists(),
    }


def compress_tiny(context: Context, folder: Path) -> Any:
    """A run of the engine, as both processes of a user's script do it."""
    loaders = digit_loaders()
    train, test = (loaders[split].dataset for split in ("train", "test"))
    data = {
        "train": DataLoader(TensorDataset(*train[:512]), 32, shuffle=True),
        "test": DataLoader(TensorDataset(*test[:200]), 100),
    }
    torch.manual_seed(0)
    model = TinyResNet()
    fit_alone(model, [batch for _ in range(8) for batch in data["train"]])
    reference = accuracy(model, data["test"])["accuracy"]
    result = compress(
        model,
        data,
        folder / "run",
        use_horovod=True,
        delta=15.0,
        techniques=["channel_pruning"],
        target={"runtime": "eager"},
        fine_tuner={"optimizer": SGD_OPTIONS, "epochs": 2},
        full_trainer={"optimizer": SGD_OPTIONS, "epochs": 3},
    )
    return {
        "plan": result.plan.describe(),
        "choices": len(result.plan),
        "certificate": json.dumps(result.to_json()["certificate"]),
        "reference": reference,
        "certified": result.certificate.metric,
        "measured": accuracy(result.model, data["test"])["accuracy"],
        "weights": result.model.state_dict(),
    }


SGD_OPTIONS = {"name": "SGD", "lr": 0.05, "momentum": 0.9}
WORK: dict[str, Callable[[Context, Path], Any]] = {
    work.__name__: work
    for work in (
        talk,
        reduce,
        reduce_all_at_once,
        reduce_in_halves,
        leave_out,
        rebuild,
        fit,
        fit_with_surgery,
        recover,
        compress_tiny,
    )
}


def main() -> None:
    torch.set_num_threads(1)
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    context = require_horovod()
    results = {name: WORK[name](context, folder) for name in names}
    torch.save(results, folder / f"{context.rank}.pt")


if __name__ == "__main__":
    main()
