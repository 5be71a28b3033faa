"""A recipe that is killed anywhere and resumed is, to the bit, the one that ran through."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compressor.training.loggers.json_lines import JsonLinesLogger
from compressor.training.loggers.memory import InMemoryLogger
from compressor.training.recipes import (
    AccAvg,
    CallRecipe,
    Checkpoint,
    ConfusionMatrix,
    EpochMetricAvg,
    ExponentialMetricAvg,
    Log,
    LRSched,
    Optimizer,
    Polyak,
    Recipe,
    ToLogger,
    WindowedMetricAvg,
    cross_entropy_classification,
    recipe,
)
from tests.training.helpers import make_loader, make_model
from tests.training.recipes.helpers import is_same, make_step, make_test

EPOCHS = 3
BATCHES = 4  # an epoch


class Killed(Exception):
    pass


def make_full(folder: Path | None, kill_at: int | None = None, **options: Any) -> Recipe:
    """Everything that has state: dropout, shuffling, momentum, gradients that accumulate."""
    model = make_model(dropout=0.3)
    step, calls = make_step(model), [0]

    def train(batch: Any) -> Any:
        if kill_at is not None and loop.state["iters"] == kill_at:
            raise Killed
        calls[0] += 1
        return step(batch)

    loop = recipe(train, make_loader(shuffle=True), save_dir=folder, **options)
    test = recipe(make_test(model), make_loader(shuffle=True))
    test.callbacks.add_callbacks([EpochMetricAvg("loss"), AccAvg()])
    opt = torch.optim.Adam(model.parameters(), lr=0.05)
    average = copy.deepcopy(model)
    loop.register("model", model)
    loop.register("average", average)
    loop.register("test", test)
    loop.callbacks.add_callbacks(
        [
            Optimizer(opt, accumulation=3, clip_norm=0.5, log_lr=True, log_momentum=True),
            LRSched(torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.9), "step"),
            Polyak(model, average, 0.9),
            EpochMetricAvg("loss"),
            AccAvg(),
            ConfusionMatrix(["a", "b"]),
            CallRecipe(test, run_every=3),
            ToLogger(InMemoryLogger(), log_every=2),
        ]
    )
    return loop


def final(loop: Recipe) -> dict[str, Any]:
    saved = loop.state_dict()
    saved["clock"]["seconds"] = 0.0
    saved["registered"]["test"]["clock"]["seconds"] = 0.0
    return saved


@pytest.mark.parametrize("kill_at", range(1, EPOCHS * BATCHES))
@pytest.mark.parametrize("save_interval", ["1ba", "3ba", "1ep"])
def test_a_run_resumed_in_the_middle_equals_the_straight_run(
    tmp_path: Path, kill_at: int, save_interval: str
) -> None:
    straight = make_full(None)
    straight.run(EPOCHS)
    with pytest.raises(Killed):
        make_full(tmp_path, kill_at, save_interval=save_interval).run(EPOCHS)
    resumed = make_full(tmp_path, save_interval=save_interval, autoresume=True)
    resumed.run(EPOCHS)
    assert is_same(final(resumed), final(straight))
    assert resumed.state["metrics"] == straight.state["metrics"]


def test_a_checkpoint_of_the_callback_resumes_bit_equal_too(tmp_path: Path) -> None:
    straight, watched, resumed = (make_full(None) for _ in range(3))
    for number, loop in enumerate((straight, watched, resumed)):
        loop.callbacks.add_callbacks([Checkpoint(loop, tmp_path / str(number), 5, keep=None)])
    straight.run(EPOCHS)
    watched.run(EPOCHS)
    assert resumed.resume(tmp_path / "1" / "epoch0001-batch0000005.ckpt")
    resumed.run(EPOCHS)
    assert is_same(final(resumed), final(straight))


def test_cross_entropy_classification_resumes_bit_equal(tmp_path: Path) -> None:
    def make(folder: Path | None, loader: Any) -> Recipe:
        return cross_entropy_classification(
            make_model(dropout=0.3),
            loader,
            make_loader(),
            ["a", "b"],
            save_dir=folder,
            save_interval="2ba",
            test_every=3,
            autoresume=folder is not None,
        )

    class Failing:
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            for number, batch in enumerate(make_loader(shuffle=True)):
                if self.passes == 2 and number == 3:
                    raise OSError("the disk is gone")
                yield batch

        def __len__(self) -> int:
            return BATCHES

    straight = make(None, make_loader(shuffle=True))
    straight.run(EPOCHS)
    with pytest.raises(Exception, match="the disk is gone"):
        make(tmp_path, Failing()).run(EPOCHS)
    resumed = make(tmp_path, make_loader(shuffle=True))
    resumed.run(EPOCHS)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert resumed.state["metrics"] == straight.state["metrics"]


def test_windowed_and_exponential_averages_go_on_where_they_were(tmp_path: Path) -> None:
    def make(folder: Path | None) -> Recipe:
        model = nn.Linear(4, 2)
        loop = recipe(make_test(model), make_loader(), save_dir=folder)
        loop.register("model", model)
        loop.callbacks.add_callbacks(
            [WindowedMetricAvg("loss", 3), Log("loss", "last"), Optimizer(_sgd(model))]
        )
        loop.callbacks.add_callbacks([_Renamed()])
        return loop

    first = make(tmp_path)
    first.run(1)
    second = make(tmp_path)
    assert second.resume()
    first.run(2)
    second.run(2)
    assert second.state["metrics"] == first.state["metrics"]


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.0)


class _Renamed(ExponentialMetricAvg):
    """Of the same number under another name, so that both averages are kept."""

    def __init__(self) -> None:
        super().__init__("exponential", beta=0.5)

    def on_batch_end(self, state: dict[str, Any]) -> None:
        state["exponential"] = state["loss"]
        super().on_batch_end(state)


def test_a_file_of_lines_shared_by_two_loops_has_each_line_once_after_a_kill(
    tmp_path: Path,
) -> None:
    def make(name: str, kill_at: int | None, **options: Any) -> Recipe:
        def step(batch: Any) -> dict[str, Any]:
            if loop.state["iters"] == kill_at:
                raise Killed
            return {"loss": batch[0].mean()}

        logger = JsonLinesLogger(tmp_path / f"{name}.jsonl")
        loop = recipe(step, make_loader(), **options)
        test = recipe(lambda batch: {"loss": batch[0].sum()}, make_loader())
        test.callbacks.add_callbacks([EpochMetricAvg("loss"), ToLogger(logger, -1, "inner")])
        loop.register("test", test)
        loop.callbacks.add_callbacks(
            [EpochMetricAvg("loss"), CallRecipe(test, -1), ToLogger(logger, 1)]
        )
        return loop

    make("straight", None).run(EPOCHS)
    saving = {"save_dir": tmp_path / "saved", "save_interval": "3ba"}
    with pytest.raises(Killed):
        make("killed", 8, **saving).run(EPOCHS)
    make("killed", None, **saving, autoresume=True).run(EPOCHS)
    straight, killed = (
        (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("straight", "killed")
    )
    assert len(killed) == len(straight)
    assert [json.loads(line).get("step") for line in killed] == [
        json.loads(line).get("step") for line in straight
    ]
