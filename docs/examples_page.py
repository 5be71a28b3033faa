"""The page of the examples, from their own first lines."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
COMMAND = re.compile(r"^(?:[A-Z_]+=\S+ )?(?:python|pip|torchrun|horovodrun) ")


def examples() -> list[Path]:
    """The programs and notebooks of `examples/`; the other files there are parts of them."""
    scripts = [path for path in EXAMPLES.glob("*.py") if "\nif __name__ ==" in path.read_text()]
    return sorted([*scripts, *EXAMPLES.glob("*.ipynb")])


def examples_page() -> str:
    """What each example shows, and how to run it."""
    lines = [
        "# Examples",
        "",
        "Whole programs on real data, for minutes of a CPU. Most bring their data along; those",
        "with `--data DIR` read images, sentences or weights from a folder of yours. Most scripts",
        "have `--quick`, which tries every step in seconds, as the tests do. Made from their first",
        "lines by `python -m docs.generate`.",
    ]
    for path in examples():
        link = f"[`examples/{path.name}`](../examples/{path.name})"
        lines += ["", f"## {path.stem}", "", link, *described(path)]
    return "\n".join(lines) + "\n"


def described(path: Path) -> list[str]:
    """The paragraphs of an example about itself, with its commands as blocks."""
    lines: list[str] = []
    for paragraph in about(path).split("\n\n"):
        commands = [line for line in paragraph.splitlines() if COMMAND.match(line)]
        words = [line for line in paragraph.splitlines() if not COMMAND.match(line)]
        lines += ["", *words] if words else []
        lines += ["", "```bash", *commands, "```"] if commands else []
    return lines


def about(path: Path) -> str:
    """The docstring of a script, or the first text of a notebook without its heading."""
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(path.read_text())) or ""
    cells = json.loads(path.read_text())["cells"]
    first = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return "\n".join(line for line in first.splitlines() if not line.startswith("#")).strip()
