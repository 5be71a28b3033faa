"""The page of the benchmark programs, from their files; and what options a program takes."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple, TypeGuard

ROOT = Path(__file__).parents[1]
COMMON = "common.py"  # where the options that most programs share are


class Option(NamedTuple):
    """One option of a program."""

    name: str  # "--seed", or the name of a positional argument
    help: str
    default: str


def benchmark_programs() -> list[Path]:
    """The files of benchmarks/ that are programs."""
    files = sorted((ROOT / "benchmarks").glob("*.py"))
    return [path for path in files if "\nif __name__ ==" in path.read_text()]


def options_of(path: Path) -> list[Option]:
    """What `add_argument` is called with in a program, the shared options among it.

    Read from its syntax tree: to run every program with `--help` would take minutes.
    """
    source = path.read_text()
    options = _added(ast.parse(source))
    common = path.parent / COMMON
    if "make_parser(" in source and path.name != COMMON and common.exists():
        options = [*_added(ast.parse(common.read_text())), *options]
    return options


def benchmark_programs_page() -> str:
    """Every program of benchmarks/: what it measures, and how to repeat it."""
    shared = options_of(ROOT / "benchmarks" / COMMON)
    lines = [
        "# Every benchmark, and how to repeat it",
        "",
        "The figures in these pages come from these programs; each page names the command, the",
        "machine, the versions and the seed. The [newest results](benchmarks.md) are together on",
        "one page. Run the programs from a checkout. Made from them by `python -m docs.generate`.",
        "",
        "`--data DIR` is the folder of the real data and weights, such as the exact images of",
        "CIFAR-10 with the pretrained CIFAR ResNets: `examples/cifar_data.py` says what the files",
        "are called and how they are read. Ratios are only worth what the machine was doing",
        "meanwhile: leave it alone while a program runs, and set `OMP_NUM_THREADS=1` where the",
        "program says so.",
        "",
        "Options that most of them share:",
        "",
        *_table(shared),
    ]
    for path in benchmark_programs():
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        own = [option for option in options_of(path) if option not in shared]
        lines += [f"## {path.stem}", "", *_paragraphs(doc, path.stem), *_table(own)]
    return "\n".join(lines).rstrip() + "\n"


def _paragraphs(doc: str, stem: str) -> list[str]:
    """A docstring as Markdown; its commands as blocks, one for the bare call where it has none."""
    lines: list[str] = []
    commands = 0
    for paragraph in doc.split("\n\n"):
        if "python -m benchmarks." in paragraph and not paragraph.startswith(("`", "Plain")):
            command, _, note = paragraph.partition("        (")
            lines += ["```bash", " ".join(command.split()), "```", ""]
            lines += [f"({note}", ""] if note else []
            commands += 1
        elif paragraph.startswith("torchrun"):
            lines += ["```bash", paragraph, "```", ""]
            commands += 1
        else:
            lines += [paragraph, ""]
    if not commands and f"python -m benchmarks.{stem}" not in doc:
        lines += ["```bash", f"python -m benchmarks.{stem}", "```", ""]
    return lines


def _table(options: list[Option]) -> list[str]:
    if not options:
        return []
    rows = [f"| `{each.name}` | {each.default} | {each.help} |" for each in options]
    return ["| option | default | what it means |", "|---|---|---|", *rows, ""]


def _added(tree: ast.AST) -> list[Option]:
    calls = [node for node in ast.walk(tree) if _adds(node)]
    calls.sort(key=lambda call: call.lineno)
    loops = {
        id(call): loop
        for loop in ast.walk(tree)
        if isinstance(loop, ast.For)
        for call in ast.walk(loop)
        if _adds(call)
    }
    options: list[Option] = []
    for call in calls:
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        meaning, default = _text(keywords.get("help")), _text(keywords.get("default"), "`")
        for name in _names(call, loops.get(id(call))):
            options.append(Option(name, meaning, default))
    return options


def _adds(node: ast.AST) -> TypeGuard[ast.Call]:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "add_argument"
    )


def _names(call: ast.Call, loop: ast.For | None) -> list[str]:
    """The long name of an option; all of them where a loop adds `f"--{name}"` for each."""
    if loop is not None and isinstance(loop.iter, ast.Tuple) and not _is_constant(call.args[-1]):
        return [f"--{ast.literal_eval(each)}" for each in loop.iter.elts]
    return [str(each.value) for each in call.args if isinstance(each, ast.Constant)][-1:]


def _is_constant(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant)


def _text(node: ast.expr | None, quote: str = "") -> str:
    """A constant as text; "" for what is worked out, or None."""
    if isinstance(node, (ast.Constant, ast.List, ast.Tuple)) and not _is_empty(node):
        try:
            value = ast.literal_eval(node)
        except ValueError:
            return ""
        return f"{quote}{value}{quote}"
    return ""


def _is_empty(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value in (None, "")
