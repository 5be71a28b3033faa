"""`compressor run` and `resume` on a job without networks: how they begin, end and go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Invoke

FAKE = "tests.cli.tiny_job:make_fake"


def test_an_interrupted_run_is_resumed_by_its_folder_to_the_same_end(
    invoke: Invoke, tmp_path: Path
) -> None:
    run_dir, mark = tmp_path / "run", tmp_path / "mark"
    stopped = invoke("run", FAKE, "--set", f"arguments.mark={mark}", "--run-dir", run_dir)
    assert stopped.exit_code == 130
    assert stopped.stderr.endswith(f"go on with: compressor resume {run_dir}\n")
    assert not (run_dir / "result.json").exists()
    resumed = invoke("resume", run_dir, "--json")
    assert resumed.exit_code == 0, resumed.stderr
    whole = invoke("run", FAKE, "--run-dir", tmp_path / "whole", "--json")
    ends = [json.loads(done.stdout) for done in (resumed, whole)]
    assert ends[0]["plan"] == ends[1]["plan"]
    assert ends[0]["certificate"]["metric"] == ends[1]["certificate"]["metric"]


def test_a_finished_run_is_resumed_from_anywhere_and_where_its_folder_was_moved(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was exported and certified anew."""
    monkeypatch.chdir(tmp_path)
    first = invoke("run", FAKE, "--run-dir", "one", "--json")
    assert first.exit_code == 0, first.stderr
    made = (tmp_path / "one" / "exports" / "model" / "model.json").stat().st_mtime_ns
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for folder in (tmp_path / "one", tmp_path / "moved"):
        if not folder.exists():
            (tmp_path / "one").rename(folder)
        done = invoke("resume", folder, "--json")
        assert done.exit_code == 0, done.stderr
        printed = json.loads(done.stdout)
        file = Path(printed["artifacts"]["model_dir"], "model.json")
        assert file.parents[2] == folder
        assert file.stat().st_mtime_ns == made
        assert printed["certificate"] == json.loads(first.stdout)["certificate"]
    page = invoke("report", folder)
    assert page.exit_code == 0, page.stderr
    assert str(folder / "exports") in (folder / "report.html").read_text()
    assert str(tmp_path / "one" / "exports") not in (folder / "report.html").read_text()


def test_a_page_that_cannot_be_written_is_one_line(invoke: Invoke, tmp_path: Path) -> None:
    assert invoke("run", FAKE, "--run-dir", tmp_path, "-q").exit_code == 0
    (tmp_path / "a file").touch()
    page = tmp_path / "a file" / "page.html"
    done = invoke("report", tmp_path, "--to", page)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"Error: The page {page} cannot be written: ")
    assert done.stderr.count("\n") == 1


def test_a_run_whose_reference_is_the_answer_exits_3_and_says_why(
    invoke: Invoke, tmp_path: Path
) -> None:
    words = ["--set", "arguments.delta=0.001", "--set", "arguments.epochs=0"]
    done = invoke("run", FAKE, *words, "--run-dir", tmp_path)
    assert done.exit_code == 3, done.stderr
    assert "The reference itself is the answer: none of" in " ".join(done.stdout.split())
    assert invoke("resume", tmp_path).exit_code == 3


def test_a_dry_run_does_every_step_and_keeps_nothing(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("run", FAKE, "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("Every step works on two batches")
    assert json.loads(invoke("run", FAKE, "--dry-run", "--json").stdout)["dry_run"] is True
    assert list(tmp_path.iterdir()) == []


def test_where_there_is_no_terminal_plain_lines_say_how_the_run_stands(
    invoke: Invoke, tmp_path: Path
) -> None:
    done = invoke("run", FAKE, "--run-dir", tmp_path)
    assert done.exit_code == 0, done.stderr
    lines = done.stderr.splitlines()
    standing = [line for line in lines if line.startswith("search, variant ")]
    assert len(standing) >= 3
    assert "trial 1 of 4" in done.stderr
    assert "accuracy: reference 90, bound 87, last" in standing[-1]
    assert "x fewer MACs" in standing[-1]
    assert "\x1b" not in done.stderr
    assert done.stdout.endswith(f"Everything is in {tmp_path}.\n")
    assert f"Open {tmp_path / 'report.html'} in a browser" in done.stdout


def test_a_quiet_run_says_nothing_but_its_end(invoke: Invoke, tmp_path: Path) -> None:
    done = invoke("run", FAKE, "--run-dir", tmp_path, "--quiet")
    assert done.exit_code == 0
    assert done.stderr == ""
    assert "within 3.0" in done.stdout.splitlines()[0]


def test_processes_but_the_first_are_silent(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    done = invoke("run", FAKE, "--run-dir", tmp_path)
    assert done.exit_code == 0
    assert (done.stdout, done.stderr) == ("", "")
    assert not (tmp_path / "job.json").exists()


def test_what_a_factory_prints_does_not_mix_with_json(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "loud_job.py").write_text(
        "from tests.cli.tiny_job import make_fake\n"
        "def make(run_dir):\n"
        "    print('loading')\n"
        "    return make_fake(run_dir)\n"
    )
    done = invoke("run", f"{tmp_path / 'loud_job.py'}:make", "--run-dir", tmp_path / "r", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["run_dir"] == str(tmp_path / "r")
    assert "loading" in done.stderr
