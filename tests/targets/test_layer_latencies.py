from __future__ import annotations

import json
import logging
import multiprocessing
from pathlib import Path

import pytest

from compressor.targets import layer_latencies
from compressor.targets.layer_latencies import LayerLatencies, machine_path


class Measurements:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> float:
        self.count += 1
        return 1.5


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_layer_is_measured_once(on_disk: bool, tmp_path: Path) -> None:
    measure, path = Measurements(), tmp_path / "run" / "latencies.jsonl"
    table = LayerLatencies(path if on_disk else None)
    assert [table.get("a", measure), table.get("a", measure), table.get("b", measure)] == [1.5] * 3
    assert measure.count == 2
    assert path.exists() == on_disk


def test_another_process_reads_what_one_has_measured(tmp_path: Path) -> None:
    measure, path = Measurements(), tmp_path / "latencies.jsonl"
    LayerLatencies(path).get("a", measure)
    assert LayerLatencies(path).get("a", measure) == 1.5
    assert measure.count == 1


@pytest.mark.parametrize("spoil", ["machine", "empty", "other"])
def test_a_file_of_another_machine_or_of_another_kind_is_started_anew(
    spoil: str, tmp_path: Path
) -> None:
    measure, path = Measurements(), tmp_path / "latencies.jsonl"
    LayerLatencies(path).get("a", measure)
    text = path.read_text()
    machine = text.replace('"measured_on": {', '"measured_on": {"cpu": "another", ', 1)
    path.write_text({"machine": machine, "empty": "", "other": "[]"}[spoil])
    LayerLatencies(path).get("a", measure)
    assert measure.count == 2
    assert path.read_text() == text


@pytest.mark.parametrize("rest", ['["b", ', '["b", "?"]\n', "\x00\n", '{"b": 1.0}\n'])
def test_a_line_that_cannot_be_read_loses_only_itself(rest: str, tmp_path: Path) -> None:
    measure, path = Measurements(), tmp_path / "latencies.jsonl"
    LayerLatencies(path).get("a", measure)
    with path.open("a") as file:
        file.write(rest)
    LayerLatencies(path).get("b", measure)
    table = LayerLatencies(path)
    assert [table.get("a", measure), table.get("b", measure)] == [1.5, 1.5]
    assert measure.count == 2


def test_processes_that_measure_at_the_same_time_keep_what_each_has_found(tmp_path: Path) -> None:
    path = tmp_path / "latencies.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=measure_many, args=(path, name)) for name in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    entries = dict(json.loads(line) for line in path.read_text().splitlines()[1:])
    assert entries == {f"{name}{i}": float(i) for name in "ab" for i in range(20)}


def measure_many(path: Path, name: str) -> None:
    table = LayerLatencies(path)
    for i in range(20):
        table.get(f"{name}{i}", lambda i=i: float(i))


def test_what_another_process_found_meanwhile_is_not_measured_again(tmp_path: Path) -> None:
    measure, path = Measurements(), tmp_path / "latencies.jsonl"
    table = LayerLatencies(path)
    table.get("a", measure)
    LayerLatencies(path).get("b", lambda: 2.5)
    table.get("c", measure)
    assert table.get("b", measure) == 2.5
    assert measure.count == 2


def test_a_table_that_cannot_be_written_is_kept_in_memory_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    table = LayerLatencies(tmp_path / "file" / "latencies.jsonl")
    with caplog.at_level(logging.WARNING, logger="compressor"):
        assert [table.get("a", lambda: 1.0), table.get("b", lambda: 2.0)] == [1.0, 2.0]
        assert table.get("a", lambda: 3.0) == 1.0
    (line,) = caplog.messages
    assert "COMPRESSOR_CACHE" in line


def test_each_machine_has_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path))
    ours = machine_path()
    assert ours == machine_path()
    assert tmp_path in ours.parents
    monkeypatch.setattr(layer_latencies, "describe_machine", lambda: {"cpu": "another"})
    assert machine_path() != ours


def test_the_cache_is_where_the_platform_keeps_such_things(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPRESSOR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert Path("/xdg/compressor") in machine_path().parents
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert Path("/home/someone/.cache/compressor") in machine_path().parents
