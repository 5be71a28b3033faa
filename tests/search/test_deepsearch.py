"""Deepsearch asks what may be better, the same again after a crash, and leaves its trials."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import sqlite3
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState
from sqlalchemy import Engine, event

import compressor.search.deepsearch as deepsearch_module
from compressor.errors import MissingDependencyError, StudyError
from compressor.result import Choice, Cost, Plan, VariantRecord
from compressor.search.deepsearch import IN_TWO_STEPS, DeepSearch, Question
from compressor.search.goal import Goal, frontier
from compressor.search.study import Study
from compressor.search.tuning import Tuning

GOAL = Goal("accuracy", 90.0, 1.0, True, "latency_ms")
CENTER = 0.4


def record(
    name: str,
    *,
    damage: float = CENTER,
    drop: float = 0.8,
    latency_ms: float = 2.0,
    **other: Any,
) -> VariantRecord:
    plan = Plan((Choice("low_rank", name, {"rank": 4}),))
    values: dict[str, Any] = {
        "metrics": {"accuracy": GOAL.reference - drop},
        "cost": Cost(1, 1, 1000, latency_ms),
        "predicted": {"damage": damage},
        "epochs": 2,
        "seconds": 60.0,
    } | other
    return VariantRecord(name, plan, "done", **values)


def failed(name: str, reason: str = "the loss is nan") -> VariantRecord:
    return VariantRecord(name, Plan(), "failed", reason=reason)


def made_of(question: Question) -> VariantRecord:
    """A world with a best learning rate (0.5) and temperature (4), in which two steps help."""
    tuning = question.tuning
    temperature = 2.0 if tuning.temperature is None else tuning.temperature
    effect = 0.3 * math.log(tuning.lr_factor / 0.5) ** 2 + 0.2 * math.log(temperature / 4) ** 2
    effect -= 0.2 * (question.order == IN_TWO_STEPS)
    ratio = question.damage / CENTER
    return record(
        f"v{question.number}", drop=0.8 * math.exp(effect) * ratio, latency_ms=2 * ratio**-0.3
    )


def open_search(
    path: Path, known: Iterable[VariantRecord] = (), goal: Goal = GOAL, **other: Any
) -> DeepSearch:
    settings: dict[str, Any] = {"seed": 0, "center": CENTER, "importance": "taylor"} | other
    return DeepSearch(path, "compressor", goal, known=list(known), **settings)


def run(path: Path, count: int, known: Iterable[VariantRecord] = ()) -> list[Question]:
    """The questions of a search, answered by `made_of`."""
    questions = []
    with open_search(path, known) as search:
        for _ in range(count):
            questions.append(search.ask())
            search.tell(questions[-1], made_of(questions[-1]))
    return questions


def stored_study(path: Path) -> optuna.Study:
    """What Optuna itself reads in the file."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    (summary,) = optuna.get_all_study_summaries(storage)
    study = optuna.load_study(study_name=summary.study_name, storage=storage)
    trials, names = study.get_trials(), study.metric_names
    storage.remove_session()
    storage.engine.dispose()
    memory = optuna.create_study(directions=study.directions)
    memory.add_trials(trials)
    assert names is not None
    memory.set_user_attr("metrics", names)
    return memory


