"""Exit codes and last lines of the console program; the work itself is faked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import compressor
from compressor.cli.endings import CODES
from compressor.cli.main import app
from compressor.errors import StudyError


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def fake_demo(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Put a function in the place of `run_demo`, without loading torch."""

    def install(run_demo: Callable[..., None]) -> None:
        module = ModuleType("compressor.cli.demo")
        module.run_demo = lambda *words, **options: run_demo(*words, **options) or 0  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "compressor.cli.demo", module)

    return install


def test_the_version_is_printed() -> None:
    assert invoke("--version").stdout == f"compressor {compressor.__version__}\n"


def test_options_reach_the_demo(fake_demo: Any, tmp_path: Path) -> None:
    calls = []
    fake_demo(lambda run_dir, **options: calls.append((run_dir, options)))
    done = invoke("demo", "--run-dir", str(tmp_path), "--seed", "3", "--device", "GPU", "--quick")
    assert done.exit_code == 0
    assert calls == [(tmp_path, {"seed": 3, "device": "gpu", "is_quick": True})]


def test_runs_with_other_options_have_other_folders(fake_demo: Any) -> None:
    folders = []
    fake_demo(lambda run_dir, **options: folders.append(run_dir))
    for arguments in ([], ["--quick"], ["--seed", "1"], ["--device", "gpu"]):
        assert invoke("demo", *arguments).exit_code == 0
    assert folders[0] == Path("runs/demo")
    assert len(set(folders)) == 4


def test_an_expected_error_is_one_line_and_exit_code_1(fake_demo: Any) -> None:
    def fail(*_: object, **__: object) -> None:
        raise StudyError("The folder is\nfull. Free some space.")

    fake_demo(fail)
    done = invoke("demo")
    assert done.exit_code == 1
    assert done.stderr == "Error: The folder is full. Free some space.\n"
    assert not done.stdout


def test_an_unexpected_error_is_not_hidden(fake_demo: Any) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    fake_demo(fail)
    assert isinstance(invoke("demo").exception, ZeroDivisionError)


def test_an_interrupt_says_how_to_go_on_and_exits_130(fake_demo: Any) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    fake_demo(interrupt)
    done = invoke("demo", "--quick", "--seed", "7")
    assert done.exit_code == 130
    again = "compressor demo --run-dir runs/demo-quick-seed7 --seed 7 --device cpu --quick"
    assert again in done.stderr


@pytest.mark.parametrize(
    "arguments", [["demo", "--device", "tpu"], ["demo", "--seed", "-1"], ["x"]]
)
def test_a_usage_error_is_exit_code_2(arguments: list[str]) -> None:
    assert invoke(*arguments).exit_code == 2


def test_the_exit_code_is_that_of_the_run(fake_demo: Any) -> None:
    fake_demo(lambda run_dir, **options: 3)
    assert invoke("demo").exit_code == 3


def test_help_names_every_exit_code_and_completion() -> None:
    text = " ".join(invoke("--help").stdout.split())
    for code, meaning in CODES.items():
        assert f"{code}: {meaning}" in text
    assert "--install-completion" in text


def test_the_shell_completes_commands() -> None:
    environment = {"_COMPRESSOR_COMPLETE": "complete_bash", "COMP_WORDS": "compressor re"}
    done = CliRunner().invoke(
        app, [], prog_name="compressor", env={**environment, "COMP_CWORD": "1"}
    )
    assert done.stdout.split() == ["resume", "report"]


@pytest.mark.slow
def test_no_help_loads_torch() -> None:
    source = """
import sys
from compressor.cli.main import app, main
for command in app.registered_commands:
    sys.argv = ["compressor", command.name or command.callback.__name__, "--help"]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, stop.code
heavy = {"torch", "onnx", "numpy"}
print(len(app.registered_commands), sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "10 []"
