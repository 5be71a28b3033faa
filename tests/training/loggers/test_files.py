from __future__ import annotations

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from compressor.errors import CheckpointError, MetricError
from compressor.training import Callback, Event, State
from compressor.training.loggers import (
    InMemoryLogger,
    JsonLinesLogger,
    MLflowLogger,
    TensorBoardLogger,
    read_json_lines,
)
from compressor.training.loggers.mlflow import clean_name
from tests.training.helpers import accuracy, make_trainer
from tests.training.loggers.reading import event_accumulator, mlflow_run

# SQLAlchemy 2.1 about a line of MLflow 3.17
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")


def test_a_name_that_was_not_logged_names_those_that_were() -> None:
    logger = InMemoryLogger()
    logger.log({"train/loss": 1.0}, step=1)
    with pytest.raises(MetricError, match=r"'train/los' was logged\. Did you mean 'train/loss'"):
        logger.get("train/los")


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_a_line_is_strict_json_whatever_the_value(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    logger = JsonLinesLogger(path)
    logger.log_hyperparameters(
        {"lr": 0.1, "note": "größer\nals", "path": Path("x"), "inf": math.inf}
    )
    logger.log({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1}, step=3)
    lines = [json.loads(x, parse_constant=refuse) for x in path.read_text("utf-8").splitlines()]
    assert lines == [
        {
            "hyperparameters": {
                "lr": 0.1,
                "note": "größer\nals",
                "path": "x",
                "inf": "Infinity",
            }
        },
        {"step": 3, "metrics": {"a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 1.0}},
    ]
    back = read_json_lines(path)
    assert back.hyperparameters["note"] == "größer\nals"
    assert math.isnan(back.most_recent["a"])
    assert (back.most_recent["b"], back.most_recent["c"]) == (math.inf, -math.inf)


def test_a_new_training_moves_the_file_of_an_earlier_one_aside(tmp_path: Path) -> None:
    for value in (1.0, 2.0, 3.0):
        JsonLinesLogger(tmp_path / "log.jsonl").log({"loss": value}, step=1)
    files = ["log.1.jsonl", "log.2.jsonl", "log.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert [read_json_lines(tmp_path / f).most_recent["loss"] for f in files] == [1, 2, 3]


def test_what_a_crash_left_of_a_line_is_not_read_and_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    logger = JsonLinesLogger(path)
    logger.log({"loss": 1.0}, step=1)
    saved = logger.state_dict()
    for rest in (b'{"step": 2, "met', b'{"step": 2, "metrics": {"loss": 5.0}}\n{"st'):
        with path.open("ab") as file:
            file.write(rest)
        resumed = JsonLinesLogger(path)
        resumed.load_state_dict(saved)
        resumed.log({"loss": 2.0}, step=2)
        assert read_json_lines(path).get("loss") == ([1, 2], [1.0, 2.0])


def test_a_file_that_is_shorter_than_the_checkpoint_says_keeps_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    logger = JsonLinesLogger(path)
    for step in (1, 2):
        logger.log({"loss": 1.0}, step)
    saved = logger.state_dict()
    os.truncate(path, saved["size_bytes"] - 5)  # the power failed
    resumed = JsonLinesLogger(path)
    resumed.load_state_dict(saved)
    resumed.log({"loss": 1.0}, step=3)
    assert read_json_lines(path).get("loss")[0] == [1, 3]


@pytest.mark.parametrize("line", ["loss 1.0", "[1]", '{"step": 1}', "7"])
def test_a_line_of_another_kind_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"step": 1, "metrics": {{}}}}\n{line}\n')
    with pytest.raises(CheckpointError, match="Line 2 of"):
        read_json_lines(path)
    with pytest.raises(CheckpointError, match="There is no log"):
        read_json_lines(tmp_path / "none.jsonl")


@pytest.mark.slow
def test_a_killed_process_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    code = (
        "from compressor.training.loggers import JsonLinesLogger\n"
        f"logger = JsonLinesLogger({str(path)!r})\n"
        "step = 0\n"
        "while True:\n"
        "    step += 1\n"
        "    logger.log({str(i): float(step) for i in range(200)}, step)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 1e6) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.read_bytes().endswith(b"}}\n")
    steps, values = read_json_lines(path).get("199")
    assert steps == list(range(1, len(steps) + 1)) == values


@pytest.mark.slow
def test_hyperparameters_are_a_table_in_tensorboard(tmp_path: Path) -> None:
    make_trainer(loggers=[TensorBoardLogger(tmp_path)]).fit()
    (event,) = event_accumulator(tmp_path).Tensors("hyperparameters/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert "| optimizer | SGD |" in text
    assert "| max_duration | 2ep |" in text


@pytest.mark.slow
def test_tensorboard_hides_an_earlier_training_however_soon_the_next_comes(tmp_path: Path) -> None:
    # Names of event files were sorted .10 before .9, and the earlier training hid the later one.
    for value in range(3):
        logger = TensorBoardLogger(tmp_path)
        logger.log({"loss": float(value)}, step=3)
        logger.close()
        logger.log({"loss": float(value)}, step=4)
        logger.close()
    points = event_accumulator(tmp_path).Scalars("loss")
    assert [(point.step, point.value) for point in points] == [(3, 2.0), (4, 2.0)]


class Fail(Callback):
    events = frozenset({Event.BATCH_END})
    batch = 6

    def on(self, event: Event, state: State) -> None:
        if state.clock.batch == self.batch:
            raise RuntimeError("no")


@pytest.mark.slow
def test_a_run_has_its_parameters_and_says_how_it_ended(tmp_path: Path) -> None:
    trainer = make_trainer(
        loggers=[MLflowLogger("digits", tmp_path, run_name="first")],
        callbacks=[Fail()],
        max_duration="1ep",
        evaluate=accuracy,
    )
    trainer.eval()
    assert mlflow_run(tmp_path)[1].info.status == "RUNNING"
    trainer.fit()
    _, run = mlflow_run(tmp_path)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert run.data.params["optimizer"] == "SGD"
    assert run.data.params["max_duration"] == "1ep"
    with pytest.raises(RuntimeError, match="no"):
        trainer.fit("1ep")
    assert mlflow_run(tmp_path)[1].info.status == "FAILED"
    trainer.fit("1ep")
    client, run = mlflow_run(tmp_path)
    assert run.info.status == "FINISHED"
    assert len(client.search_runs([run.info.experiment_id])) == 1


@pytest.mark.slow
def test_a_resumed_run_is_the_old_one_or_a_copy_of_its_beginning(tmp_path: Path) -> None:
    first = MLflowLogger("digits", tmp_path)
    first.log_hyperparameters({"seed": 3})
    first.log({"loss": 1.0}, step=1)
    saved = first.state_dict()

    second = MLflowLogger("digits", tmp_path)
    second.load_state_dict(saved)
    second.log({"loss": 2.0}, step=2)
    assert second.run_id == first.run_id

    third = MLflowLogger("digits", tmp_path)
    third.load_state_dict(saved)
    third.log({"loss": 3.0}, step=2)
    client, run = mlflow_run(tmp_path)
    assert run.info.run_id == third.run_id != first.run_id
    assert run.data.params == {"seed": "3"}
    points = client.get_metric_history(third.run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(1, 1.0), (2, 3.0)]
    assert client.get_run(first.run_id).info.lifecycle_stage == "deleted"


@pytest.mark.slow
def test_mlflow_asks_no_server(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "def refuse(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo'):\n"
        "        print(event, arguments, flush=True)\n"
        "sys.addaudithook(refuse)\n"
        "from compressor.training.loggers import MLflowLogger\n"
        f"logger = MLflowLogger('digits', {str(tmp_path)!r})\n"
        "logger.log({'loss': 1.0}, 1)\n"
        "logger.close()\n"
        "import time; time.sleep(1)\n"  # its thread asks a moment after the import
    )
    known = ("PATH", "HOME", "PYTHONPATH")
    environment: dict[str, Any] = {k: v for k, v in os.environ.items() if k in known}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train/loss", "train/loss"),
        ("f1@0.5 (micro)", "f1_0.5 _micro_"),
        ("a//b", "a__b"),
        ("../up", "___up"),
        ("/root", "_root"),
        ("dir/", "dir_"),
        (".", "_"),
    ],
)
def test_mlflow_takes_the_cleaned_name(name: str, expected: str) -> None:
    validation = importlib.import_module("mlflow.utils.validation")
    assert clean_name(name) == expected
    validation._validate_metric_name(expected)
