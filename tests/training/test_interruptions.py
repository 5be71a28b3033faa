"""A fit that was interrupted, by an error or Ctrl-C, and what can be done with its trainer then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.errors import CheckpointError, DataError, MetricError
from compressor.interfaces.optimizers import SchedulerConfig
from compressor.structure import surgery
from compressor.training import Callback, Evaluator, Event, State, Trainer
from compressor.training.algorithms import EMA
from compressor.training.callbacks import KeepBest
from compressor.training.checkpoint import LATEST, read_checkpoint
from compressor.training.tasks import ClassifierTask
from tests.training.helpers import (
    accuracy,
    are_equal,
    cross_entropy,
    make_dataset,
    make_loader,
    make_model,
    make_trainer,
    weights_of,
)
from tests.training.test_gradients import Hungry


class Raise(Callback):
    """Ctrl-C once, at one event of one batch."""

    def __init__(self, event: Event, batch: int) -> None:
        self.events, self.batch, self.is_done = {event}, batch, False

    def on(self, event: Event, state: State) -> None:
        if state.clock.batch == self.batch and not self.is_done:
            self.is_done = True
            raise KeyboardInterrupt


def test_the_next_fit_goes_on_in_the_middle_of_the_epoch() -> None:
    seen: list[float] = []

    def step(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch[0].sum().item())
        return cross_entropy(model, batch)["loss"]

    one_cycle = {"name": "OneCycleLR", "max_lr": 0.1, "total_steps": 8}
    options = {"step": step, "train_dataloader": make_loader(shuffle=True)}
    trainer = make_trainer(
        callbacks=[Raise(Event.BATCH_END, 2)],
        schedulers=SchedulerConfig(one_cycle, "iteration"),
        **options,
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    trainer.fit()
    assert trainer.state.clock.batch == 8
    interrupted, seen[:] = list(seen), []
    make_trainer(**options).fit()
    assert interrupted == seen  # no sample twice, none left out


def test_after_an_error_in_half_precision_the_next_fit_trains() -> None:
    trainer = make_trainer(precision="fp16", callbacks=[Raise(Event.BEFORE_STEP, 3)])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    trainer.fit()
    assert trainer.state.clock.batch == 8


def test_a_failed_evaluation_leaves_the_trained_weights_in_the_model() -> None:
    class Broken:
        def __iter__(self) -> Any:
            yield next(iter(make_loader()))
            raise OSError("disk gone")

    plain = make_trainer(callbacks=[Raise(Event.BATCH_END, 4)])
    with pytest.raises(KeyboardInterrupt):
        plain.fit()
    trainer = make_trainer(algorithms=[EMA(0.9, 1)], eval_dataloader=Broken(), eval_interval="4ba")
    with pytest.raises(DataError, match="evaluation failed: OSError: disk gone"):
        trainer.fit()
    assert are_equal(weights_of(plain.model), weights_of(trainer.model))


def test_what_was_trained_before_a_failed_evaluation_is_saved(tmp_path: Path) -> None:
    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"acuracy": 1.0}

    trainer = make_trainer(
        eval_dataloader=Evaluator(function=evaluate), eval_key="accuracy", save_dir=tmp_path
    )
    with pytest.raises(MetricError, match=r"no 'accuracy'.*Did you mean 'acuracy'"):
        trainer.fit()
    assert read_checkpoint(tmp_path / LATEST)["clock"]["batch"] == 4


def test_after_a_failed_evaluation_the_model_can_be_edited() -> None:
    def evaluate(model: nn.Module) -> dict[str, float]:
        raise ValueError

    trainer = make_trainer(eval_dataloader=Evaluator(function=evaluate))
    with pytest.raises(ValueError):  # noqa: PT011
        trainer.eval()
    trainer.state.edit(lambda model: surgery.replace(model, "2", nn.GELU()))


def test_a_state_taken_after_an_interruption_draws_nothing_from_the_caller() -> None:
    def make(*callbacks: Callback) -> Trainer:
        return make_trainer(make_model(dropout=0.5), callbacks=list(callbacks))

    results = []
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            trainer = make(Raise(Event.BATCH_END, 2))
            with pytest.raises(KeyboardInterrupt):
                trainer.fit()
            resumed = make()
            resumed.load_state_dict(trainer.state_dict())
            resumed.fit()
        results.append(weights_of(resumed.model))
    assert are_equal(*results)


@pytest.mark.parametrize("killed_at", [2, 6, 9, 14])
def test_a_program_that_is_run_again_trains_as_much_as_it_was_to(
    tmp_path: Path, killed_at: int
) -> None:
    def program(folder: str, *callbacks: Callback) -> Trainer:
        trainer = make_trainer(
            make_model(dropout=0.3),
            max_duration="1ep",
            callbacks=list(callbacks),
            save_dir=tmp_path / folder,
            save_interval="1ba",
            autoresume=True,
        )
        trainer.fit()
        trainer.fit("2ep")
        trainer.fit("5ba")
        return trainer

    straight = program("straight")
    with pytest.raises(KeyboardInterrupt):
        program("killed", Raise(Event.BATCH_END, killed_at))
    again = program("killed")
    assert again.state.clock.batch == straight.state.clock.batch == 17
    assert are_equal(weights_of(straight.model), weights_of(again.model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizers": {"name": "Adam"}}, "the optimizer SGD, and this one has Adam"),
        ({"schedulers": {"name": "StepLR", "step_size": 1}}, "the scheduler LambdaLR.*StepLR"),
    ],
)
def test_a_checkpoint_of_another_optimizer_or_scheduler_is_refused(
    tmp_path: Path, options: Any, message: str
) -> None:
    make_trainer(save_dir=tmp_path).fit()
    trainer = make_trainer(save_dir=tmp_path, **options)
    with pytest.raises(CheckpointError, match=message):
        trainer.resume()
    trainer.fit()


def test_a_file_that_is_no_checkpoint_of_a_trainer_says_what_it_is(tmp_path: Path) -> None:
    options = {"eval_dataloader": make_loader(), "save_dir": tmp_path}
    make_trainer(callbacks=[KeepBest("loss", "min", folder=tmp_path)], **options).fit()
    with pytest.raises(CheckpointError, match="load_best"):
        make_trainer().resume(tmp_path / "best.ckpt")
    with pytest.raises(CheckpointError, match="it holds nothing"):
        make_trainer().load_state_dict({})
    assert make_trainer().resume(tmp_path)  # the folder will do


def test_a_model_of_another_type_is_refused(tmp_path: Path) -> None:
    make_trainer(save_dir=tmp_path).fit()
    trainer = make_trainer(make_model().double(), save_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"torch.float32 in the checkpoint"):
        trainer.resume()


def test_the_size_that_fitted_is_in_the_checkpoint() -> None:
    trainer = make_trainer(Hungry(4), micro_batch_size="auto")
    trainer.fit("1ba")
    resumed = make_trainer(Hungry(4), micro_batch_size="auto")
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.micro_batch_size == 4
    other = make_trainer(Hungry(4), micro_batch_size=3)
    other.load_state_dict(trainer.state_dict())
    assert other.micro_batch_size == 3  # the user's own


def test_numbers_of_numpy_are_saved(tmp_path: Path) -> None:
    trainer = make_trainer(
        optimizers={"name": "SGD", "lr": np.float64(0.1)}, evaluate=accuracy, save_dir=tmp_path
    )
    trainer.fit()
    assert make_trainer(save_dir=tmp_path).resume()


def test_the_data_set_is_not_drawn_from_by_predictions() -> None:
    loader = make_loader(shuffle=True, seed=3)
    assert isinstance(loader.generator, torch.Generator)
    before = loader.generator.get_state()
    Trainer(ClassifierTask(make_model())).predict(loader)
    assert torch.equal(loader.generator.get_state(), before)
    assert len(make_dataset()) == 32
