from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from compressor.errors import CheckpointError, ConfigError
from compressor.structure import cutting, surgery
from compressor.training import Algorithm, Callback, Event, State, Trainer
from compressor.training.algorithms import (
    EMA,
    BatchNormReestimation,
    Distillation,
    GradientClipping,
)
from compressor.training.callbacks import EarlyStopping, History, KeepBest
from compressor.training.checkpoint import LATEST, read_checkpoint, write_checkpoint
from compressor.training.loggers import InMemoryLogger
from tests.training.helpers import (
    HIDDEN,
    accuracy,
    are_equal,
    cross_entropy,
    make_dataset,
    make_loader,
    make_model,
    make_trainer,
    weights_of,
)


class Interrupt(Callback):
    """Ctrl-C after so many batches."""

    events = frozenset({Event.BATCH_END})

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on(self, event: Event, state: State) -> None:
        if state.clock.batch == self.batch:
            raise KeyboardInterrupt


def make_loaded_trainer(save_dir: Path, interrupt: int = -1, **options: Any) -> Trainer:
    """Everything that has state, at once."""
    loader = make_loader(shuffle=True, seed=3)
    options = {
        "train_dataloader": loader,
        "optimizers": {"name": "AdamW", "lr": 0.02},
        "algorithms": [
            Distillation(make_model(seed=5)),
            GradientClipping(0.5),
            EMA(0.9, period=3),
            BatchNormReestimation(loader, lambda model, batch: model(batch[0]), count=2),
        ],
        "callbacks": [KeepBest("accuracy"), History(), Interrupt(interrupt)],
        "loggers": [InMemoryLogger()],
        "log_interval": "2ba",
        "evaluate": accuracy,
        "max_duration": "4ep",
        **options,
    }
    return make_trainer(make_model(dropout=0.3), save_dir=save_dir, **options)


def deep_equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(deep_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(deep_equal, a, b))
    return bool(a == b)


