"""What a step of the trainer costs over a hand-written loop that does the same.

A tiny model shows the microseconds: an empty trainer, and one with five algorithms and five
callbacks that listen to every event and do nothing. The hand-written loop calls the same task, or
the same function of model and batch. A ResNet-20 shows what is left of them on a real step. All
take turns in one process, one thread.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.common import finish, make_parser
from compressor.training import Algorithm, Callback, Event, State, TaskModel, Trainer
from compressor.training.schedules import warmup_cosine
from examples.cifar_resnet_model import CifarResNet

SGD = {"name": "SGD", "lr": 0.01, "momentum": 0.9}


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    started = time.monotonic()
    torch.set_num_threads(1)
    steps, rounds = (300, 5) if arguments.quick else (2000, 21)
    tiny = measure_tiny(steps, rounds, arguments.seed)
    resnet = measure_resnet(*((2, 2, 16) if arguments.quick else (3, 30, 128)), arguments.seed)
    rows = [*tiny.values(), *resnet.values()]
    summary = {
        "empty_us": tiny["empty trainer, task"]["over by hand, us"],
        "empty_function_us": tiny["empty trainer, function"]["over by hand, us"],
        "loaded_us": tiny["5 algorithms, 5 callbacks, task"]["over by hand, us"],
        "resnet20_ratio": resnet["trainer, task"]["of by hand"],
    }
    finish(rows, summary, arguments, started)


class Classify(TaskModel):
    """Cross entropy of a net, without metrics."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Tensor:
        return self.model(batch[0])

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


class Nothing(Algorithm):
    """Listens to every event."""

    events = frozenset(Event)

    def __init__(self, number: int) -> None:
        self.key = f"nothing {number}"

    def on(self, event: Event, state: State) -> None:
        pass


class Watching(Callback):
    """Listens to every event."""

    events = frozenset(Event)

    def __init__(self, number: int) -> None:
        self.key = f"watching {number}"

    def on(self, event: Event, state: State) -> None:
        pass


class Batches:
    """The same batches again and again, `steps` of them: a loader that costs nothing."""

    def __init__(self, batches: list[Any], steps: int) -> None:
        self.batches = batches
        self.steps = steps

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(itertools.cycle(self.batches), self.steps)

    def __len__(self) -> int:
        return self.steps


def measure_tiny(steps: int, rounds: int, seed: int) -> dict[str, dict[str, Any]]:
    """Rows by the kind of loop, on a net of 8 units and batches of 4."""
    random = torch.Generator().manual_seed(seed)
    batches = [
        (torch.randn(4, 8, generator=random), torch.randint(0, 2, (4,), generator=random))
        for _ in range(16)
    ]

    def make_net() -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    data = Batches(batches, steps)
    listeners = {
        "algorithms": [Nothing(number) for number in range(5)],
        "callbacks": [Watching(number) for number in range(5)],
    }
    loops = {
        "by hand, function": make_loop(make_net(), data, step),
        "by hand, task": make_loop(Classify(make_net()), data, task_step),
        "empty trainer, function": make_fit(make_net(), data, step),
        "empty trainer, task": make_fit(Classify(make_net()), data),
        "5 algorithms, 5 callbacks, task": make_fit(Classify(make_net()), data, **listeners),
    }
    return compare("tiny net", loops, steps, rounds)


def measure_resnet(
    steps: int, rounds: int, batch_size: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Rows by the kind of loop, for ResNet-20 on random images."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randn(batch_size, 3, 32, 32, generator=random)
    batches = [(images, torch.randint(0, 10, (batch_size,), generator=random))]

    def make_net() -> nn.Module:
        torch.manual_seed(seed)
        return CifarResNet(20)

    data = Batches(batches, steps)
    loops = {
        "by hand, task": make_loop(Classify(make_net()), data, task_step),
        "trainer, task": make_fit(Classify(make_net()), data),
    }
    return compare(f"ResNet-20, batch {batch_size}", loops, steps, rounds)


def step(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def task_step(task: nn.Module, batch: Any) -> Tensor:
    return task.loss(task(batch), batch)


def make_loop(
    model: nn.Module, data: Batches, step: Callable[[nn.Module, Any], Tensor]
) -> Callable[[], None]:
    """An epoch by hand: what the trainer does, and no more."""
    optimizer = torch.optim.SGD(model.parameters(), lr=SGD["lr"], momentum=SGD["momentum"])
    schedule = LambdaLR(optimizer, lambda done: warmup_cosine(min(1.0, done / len(data))))

    def run() -> None:
        model.train()
        total = 0.0
        for batch in data:
            optimizer.zero_grad(set_to_none=True)
            loss = step(model, batch)
            total += loss.item()
            loss.backward()
            optimizer.step()
            schedule.step()

    return run


def make_fit(model: nn.Module, data: Batches, *step: Any, **options: Any) -> Callable[[], None]:
    """An epoch of a trainer that goes on from the last."""
    trainer = Trainer(model, *step, train_dataloader=data, optimizers=SGD, **options)
    return lambda: trainer.fit("1ep")


def compare(
    what: str, loops: dict[str, Callable[[], None]], steps: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """A row for each loop; differences and ratios are medians over rounds, each within a round."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds + 1):
        order = loops if number % 2 else reversed(loops)  # who is first finds other clocks
        for name in order:
            run = loops[name]
            began = time.perf_counter()
            run()
            if number:  # the first warms up
                times[name].append((time.perf_counter() - began) / steps * 1e6)
    rows = {}
    for name, own in times.items():
        pairs = list(zip(own, times[f"by hand, {name.rpartition(', ')[2]}"], strict=True))
        rows[name] = {
            "step of": what,
            "loop": name,
            "us": statistics.median(own),
            "over by hand, us": statistics.median(a - b for a, b in pairs),
            "of by hand": statistics.median(a / b for a, b in pairs),
        }
    return rows


if __name__ == "__main__":
    main()
