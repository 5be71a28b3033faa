from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compressor.errors import ConfigError
from compressor.training import Algorithm, Callback, Duration, Event, State, Window
from compressor.training.algorithms import GradientClipping
from compressor.training.dispatch import Dispatch
from tests.training.helpers import make_trainer


class Noting(Algorithm):
    events = frozenset({Event.BATCH_START, Event.FIT_START})

    def __init__(self, key: str, log: list[str], **options: object) -> None:
        self.key, self.log = key, log
        vars(self).update(options)

    def on(self, event: Event, state: State) -> None:
        self.log.append(self.key)


class Watching(Callback):
    events = frozenset({Event.BATCH_START})

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def on(self, event: Event, state: State) -> None:
        self.log.append("callback")


def make_state() -> State:
    return State(nn.Identity(), Duration.parse("10ba"), torch.device("cpu"))


def order_of(*algorithms: Algorithm) -> list[str]:
    return [algorithm.key for algorithm in Dispatch(algorithms, ()).algorithms]


def test_algorithms_run_in_the_given_order_and_callbacks_after_them() -> None:
    log: list[str] = []
    Dispatch([Noting("b", log), Noting("a", log)], [Watching(log)]).fire(
        Event.BATCH_START, make_state()
    )
    assert log == ["b", "a", "callback"]


def test_before_and_after_win_over_the_given_order_and_change_no_more() -> None:
    a, b, c = (Noting(key, []) for key in "abc")
    c.before = ["a"]
    assert order_of(a, b, c) == ["b", "c", "a"]
    a, b, c = (Noting(key, []) for key in "abc")
    a.after = ["c", "somebody else"]
    assert order_of(a, b, c) == ["b", "c", "a"]


def test_a_circle_names_who_is_in_it() -> None:
    with pytest.raises(ConfigError, match="'a', 'b' each want to come before the other"):
        Dispatch([Noting("a", [], before=["b"]), Noting("b", [], before=["a"])], ())


def test_two_of_one_key_are_refused_because_their_state_would_collide() -> None:
    with pytest.raises(ConfigError, match="2 algorithms or callbacks have the key 'Watching'"):
        Dispatch((), [Watching([]), Watching([])])


def test_events_are_found_by_name_and_a_misspelt_one_is_an_error() -> None:
    log: list[str] = []
    Dispatch([Noting("a", log, events=["batch_end"])], ()).fire(Event.BATCH_END, make_state())
    assert log == ["a"]
    with pytest.raises(ConfigError, match=r"'batch_ends'\. Did you mean 'batch_end'"):
        Dispatch([Noting("a", log, events=["batch_ends"])], ())


def test_a_window_leaves_out_batches_but_not_the_start_of_the_fit() -> None:
    log: list[str] = []
    dispatch = Dispatch([Noting("a", log, window=Window.parse("5ba", "6ba"))], ())
    state = make_state()
    for batch in (0, 5, 6):
        state.clock.batch = batch
        dispatch.fire(Event.BATCH_START, state)
    assert len(log) == 1
    dispatch.fire(Event.FIT_START, state)
    assert len(log) == 2


def test_a_key_is_the_class_name_unless_set() -> None:
    assert Watching([]).key == "Watching"


def test_a_misspelt_key_in_the_order_names_the_nearest() -> None:
    clipping = GradientClipping()
    clipping.after = ("AnotherPackage",)
    Dispatch([clipping], [])  # who is not there does not matter
    clipping.after = ("GradualSparsty",)
    with pytest.raises(ConfigError, match=r"'GradualSparsty'.*Did you mean 'GradualSparsity'"):
        Dispatch([clipping], [])


def test_a_conflict_is_refused_in_either_order_and_with_classes_that_derive() -> None:
    class Mine(GradientClipping):
        pass

    clipping, other = Mine(), Noting("other", [])
    other.conflicts = {"GradientClipping": "cannot be. Leave one out."}
    for given in ([clipping, other], [other, clipping]):
        names = " and ".join(repr(each.key) for each in given)
        with pytest.raises(ConfigError, match=rf"^{names} cannot be\. Leave one out\.$"):
            Dispatch(given, [])
    other.conflicts = {"GradientCliping": "cannot be."}
    with pytest.raises(ConfigError, match=r"not beside it.*Did you mean 'GradientClipping'"):
        Dispatch([other], [])


def test_who_has_entered_a_pair_leaves_it_when_the_window_has_closed() -> None:
    for window, expected in ((("0dur", "0.5dur"), 4), (("0.5dur", "1dur"), 4)):
        seen: list[Event] = []

        class Pair(Algorithm):
            events = frozenset({Event.BATCH_START, Event.BATCH_END})
            pairs = (("batch_start", Event.BATCH_END),)  # type: ignore[assignment]

            def on(self, event: Event, state: State, seen: list[Event] = seen) -> None:
                seen.append(event)

        pair = Pair()
        pair.window = Window.parse(*window)
        make_trainer(algorithms=[pair]).fit()
        assert seen == expected * [Event.BATCH_START, Event.BATCH_END]


def test_a_pair_that_is_not_listened_to_is_refused() -> None:
    class Pair(Algorithm):
        events = frozenset({Event.EVAL_START})
        pairs = ((Event.EVAL_START, Event.EVAL_END),)

        def on(self, event: Event, state: State) -> None:
            pass

    with pytest.raises(ConfigError, match="does not listen to both"):
        Dispatch([Pair()], [])


class Old(Callback):
    def batch_end(self, state: State) -> None:
        pass


class Matching(Algorithm):
    def match(self, event: Event, state: State) -> bool:
        return True


@pytest.mark.parametrize(
    ("algorithms", "callbacks", "message"),
    [
        (GradientClipping(), [], r"algorithms=GradientClipping\(\.\.\.\) is no list"),
        ([GradientClipping], [], "is a class. Give an instance"),
        ([Watching([])], [], "Watching in algorithms is no Algorithm"),
        ([], [GradientClipping()], "GradientClipping in callbacks is no Callback"),
        ([], [Old()], "Old listens to nothing.*in place of the method batch_end"),
        ([Matching()], [], "Matching listens to nothing"),
    ],
)
def test_what_could_never_be_called_is_refused(
    algorithms: Any, callbacks: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Dispatch(algorithms, callbacks)


def test_an_order_names_keys_and_classes_and_what_they_derive_from() -> None:
    class Mine(GradientClipping):
        pass

    renamed, first = Mine(), Noting("first", [])
    renamed.key = "clip"
    first.after = ("GradientClipping",)
    assert Dispatch([first, renamed], []).algorithms == (renamed, first)
