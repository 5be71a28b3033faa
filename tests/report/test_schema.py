"""result.json is what its schema says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import compressor.report
from compressor.engine import Engine
from compressor.result import SCHEMA_VERSION, Plan, Result
from tests.fakes import LAYERS, FakeBench, FakeFramework
from tests.report.results import full_result

SCHEMA = json.loads((Path(compressor.report.__file__).parent / "result.schema.json").read_text())


def check(values: Any) -> None:
    """Valid, and every key of every object is described."""
    strict = json.loads(json.dumps(SCHEMA))
    for part in (strict, *strict["$defs"].values()):
        part["additionalProperties"] = False
    jsonschema.validate(values, strict, cls=jsonschema.Draft202012Validator)


def through_json(result: Result) -> Any:
    return json.loads(json.dumps(result.to_json()))


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["schema_version"]["maximum"] == SCHEMA_VERSION


def test_a_result_with_everything_is_valid_and_survives_json() -> None:
    values = through_json(full_result())
    check(values)
    assert through_json(Result.from_json(values)) == values


def test_a_result_without_anything_is_valid() -> None:
    empty = replace(
        full_result(), variants=[], frontier=[], damages=(), layers=(), frozen=(), decisions=()
    )
    check(through_json(empty))


def test_what_is_missing_is_found() -> None:
    values = through_json(full_result())
    del values["certificate"]["looks"]
    with pytest.raises(jsonschema.ValidationError, match="'looks' is a required property"):
        check(values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run on fakes."""
    path = tmp_path_factory.mktemp("run")
    config = {"optimization": "macs", "run_dir": str(path), "progress": False}
    Engine(FakeFramework(), {"train": [0]}, model=None, config=config).run()
    return path


def test_what_a_run_writes_is_valid(folder: Path) -> None:
    values = json.loads((folder / "result.json").read_text())
    check(values)
    assert values["schema_version"] == SCHEMA_VERSION
    assert values["info"]["seed"] == 0


def test_a_run_writes_what_it_found_on_its_way(folder: Path) -> None:
    values = json.loads((folder / "result.json").read_text())
    removals = [each for each in values["damages"] if each["technique"] == "block_removal"]
    assert [each["site"] for each in removals] == list(LAYERS)
    # In `tests.fakes`: a tenth of damage for the first layer, and one MAC for each.
    assert [each["damage"] for each in removals] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert all(each["saved"] == {"macs": 1.0} for each in removals)
    gone = {row["name"] for row in values["layers"] if not row["compressed"]["macs"]}
    assert gone == {c["site"] for c in values["plan"] if c["technique"] == "block_removal"}
    assert values["frozen"][0]["site"] == "stem"
    chosen = next(r for r in values["variants"] if r["id"] == values["chosen"])
    assert chosen["plan"] == values["plan"]


def test_a_page_that_is_gone_is_written_anew_and_nothing_else_is_done(folder: Path) -> None:
    page = folder / "report.html"
    text = page.read_text()
    page.unlink()
    framework = FakeFramework()
    config = {"optimization": "macs", "run_dir": str(folder), "progress": False}
    Engine(framework, {"train": [0]}, model=None, config=config).run()
    assert page.read_text() == text
    assert framework.bench is not None
    assert not set(framework.bench.calls) & {"build", "export"}


def test_a_crash_before_the_page_is_written_leaves_none_of_an_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def engine(delta: float) -> Engine:
        config = {"optimization": "macs", "run_dir": str(tmp_path), "delta": delta}
        return Engine(FakeFramework(), {"train": [0]}, model=None, config=config)

    def crash(values: Any, path: Path) -> None:
        raise KeyboardInterrupt

    engine(1.0).run()
    earlier = (tmp_path / "report.html").read_text()
    with monkeypatch.context() as patch:
        patch.setattr("compressor.search.finished.write_report", crash)
        with pytest.raises(KeyboardInterrupt):
            engine(8.0).run()
    assert not (tmp_path / "report.html").exists()
    engine(8.0).run()
    assert (tmp_path / "report.html").read_text() != earlier


def test_an_outcome_without_numbers_is_null_in_the_file_and_a_number_in_the_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The map has 1e6 for it, which the allocation can add up; people read that it is hopeless."""
    measured = FakeBench.damage_of
    first, *_, last = LAYERS

    def damage_of(self: FakeBench, plan: Plan, base: Any = None) -> float:
        sites = {choice.site for choice in plan}
        return math.nan if sites == {last} else measured(self, plan, base)

    monkeypatch.setattr(FakeBench, "damage_of", damage_of)
    config = {"optimization": "macs", "run_dir": str(tmp_path), "progress": False}
    Engine(FakeFramework(), {"train": [0]}, model=None, config=config).run()
    values = json.loads((tmp_path / "result.json").read_text())
    check(values)
    removals = [each for each in values["damages"] if each["technique"] == "block_removal"]
    found = {each["site"]: each["damage"] for each in removals}
    assert found[last] is None
    assert found[first] == pytest.approx(0.1)
    assert "1000000.0" in (tmp_path / "damage.json").read_text()
