from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from compressor.errors import ConfigError
from compressor.training import Callback, recipes
from compressor.training.recipes import Lane, Recipe, StdoutLogger, recipe
from tests.training.recipes.helpers import Spy


def make() -> Recipe:
    return recipe(lambda batch: None, [1, 2])


class Misspelt:
    def on_batch_start(self, state: dict[str, Any]) -> None: ...

    def on_batch_stop(self, state: dict[str, Any]) -> None: ...


def test_a_misspelt_hook_is_an_error_when_it_is_added() -> None:
    loop = make()
    with pytest.raises(
        ConfigError, match=r"Misspelt\.on_batch_stop.*Did you mean 'on_batch_start'"
    ):
        loop.callbacks.add_callbacks([Spy(), Misspelt()])
    assert loop.callbacks.all == ()


def test_an_object_without_hooks_is_an_error() -> None:
    with pytest.raises(ConfigError, match="object has no hook"):
        make().callbacks.add_callbacks([object()])


def test_a_class_in_place_of_an_instance_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"Spy is a class. Give an instance: Spy\("):
        make().callbacks.add_callbacks([Spy])


def test_a_callback_of_a_trainer_is_an_error() -> None:
    class Watching(Callback):
        pass

    with pytest.raises(ConfigError, match="Watching is for a Trainer"):
        make().callbacks.add_callbacks([Watching()])


def test_one_hook_is_enough() -> None:
    class OnlyEnd:
        ended = 0

        def on_epoch_end(self, state: dict[str, Any]) -> None:
            self.ended += 1

    loop, callback = make(), OnlyEnd()
    loop.callbacks.add_callbacks([callback])
    loop.run(3)
    assert callback.ended == 3


def test_callbacks_run_by_lane_and_then_as_they_were_added() -> None:
    order: list[str] = []

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        def on_batch_end(self, state: dict[str, Any]) -> None:
            order.append(self.name)

    class Saving(Named):
        lane = Lane.SAVE

    class Testing(Named):
        lane = Lane.TEST

    loop = recipe(lambda batch: None, [1])
    loop.callbacks.add_callbacks([Saving("save"), Testing("test"), Named("a")])
    loop.callbacks.add_epilogues([Named("epilogue")])
    loop.callbacks.add_prologues([Named("prologue")])
    loop.callbacks.add_callbacks([Named("b")])
    loop.run(1)
    assert order == ["prologue", "a", "b", "test", "epilogue", "save"]


def test_a_lane_that_is_none_is_an_error_and_nothing_is_added() -> None:
    class Odd(Spy):
        lane = "last"

    loop = make()
    with pytest.raises(ConfigError, match=r"Odd\.lane is 'last'\. Write one of Lane"):
        loop.callbacks.add_callbacks([Spy(), Odd()])
    assert loop.callbacks.all == ()


def test_our_loggers_come_after_what_they_show_in_whatever_order_they_are_added() -> None:
    loop, spy = make(), Spy()
    logger = StdoutLogger()
    loop.callbacks.add_callbacks([logger, spy])
    assert loop.callbacks.all == (spy, logger)


def test_one_callback_may_be_added_without_a_list() -> None:
    for add in ("add_callback", "add_callbacks", "add_prologues", "add_epilogues"):
        loop, spy = make(), Spy()
        getattr(loop.callbacks, add)(spy)
        loop.run(1)
        assert len(spy.seen) == 6


def test_a_callback_that_can_be_iterated_is_one() -> None:
    class Notes(list[int]):
        def on_batch_end(self, state: dict[str, Any]) -> None:
            self.append(state["iters"])

    loop, notes = make(), Notes()
    loop.callbacks.add_callbacks(notes)
    loop.run(1)
    assert notes == [1, 2]


def test_who_looks_for_a_counter_is_told_that_counting_is_built_in() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Counter'\. Counting is built in"):
        _ = recipes.Counter


class Counting:
    def __init__(self) -> None:
        self.count = 0

    def on_batch_end(self, state: dict[str, Any]) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.count = saved["count"]


def test_two_callbacks_of_one_class_both_keep_their_state() -> None:
    first, one, two = make(), Counting(), Counting()
    two.count = 10
    first.callbacks.add_callbacks([one, two])
    first.run(1)
    second, third, fourth = make(), Counting(), Counting()
    second.callbacks.add_callbacks([third, fourth])
    second.load_state_dict(first.state_dict())
    assert (third.count, fourth.count) == (2, 12)


def test_metrics_are_restored_where_they_are_numbers_or_words() -> None:
    first, second = make(), make()
    first.state["metrics"].update({"loss": 0.5, "name": "a", "table": object()})
    second.load_state_dict(first.state_dict())
    assert second.state["metrics"] == {"loss": 0.5, "name": "a"}
