"""Two real processes: they edit alike, compare, fail together, and go on in another number."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from compressor.structure import cutting
from compressor.training import Algorithm, Callback, Event, State
from compressor.training.algorithms import (
    GradualPruning,
    GradualSparsity,
    GroupRegularization,
)
from compressor.training.checkpoint import LATEST, read_checkpoint
from compressor.training.errors import DivergedError
from tests.training.helpers import HIDDEN, make_dataset, make_trainer, weights_of
from tests.training.ranks import Results, run_ranks
from tests.training.test_distributed import (
    SAMPLES,
    History,
    Interrupt,
    assert_alike,
    make_plain_model,
    train,
)

pytestmark = pytest.mark.slow

PLAIN_HIDDEN = replace(
    HIDDEN, members=tuple(each for each in HIDDEN.members if not each.tensor.startswith("1."))
)


def prune(rank: int, folder: Path) -> Any:
    return train(
        algorithms=[
            GroupRegularization([PLAIN_HIDDEN], 0.01),
            GradualPruning([PLAIN_HIDDEN], 0.5, importance="taylor", updates=3, end="0.8dur"),
        ],
        optimizers={"name": "SGD", "lr": 0.1, "momentum": 0.9},
        max_duration="4ep",
        save_dir=folder / f"run{rank}",
    )


def grow_zeros(rank: int, folder: Path) -> Any:
    return train(algorithms=[GradualSparsity(0.5, updates=4)], max_duration="3ep")


def caught(**options: Any) -> str:
    """The error that ends a fit."""
    try:
        train(**{"eval_dataloader": None, **options})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


class Spoil(Algorithm):
    """Changes a parameter on rank 1."""

    events = frozenset({Event.AFTER_STEP})

    def on(self, event: Event, state: State) -> None:
        if state.clock.batch == 2 and state.context.rank == 1:
            with torch.no_grad():
                state.model[4].bias[1] += 1e-6  # type: ignore[index,operator]


class Cut(Algorithm):
    """Cuts channels after three batches: such as the rank says."""

    events = frozenset({Event.BATCH_END})

    def __init__(self, *kept: tuple[int, ...]) -> None:
        self.kept = kept

    def on(self, event: Event, state: State) -> None:
        kept = self.kept[state.context.rank]
        if state.clock.batch == 3 and len(kept) < 8:
            state.edit(lambda model: cutting.keep_channels(model, PLAIN_HIDDEN, kept))


def spoil_and_edit(rank: int, folder: Path) -> Any:
    return caught(algorithms=[Spoil(), Cut((0, 2), (0, 2))])


def spoil_and_save(rank: int, folder: Path) -> Any:
    return caught(algorithms=[Spoil()], save_dir=folder / "run", save_interval="4ba")


def cut_otherwise(rank: int, folder: Path) -> Any:
    return caught(algorithms=[Cut((0, 2), (0, 2, 3))])


def cut_on_one(rank: int, folder: Path) -> Any:
    return caught(algorithms=[Cut(tuple(range(8)), (0, 2, 3))])


def build_otherwise(rank: int, folder: Path) -> Any:
    return caught(model=nn.Sequential(nn.Linear(4, 2 + rank)))


def cut_alike(rank: int, folder: Path) -> Any:
    return train(
        algorithms=[Cut((0, 2, 3), (0, 2, 3))],
        optimizers={"name": "Adam", "lr": 0.01},
    )


class Diverge(Callback):
    """Finds a loss that is no number, on rank 1, at a moment."""

    def __init__(self, event: Event) -> None:
        self.events = frozenset({event})

    def on(self, event: Event, state: State) -> None:
        if state.context.rank == 1 and state.clock.batch > 1:
            raise DivergedError("no number")


def diverge(rank: int, folder: Path) -> Any:
    moments = (Event.BATCH_END, Event.EPOCH_END, Event.CHECKPOINT, Event.FIT_END)
    return [
        caught(callbacks=[Diverge(event)], save_dir=folder / f"{event.name}") for event in moments
    ]


def fail_to_evaluate(rank: int, folder: Path) -> Any:
    def evaluate(model: nn.Module) -> dict[str, float]:
        raise ZeroDivisionError("no samples")

    return caught(evaluate=evaluate)


def resume_two(rank: int, folder: Path) -> Any:
    """Goes on from what one process wrote, where rank 0 alone can see it."""
    before = folder.parent / "one" / LATEST
    own = folder / f"run{rank}"
    own.mkdir()
    if rank == 0:
        shutil.copy(before, own)
    return finish(own)


def stop_two(rank: int, folder: Path) -> Any:
    start(folder / f"run{rank}")
    return None


def options_of(folder: Path) -> dict[str, Any]:
    return {
        "train_dataloader": DataLoader(make_dataset(SAMPLES), batch_size=8, shuffle=True),
        "eval_dataloader": DataLoader(make_dataset(SAMPLES), batch_size=7),
        "optimizers": {"name": "SGD", "lr": 0.1, "momentum": 0.9},
        "algorithms": [GradualPruning([PLAIN_HIDDEN], 0.5, updates=2, end="0.2dur")],
        "max_duration": "3ep",
        "save_dir": folder,
        "save_interval": "1ba",
    }


def start(folder: Path) -> None:
    """Train until the second batch of the second epoch is done."""
    with pytest.raises(KeyboardInterrupt):
        make_trainer(
            make_plain_model(), callbacks=[Interrupt(6), History()], **options_of(folder)
        ).fit()


def finish(folder: Path) -> dict[str, Any]:
    """Go on from there."""
    history = History()
    trainer = make_trainer(make_plain_model(), callbacks=[history], **options_of(folder))
    assert trainer.resume()
    assert trainer.state.clock.batch == 6
    trainer.fit()
    return {
        "losses": history.losses,
        "metrics": history.metrics,
        "weights": weights_of(trainer.model),
        "clock": [trainer.state.clock.batch, trainer.state.clock.sample],
        "lr": trainer.state.optimizer.param_groups[0]["lr"],
    }


WORKS = (
    prune,
    grow_zeros,
    spoil_and_edit,
    spoil_and_save,
    cut_otherwise,
    cut_on_one,
    build_otherwise,
    cut_alike,
    diverge,
    fail_to_evaluate,
    stop_two,
    resume_two,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("edits")


@pytest.fixture(scope="module")
def straight(folder: Path) -> dict[str, Any]:
    """What one process comes to that was stopped and went on; it leaves `one` as it was stopped."""
    start(folder / "one")
    (folder / "straight").mkdir()
    shutil.copy(folder / "one" / LATEST, folder / "straight")
    return finish(folder / "straight")


@pytest.fixture(scope="module")
def results(folder: Path, straight: dict[str, Any]) -> Results:
    return run_ranks(folder, *WORKS)


@pytest.mark.parametrize("work", [prune, grow_zeros, cut_alike])
def test_two_processes_edit_like_one(work: Any, results: Results, tmp_path: Path) -> None:
    alone = work(0, tmp_path)
    assert_alike(results.of(work), alone)
    for name, value in alone["weights"].items():
        assert torch.equal(value == 0, results.of(work)[0]["weights"][name] == 0)


def test_pruned_channels_are_gone(results: Results) -> None:
    assert results.of(prune)[0]["weights"]["0.weight"].shape == (4, 4)


def test_the_model_is_wrapped_anew_after_an_edit(results: Results) -> None:
    assert results.of(cut_alike)[0]["is_wrapped"] == [False, True, True, False, *[True] * 4]


@pytest.mark.parametrize("work", [spoil_and_edit, spoil_and_save])
def test_a_parameter_that_differs_is_named(work: Any, results: Results) -> None:
    for message in results.of(work):
        assert message.startswith("DivergedRanksError: The parameter '4.bias' has other values")
        assert "rank 0 and rank 1" in message


@pytest.mark.parametrize("work", [cut_otherwise, cut_on_one])
def test_a_shape_that_differs_is_named(work: Any, results: Results) -> None:
    for message in results.of(work):
        assert message.startswith("DivergedRanksError: The parameter '0.weight' is not the same")
        assert "(3, 4) of torch.float32 in rank 1" in message


def test_models_that_are_built_otherwise_are_refused(results: Results) -> None:
    for message in results.of(build_otherwise):
        assert "'0.weight'" in message
        assert "(2, 4) of torch.float32 in rank 0, (3, 4) of torch.float32 in rank 1" in message


def test_a_loss_that_is_no_number_in_one_process_ends_all(results: Results) -> None:
    first, second = results.of(diverge)
    assert second == ["DivergedError: no number"] * 4
    assert first == ["DivergedError: Rank 1 failed: no number"] * 4


def test_an_evaluation_that_fails_ends_all(results: Results) -> None:
    first, second = results.of(fail_to_evaluate)
    assert first == "ZeroDivisionError: no samples"
    assert second == "RankError: Rank 0 failed: ZeroDivisionError: no samples"


def test_two_processes_go_on_from_what_one_wrote_within_an_epoch(
    results: Results, straight: dict[str, Any]
) -> None:
    assert_alike(results.of(resume_two), straight)


def test_one_process_goes_on_from_what_two_wrote_within_an_epoch(
    results: Results, folder: Path, straight: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copy(folder / "stop_two" / "run0" / LATEST, tmp_path)
    assert not (folder / "stop_two" / "run1").exists()
    two = finish(tmp_path)
    for name, value in straight["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=0, atol=1e-6)
    for mine, other in zip(two["losses"], straight["losses"], strict=True):
        assert mine == pytest.approx(other, abs=1e-6)
    assert two["clock"] == straight["clock"]


def test_a_checkpoint_of_two_is_that_of_one(results: Results, folder: Path) -> None:
    two = read_checkpoint(folder / "stop_two" / "run0" / LATEST)
    one = read_checkpoint(folder / "one" / LATEST)
    assert two["structure"] == one["structure"]
    assert two["clock"]["batch"] == one["clock"]["batch"] == 6
    assert [len(two["ranks"]), len(one["ranks"])] == [2, 1]
