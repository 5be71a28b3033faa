"""What processes that train one model measure of themselves; started by `benchmarks.scaling`.

torchrun --nproc_per_node 2 -m benchmarks.scaling_ranks --out ddp.json

Plain `python` is one process, which the others are compared with; `horovodrun` takes `--horovod`.
Every process takes a batch of the same size, at one thread. The trainer is the package's own.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.distributed import Context, current_context
from compressor.structure import surgery
from compressor.structure.trace import copy_model
from compressor.training import Algorithm, Callback, Event, State, Trainer
from examples.cifar_resnet_model import CifarResNet

EDITED = "layer3.0.conv2"
WARM_UP = 3  # steps
APART = 5  # steps from one edit to the next
LONG = 3  # steps that an edit may slow: its own, one without a wrapper, and the wrapping
MEBIBYTES = (0.03125, 1, 4, 16)  # of messages
SGD = {"name": "SGD", "lr": 0.01, "momentum": 0.9}


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    begin(arguments)
    context = current_context()
    plain = run(context, arguments, edits=0)
    edited = run(context, arguments, edits=arguments.edits)
    model = CifarResNet(20)
    measured = {
        "processes": context.world_size,
        "step_ms": statistics.median(plain),
        "edit_ms": lost_to_edits(edited, arguments.edits),
        "mebibytes": sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20,
        "replica_us": time_replica(context, model) if context.world_size == 1 else None,
        "message_ms": time_messages(arguments.rounds) if dist.is_initialized() else {},
    }
    if context.is_main:
        arguments.out.write_text(json.dumps(measured))
    if dist.is_initialized():
        dist.destroy_process_group()
        os._exit(0)  # not through the destructors: a thread of autograd that still runs would abort


def begin(arguments: argparse.Namespace) -> None:
    """Meet the others, if there are any."""
    if arguments.horovod:
        importlib.import_module("horovod.torch").init()
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")


class Batches:
    """The same batch again and again: a loader that costs nothing."""

    def __init__(self, batch: tuple[Tensor, Tensor], count: int) -> None:
        self.batch, self.count = batch, count

    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat(self.batch, self.count)

    def __len__(self) -> int:
        return self.count


class Clock(Callback):
    """Milliseconds from the end of each batch to that of the next."""

    events = frozenset({Event.BATCH_END})

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on(self, event: Event, state: State) -> None:
        self.ends.append(time.perf_counter())

    def steps(self) -> list[float]:
        return [1000 * (after - before) for before, after in itertools.pairwise(self.ends)]


class Editing(Algorithm):
    """Puts a copy of a layer in its place, every few steps."""

    events = frozenset({Event.BATCH_END})

    def __init__(self, edits: int) -> None:
        self.left = edits

    def on(self, event: Event, state: State) -> None:
        if self.left and state.clock.batch >= WARM_UP and not state.clock.batch % APART:
            self.left -= 1
            state.edit(exchange)


def exchange(model: nn.Module) -> surgery.Edit:
    return surgery.replace(model, EDITED, copy_model(surgery.get(model, EDITED)))


def run(context: Context, arguments: argparse.Namespace, edits: int) -> list[float]:
    """Milliseconds of each step after the first few."""
    processes = context.world_size
    share = processes if context.splits_batches else 1  # of the loader's batch, one a process
    steps = APART * (edits + 2) if edits else arguments.steps
    random = torch.Generator().manual_seed(0)
    images = torch.randn(arguments.batch * share, 3, 32, 32, generator=random)
    labels = torch.randint(0, 10, (arguments.batch * share,), generator=random)
    torch.manual_seed(0)
    clock = Clock()
    Trainer(
        CifarResNet(20),
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        train_dataloader=Batches((images, labels), steps * processes // share),
        optimizers=SGD,
        max_duration="1ep",
        algorithms=[Editing(edits)],
        callbacks=[clock],
    ).fit()
    return clock.steps()[0 if edits else WARM_UP :]


def lost_to_edits(steps: list[float], edits: int) -> float:
    """Milliseconds that the steps around an edit take more than others; the median edit."""
    # Step k here ends batch k + 2, so that an edit at the end of batch 5 is in step 3.
    firsts = [APART * number - 2 for number in range(1, edits + 1)]
    slowed = {first + after for first in firsts for after in range(LONG)}
    usual = statistics.median(ms for number, ms in enumerate(steps) if number not in slowed)
    return statistics.median(sum(steps[first : first + LONG]) - LONG * usual for first in firsts)


def time_replica(context: Context, model: nn.Module, rounds: int = 20_000) -> float:
    """Microseconds of the calls of a step to the replica of one process.

    A trainer makes them only where there are several processes; one process takes the model itself.
    """
    replica = context.replicate(model)
    began = time.perf_counter()
    for _ in range(rounds):
        assert replica.runner is model
        with replica.accumulating(is_last=True):
            pass
        replica.finish()
    return 1e6 * (time.perf_counter() - began) / rounds


def time_messages(rounds: int) -> dict[str, float]:
    """Milliseconds of a sum over all processes, by the size in MiB."""
    found = {}
    for size in MEBIBYTES:
        tensor = torch.ones(int(size * 2**20) // 4)
        times = []
        for _ in range(rounds):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            times.append(1000 * (time.perf_counter() - began))
        found[str(size)] = statistics.median(times)
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--horovod", action="store_true")
    parser.add_argument("--batch", type=int, default=64, help="samples of one process")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--edits", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=30)
    return parser.parse_args()


if __name__ == "__main__":
    main()