@pytest.fixture(autouse=True)
def _quick_and_quiet() -> Iterable[None]:
    """SQLite does not wait for the disk; what these tests do with Optuna says nothing."""

    def do_not_wait(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    event.listen(Engine, "connect", do_not_wait)
    yield
    event.remove(Engine, "connect", do_not_wait)
    optuna.logging.set_verbosity(verbosity)


def test_the_first_question_is_what_is_configured_at_the_center(tmp_path: Path) -> None:
    with open_search(tmp_path / "study.db") as search:
        assert search.ask() == Question(0, CENTER, "taylor", "at_once", Tuning())


def test_settings_with_drop_to_spare_are_tried_at_the_damage_that_uses_it(tmp_path: Path) -> None:
    with open_search(tmp_path / "study.db", [record("a", drop=0.5)]) as search:
        question = search.ask()
    assert (question.number, question.tuning) == (1, Tuning())
    assert question.damage == pytest.approx(0.97 * CENTER / 0.5)


def test_other_settings_are_tried_just_above_the_damage_that_held(tmp_path: Path) -> None:
    known = [record("a", drop=0.99), record("b", damage=0.6, drop=1.5)]
    with open_search(tmp_path / "study.db", known) as search:
        question = search.ask()
    assert question.tuning != Tuning()
    assert question.damage == pytest.approx(1.02 * CENTER)


def test_a_trial_may_drop_as_far_as_is_allowed(tmp_path: Path) -> None:
    known = [record("a", drop=2.0)]
    with open_search(tmp_path / "study.db", known, allowed=4.0) as search:
        assert search.ask().damage == pytest.approx(0.97 * CENTER * 2)


def test_a_finalist_or_tuned_variant_does_not_count_as_the_first_question(tmp_path: Path) -> None:
    known = [
        record("a", is_final=True),
        record("b", tuning={"lr_factor": 0.5}),
        record("c", base="a"),
        record("d", epochs=0),
    ]
    with open_search(tmp_path / "study.db", known) as search:
        assert search.ask() == Question(4, CENTER, "taylor", "at_once", Tuning())


def test_a_question_stays_until_it_is_answered(tmp_path: Path) -> None:
    with open_search(tmp_path / "study.db", [record("a")]) as search:
        assert search.ask() == search.ask()


@pytest.mark.slow
def test_questions_are_in_range_and_find_cheaper_variants_within_delta(tmp_path: Path) -> None:
    questions = run(tmp_path / "study.db", 12)
    for question in questions:
        assert 0.5 <= question.damage / CENTER <= 4
        assert 0.2 <= question.tuning.lr_factor <= 3
    variants = [made_of(question) for question in questions]
    costs = [v.cost.latency_ms for v in variants if GOAL.holds(v) and v.cost is not None]
    best = 2 * (math.exp(0.2) / 0.8) ** -0.3  # at the damage where 0.8 * exp(-0.2) * ratio is 1
    assert min(costs) < 2 - 0.5 * (2 - best)  # half of the way there; the center costs 2


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["asked", "half told", "told"])
def test_after_a_crash_the_same_is_asked_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    known = [record("a", drop=0.5), record("b", damage=0.6, drop=1.2), failed("c")]
    undisturbed = run(tmp_path / "undisturbed.db", 7, known)
    path = tmp_path / "study.db"
    run(path, 5, known)
    with open_search(path, known) as search:
        for asked in undisturbed[:5]:
            assert search.ask() == asked
            search.tell(asked, made_of(asked))
        question = search.ask()
        if moment == "half told":
            with monkeypatch.context() as patch:
                patch.setattr(optuna.Study, "tell", _killed)
                with pytest.raises(KeyboardInterrupt):
                    search.tell(question, made_of(question))
        elif moment == "told":
            search.tell(question, made_of(question))
    assert run(path, 7, known) == undisturbed
    states = [trial.state for trial in stored_study(path).trials]
    assert states == [TrialState.COMPLETE] * 2 + [TrialState.FAIL] + [TrialState.COMPLETE] * 7
    told, expected = (
        [(t.params, t.values, t.constraints, t.user_attrs) for t in stored_study(file).trials]
        for file in (path, tmp_path / "undisturbed.db")
    )
    assert told == expected


def _killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_the_seed_decides_what_is_drawn(tmp_path: Path) -> None:
    asked = []
    for seed in (0, 0, 1):
        path = tmp_path / f"{len(asked)}.db"
        with open_search(path, [record("a", drop=0.99)], seed=seed) as search:
            asked.append(search.ask())
    assert asked[0] == asked[1] != asked[2]


@pytest.mark.slow
def test_nobody_elses_randomness_or_verbosity_is_touched(tmp_path: Path) -> None:
    def state() -> tuple[Any, ...]:
        numbers = np.random.get_state()[1]
        assert not isinstance(numbers, str)
        level = optuna.logging.get_verbosity()
        return random.getstate(), numbers.tolist(), torch.get_rng_state().tolist(), level

    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    before = state()
    run(tmp_path / "study.db", 7)
    assert state() == before


@pytest.mark.slow
def test_what_failed_is_kept_away_from(tmp_path: Path) -> None:
    with open_search(tmp_path / "study.db") as search:
        orders = []
        for _ in range(14):
            question = search.ask()
            orders.append(question.order)
            fails = question.order == IN_TWO_STEPS
            search.tell(question, failed("x") if fails else made_of(question))
    assert IN_TWO_STEPS in orders[:8]
    assert orders[8:].count(IN_TWO_STEPS) <= 1


@pytest.mark.slow
def test_it_goes_on_if_everything_fails(tmp_path: Path) -> None:
    with open_search(tmp_path / "study.db") as search:
        for number in range(7):
            assert search.ask().number == number
            search.tell(search.ask(), failed("x"))


def test_failed_variants_are_failed_trials_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    with open_search(path, [failed("a", "no memory")]) as search:
        search.tell(search.ask(), record("b", drop=math.nan))
        search.tell(search.ask(), failed("c", "the loss is nan"))
    trials = stored_study(path).trials
    assert [trial.state for trial in trials] == [TrialState.FAIL] * 3
    reasons = [trial.user_attrs["reason"] for trial in trials]
    assert reasons == ["no memory", "accuracy is nan", "the loss is nan"]