def content_of(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint holds, but for how long it took."""
    content = trainer.state_dict()
    del content["clock"]["seconds"]
    return content


@pytest.mark.parametrize("interrupt", [5, 8, 11, 15])
@pytest.mark.parametrize("save_interval", ["1ep", "1ba", "3ba"])
@pytest.mark.parametrize(
    "scheduler", [None, {"name": "MultiStepLR", "milestones": [1, 3]}], ids=["default", "steps"]
)
def test_an_interrupted_fit_ends_bit_equal(
    tmp_path: Path, interrupt: int, save_interval: str, scheduler: Any
) -> None:
    options = {"schedulers": scheduler, "save_interval": save_interval}
    straight = make_loaded_trainer(tmp_path / "a", **options)
    straight.fit()
    with pytest.raises(KeyboardInterrupt):
        make_loaded_trainer(tmp_path / "b", interrupt, **options).fit()
    resumed = make_loaded_trainer(tmp_path / "b", **options)
    assert resumed.resume()
    every = {"1ep": 4, "1ba": 1, "3ba": 3}[save_interval]
    assert resumed.state.clock.batch == (interrupt - 1) // every * every
    resumed.fit()
    assert are_equal(weights_of(straight.model), weights_of(resumed.model))
    assert deep_equal(content_of(straight), content_of(resumed))


class Augmented(TensorDataset):
    """Draws from all three global generators while a batch is fetched."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        x, y = super().__getitem__(index)
        return x + torch.rand(()) + random.random() + np.random.rand(), y


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_data_that_is_augmented_on_the_way_goes_on_within_an_epoch(
    tmp_path: Path, workers: int
) -> None:
    def make(interrupt: int = -1) -> Trainer:
        dataset = Augmented(*make_dataset().tensors)
        loader: Any = DataLoader(dataset, batch_size=8, shuffle=True, num_workers=workers)
        return make_trainer(
            make_model(dropout=0.3),
            train_dataloader=loader,
            callbacks=[Interrupt(interrupt)],
            save_dir=tmp_path,
            save_interval="1ba",
            autoresume=True,
        )

    straight = make()
    straight.fit()
    (tmp_path / LATEST).unlink()
    with pytest.raises(KeyboardInterrupt):
        make(interrupt=7).fit()
    resumed = make()
    resumed.fit()
    assert are_equal(weights_of(straight.model), weights_of(resumed.model))
    assert straight.state.train_metrics == resumed.state.train_metrics


class Narrowing(Algorithm):
    """Replaces the hidden layer by a narrower one, and later the last layer by two."""

    events = frozenset({Event.BATCH_END})

    def on(self, event: Event, state: State) -> None:
        if state.clock.batch == 3:
            state.edit(lambda model: cutting.keep_channels(model, HIDDEN, (0, 2, 3, 5)))
        if state.clock.batch == 6:
            state.edit(
                lambda model: surgery.replace(
                    model, "4", nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
                )
            )


@pytest.mark.parametrize("interrupt", [3, 4, 6, 7, 8])
@pytest.mark.parametrize(
    "optimizer",
    [{"name": "SGD", "lr": 0.1, "momentum": 0.9}, {"name": "AdamW", "lr": 0.02}],
    ids=lambda spec: spec["name"],
)
def test_edits_before_on_and_after_the_checkpoint_are_made_again(
    tmp_path: Path, interrupt: int, optimizer: Any
) -> None:
    def make(folder: str, interrupt: int = -1) -> Trainer:
        return make_trainer(
            make_model(dropout=0.3),
            train_dataloader=make_loader(shuffle=True),
            optimizers=optimizer,
            algorithms=[Narrowing(), EMA(0.9, period=3), GradientClipping(0.1)],
            callbacks=[Interrupt(interrupt)],
            evaluate=accuracy,
            max_duration="10ba",
            save_dir=tmp_path / folder,
            save_interval="1ba",
            autoresume=True,
        )

    straight = make("a")
    straight.fit()
    with pytest.raises(KeyboardInterrupt):
        make("b", interrupt).fit()
    resumed = make("b")
    resumed.fit()
    assert straight.model[4][0].weight.shape == (3, 4)  # type: ignore[index,union-attr]
    assert deep_equal(content_of(straight), content_of(resumed))


def test_a_model_edited_in_another_way_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(algorithms=[Narrowing()], max_duration="4ba", save_dir=tmp_path)
    trainer.fit()
    other = make_trainer(algorithms=[Narrowing()], max_duration="4ba", save_dir=tmp_path)
    other.state.edit(lambda model: cutting.keep_channels(model, HIDDEN, (0, 1)))
    before = weights_of(other.model)
    with pytest.raises(CheckpointError, match=r"'0.weight' has shape \(4, 4\)"):
        other.resume()
    assert are_equal(before, weights_of(other.model))


def test_callbacks_may_come_and_go_between_a_checkpoint_and_its_resumption(tmp_path: Path) -> None:
    make_trainer(callbacks=[History()], save_dir=tmp_path).fit("1ep")
    best, history = KeepBest("loss", "min"), History()
    options = {"save_dir": tmp_path, "eval_dataloader": make_loader()}
    trainer = make_trainer(callbacks=[best, history], **options)
    assert trainer.resume()
    trainer.fit("1ep")
    assert [row["epoch"] for row in history.rows] == [1, 2]
    assert best.value == trainer.state.metrics["loss"]


def test_autoresume_needs_a_folder() -> None:
    with pytest.raises(ConfigError, match="save_dir"):
        make_trainer(autoresume=True)


def test_two_checkpoints_of_one_fit_differ(tmp_path: Path) -> None:
    trainer = make_loaded_trainer(tmp_path)
    trainer.fit("1ep")
    first = read_checkpoint(tmp_path / LATEST)
    trainer.fit("1ep")
    assert not deep_equal(first["model"], read_checkpoint(tmp_path / LATEST)["model"])


def test_a_sampler_with_its_own_generator_goes_on(tmp_path: Path) -> None:
    seen: list[float] = []

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        seen.append(batch[0].sum().item())
        return cross_entropy(model, batch)["loss"]

    def make(interrupt: int = -1) -> Trainer:
        dataset = make_dataset()
        sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(7))
        loader: Any = DataLoader(dataset, batch_size=8, sampler=sampler)
        return make_trainer(
            train_dataloader=loader, step=step, save_dir=tmp_path, callbacks=[Interrupt(interrupt)]
        )

    make().fit()
    straight = seen[4:]
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        make(interrupt=5).fit()
    resumed = make()
    resumed.resume()
    seen.clear()
    resumed.fit()
    assert seen == straight
    assert len(set(seen)) == 4


