"""What the documentation tells its readers to type exists, with the options that it is given."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer

from compressor.cli.main import app
from docs.programs import options_of
from tests.docs.pages import ROOT, commands, name, pages

EXTRA = re.compile(r"^(?:compressor|\.)\[([\w,]+)\]$")
# Of torchrun and horovodrun, before the script.
LAUNCHERS = {"torchrun", "horovodrun", "srun"}
HELP = {"--help", "-h"}


@pytest.mark.parametrize("page", pages(), ids=name)
def test_commands_exist_and_take_their_options(page: Path) -> None:
    problems = [f"{' '.join(words)}: {why}" for words in commands(page) if (why := problem(words))]
    assert not problems


def test_what_does_not_exist_is_noticed() -> None:
    assert problem(["python", "-m", "benchmarks.versus", "--seeds", "0"]) == ""
    assert "no such module" in problem(["python", "-m", "benchmarks.nothing"])
    assert "--sedes" in problem(["python", "-m", "benchmarks.versus", "--sedes", "0"])
    assert "--fast" in problem(["compressor", "demo", "--fast"])
    assert "no command" in problem(["compressor", "dmeo"])
    assert "no extra" in problem(["pip", "install", "compressor[rya]"])
    assert "no such file" in problem(["torchrun", "--nproc_per_node", "2", "examples/none.py"])
    assert "--nothing" in problem(["python", "examples/cifar_resnet.py", "--nothing"])


def problem(words: Sequence[str]) -> str:
    """Why a command cannot be typed; "" if it can, or is of a program that is not ours."""
    program, *arguments = words
    if program == "pip":
        return _extras(arguments)
    if program == "compressor":
        return _console(arguments)
    if program.startswith("scripts/"):
        return "" if (ROOT / program).exists() else "no such file"
    if program in LAUNCHERS or program == "python":
        return _python(arguments)
    return ""


def _python(arguments: Sequence[str]) -> str:
    """Of `python -m module …`, `python file.py …` and launchers of either."""
    for place, word in enumerate(arguments):
        rest = arguments[place + 1 :]
        if word == "-m" and rest:
            return _module(rest[0], rest[1:])
        if word == "-c":
            return ""
        if word.endswith(".py"):
            path = ROOT / word
            if "/" not in word:  # the reader's own
                return ""
            return _unknown(path, rest) if path.exists() else "no such file"
    return ""


def _module(module: str, arguments: Sequence[str]) -> str:
    part = module.partition(".")[0]
    if part not in {"benchmarks", "compressor", "docs"}:
        return ""
    if module == "compressor":
        return _console(arguments)
    spec = find_spec(module) if (ROOT / part).exists() else None
    if spec is None or spec.origin is None:
        return "no such module"
    return _unknown(Path(spec.origin), arguments)


def _unknown(path: Path, arguments: Sequence[str]) -> str:
    known = {option.name for option in options_of(path)} | HELP
    given = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    unknown = [word for word in given if word not in known]
    return f"no option {', '.join(unknown)}" if unknown else ""


def _console(arguments: Sequence[str]) -> str:
    command: Any = typer.main.get_command(app)
    known = set(HELP)
    for word in arguments:
        known |= {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
        if hasattr(command, "commands") and not word.startswith("-"):
            if word not in command.commands:
                return f"no command {word!r}"
            command = command.commands[word]
    known |= {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
    given = [word.partition("=")[0] for word in arguments if word.startswith("-")]
    unknown = [word for word in given if word not in known and not word.lstrip("-").isdigit()]
    return f"no option {', '.join(unknown)}" if unknown else ""


def _extras(arguments: Sequence[str]) -> str:
    text = (ROOT / "pyproject.toml").read_text()  # tomllib is of Python 3.11
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    known = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    found = [match[1].split(",") for word in arguments if (match := EXTRA.match(word))]
    unknown = [extra for extras in found for extra in extras if extra not in known]
    return f"no extra {', '.join(unknown)}" if unknown else ""