def test_the_file_holds_the_whole_run_and_its_frontier(tmp_path: Path) -> None:
    known = [
        record("cheap", drop=0.9, latency_ms=1.0),
        record("beaten", drop=0.95, latency_ms=1.5),
        record("numbers", damage=0.0, drop=0.1, latency_ms=3.0, epochs=0),
        record("far", damage=5.0, drop=7.0, latency_ms=0.5),
        record("final", drop=0.4, latency_ms=1.6, is_final=True),
    ]
    path = tmp_path / "study.db"
    with open_search(path, known) as search:
        question = search.ask()
        search.tell(question, record("asked", drop=0.7, latency_ms=1.2))
    study = stored_study(path)
    assert study.user_attrs["metrics"] == ["latency_ms", "drop of accuracy"]
    trials = {trial.user_attrs["variant"]: trial for trial in study.trials}
    assert list(trials) == [*(r.id for r in known), "asked"]
    assert trials["final"].values == pytest.approx([1.6, 0.4])
    assert trials["far"].params["damage"] == 5.0
    assert trials["numbers"].params == {}
    assert trials["asked"].params["lr_factor"] == question.tuning.lr_factor
    assert trials["cheap"].user_attrs["plan"] == "1 low_rank"
    assert trials["cheap"].duration is not None
    assert trials["cheap"].duration.total_seconds() == 60
    every = [*known, record("asked", drop=0.7, latency_ms=1.2)]
    ours = {r.id for r in frontier(GOAL, every) if GOAL.holds(r)}
    assert {trial.user_attrs["variant"] for trial in study.best_trials} == ours


def test_limits_and_further_resources_are_constraints_and_objectives(tmp_path: Path) -> None:
    goal = Goal(
        "accuracy",
        90.0,
        1.0,
        True,
        "latency_ms",
        limits=(("size_bytes", 800.0),),
        also=("macs",),
        weights=(0.5, 0.1),
    )
    path = tmp_path / "study.db"
    with open_search(path, [record("large"), record("ok", cost=Cost(1, 7, 700, 3.0))], goal):
        pass
    study = stored_study(path)
    assert study.user_attrs["metrics"] == ["latency_ms", "macs", "drop of accuracy"]
    bounded = [list(trial.constraints.values()) for trial in study.trials]
    assert bounded == [pytest.approx([-0.2, 200.0]), pytest.approx([-0.2, -100.0])]
    assert [t.values for t in study.best_trials] == [pytest.approx([3.0, 7.0, 0.8])]


def test_our_study_is_open_on_the_same_file_all_the_while(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    with Study(path) as study:
        with open_search(path, [record("a")]) as search:
            study.tell(record("a"))
            question = search.ask()
            study.set_fact("question", question.number)
            search.tell(question, record("b"))
            study.tell(record("b"))
        assert [r.id for r in study.variants()] == ["a", "b"]
        assert study.fact("question") == 1
    assert len(stored_study(path).trials) == 2


def test_the_file_is_let_go_of(tmp_path: Path) -> None:
    path = tmp_path / "study.db"

    def opened() -> int:
        links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        return sum(link.is_symlink() and link.readlink() == path for link in links)

    with open_search(path) as search:
        search.ask()
        assert opened() > 0
    assert opened() == 0


def test_optunas_dashboard_shows_the_file(tmp_path: Path) -> None:
    import optuna_dashboard

    path = tmp_path / "study.db"
    with open_search(path, [record("a")]) as search:
        question = search.ask()
        search.tell(question, record("b", drop=1.5))
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    app = optuna_dashboard.wsgi(storage)
    (listed,) = get(app, "/api/studies")["study_summaries"]
    assert listed["study_name"].startswith("compressor, delta 1")
    study = get(app, f"/api/studies/{listed['study_id']}")
    storage.remove_session()
    storage.engine.dispose()
    assert study["objective_names"] == ["latency_ms", "drop of accuracy"]
    assert study["directions"] == ["minimize", "minimize"]
    values, bounded = (
        [trial[key] for trial in study["trials"]] for key in ("values", "constraints")
    )
    assert values == [pytest.approx([2.0, 0.8]), pytest.approx([2.0, 1.5])]
    assert bounded == [[pytest.approx(-0.2)], [pytest.approx(0.5)]]


def get(app: Any, path: str) -> Any:
    """The JSON that a WSGI application answers with."""
    from wsgiref.util import setup_testing_defaults

    environment: dict[str, Any] = {"PATH_INFO": path}
    setup_testing_defaults(environment)
    statuses: list[str] = []
    body = b"".join(app(environment, lambda status, *_: statuses.append(status)))
    assert statuses == ["200 OK"], (statuses, body)
    return json.loads(body)


def test_a_file_that_is_none_of_ours_is_a_study_error(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    path.write_bytes(b"not a database, but long enough to be read as one" * 20)
    with pytest.raises(StudyError, match=r"study\.db could not be read or written"):
        open_search(path)


def test_without_optuna_the_module_loads_and_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    source = deepsearch_module.__file__
    assert source is not None
    spec = importlib.util.spec_from_file_location("deepsearch_copy", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "deepsearch_copy", module)
    spec.loader.exec_module(module)
    with pytest.raises(MissingDependencyError, match=r'pip install "compressor\[deepsearch\]"'):
        module.require_optuna()
    with pytest.raises(MissingDependencyError, match=r"compressor\[deepsearch\]"):
        open_search(tmp_path / "study.db")
    assert not (tmp_path / "study.db").exists()