def test_a_loaders_own_generator_is_put_back_and_does_not_decide_the_order(tmp_path: Path) -> None:
    """It was advanced by a fit, and a resume between two fits gave another order of the data."""
    seen: list[float] = []

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        seen.append(batch[0].sum().item())
        return cross_entropy(model, batch)["loss"]

    def make(seed: int) -> tuple[Trainer, torch.Generator]:
        loader = make_loader(shuffle=True, seed=seed)
        assert isinstance(loader.generator, torch.Generator)
        return make_trainer(train_dataloader=loader, step=step, save_dir=tmp_path), loader.generator

    trainer, own = make(seed=3)
    state = own.get_state()
    trainer.fit("1ep")
    trainer.fit("1ep")
    assert torch.equal(own.get_state(), state)
    straight = list(seen)
    assert straight[:4] != straight[4:]
    seen.clear()
    (tmp_path / LATEST).unlink()
    make(seed=4)[0].fit("1ep")
    resumed = make(seed=5)[0]
    resumed.resume()
    resumed.fit("1ep")
    assert seen == straight


def test_a_fit_that_was_complete_does_nothing_when_resumed(tmp_path: Path) -> None:
    make_loaded_trainer(tmp_path).fit()
    trainer = make_loaded_trainer(tmp_path, interrupt=17)
    trainer.resume()
    weights = weights_of(trainer.model)
    trainer.fit()
    assert are_equal(weights, weights_of(trainer.model))
    assert trainer.state.metrics["accuracy"] == accuracy(trainer.model.eval())["accuracy"]


def test_a_fit_that_stopped_early_does_not_go_on_when_resumed(tmp_path: Path) -> None:
    def make() -> Trainer:
        stopping = EarlyStopping("accuracy", patience=1)
        return make_trainer(
            evaluate=lambda model: {"accuracy": 0.5},
            callbacks=[stopping],
            max_duration="9ep",
            save_dir=tmp_path,
        )

    make().fit()
    trainer = make()
    trainer.resume()
    trainer.fit()
    assert trainer.state.clock.epoch == 2


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    assert not make_trainer(save_dir=tmp_path).resume()
    assert not make_trainer().resume()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Linear(4, 2), {}, "only in the"),
        (None, {"optimizers": {"name": "Adam"}, "algorithms": [GradientClipping()]}, "Clipping"),
    ],
    ids=["model", "algorithms"],
)
def test_a_checkpoint_of_another_training_is_refused_and_nothing_is_loaded(
    tmp_path: Path, model: Any, options: dict[str, Any], message: str
) -> None:
    make_trainer(save_dir=tmp_path).fit()
    trainer = make_trainer(model or make_model(seed=9), save_dir=tmp_path, **options)
    before = weights_of(trainer.model)
    with pytest.raises(CheckpointError, match=message):
        trainer.resume()
    assert are_equal(before, weights_of(trainer.model))
    assert trainer.state.clock.batch == 0


def test_a_model_of_another_width_is_refused_by_the_name_of_the_tensor(tmp_path: Path) -> None:
    make_trainer(nn.Linear(4, 3), save_dir=tmp_path).fit()
    with pytest.raises(CheckpointError, match=r"'weight' has shape \(3, 4\) in the checkpoint"):
        make_trainer(nn.Linear(4, 2), save_dir=tmp_path).resume()


def test_a_truncated_or_altered_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, {"weights": torch.arange(100.0), "name": "a"})
    assert torch.equal(read_checkpoint(path)["weights"], torch.arange(100.0))
    content = path.read_bytes()
    altered = bytearray(content)
    altered[len(content) // 2] ^= 1
    for broken in (content[:-10], bytes(altered), content[:90]):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match="truncated or was altered"):
            read_checkpoint(path)
    path.write_bytes(b"PK something else")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "none.ckpt")


def test_what_could_not_be_read_back_is_refused_where_it_is_before_the_file_is_touched(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, {"good": 1})
    with pytest.raises(CheckpointError, match=r"listeners\.mine\[1\] is a set"):
        write_checkpoint(path, {"listeners": {"mine": [1, {2}]}})
    assert read_checkpoint(path) == {"good": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]
