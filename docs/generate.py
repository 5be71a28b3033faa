"""Writes the pages that are made from the code: `python -m docs.generate`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.report import main as write_benchmarks
from docs.cards import (
    algorithm_classes,
    algorithm_page,
    algorithms_page,
    technique_classes,
    technique_page,
    techniques_page,
)
from docs.cli_page import cli_page
from docs.code_blocks import CONTRIBUTING, contributing_page
from docs.examples_page import examples_page
from docs.measured_methods import methods_page
from docs.options_page import options_page
from docs.programs import benchmark_programs_page
from docs.reference import REFERENCE, index_page, reference_page
from docs.result_schema import result_page

FOLDER = Path(__file__).parent
FOLDERS = ("algorithms", "api", "techniques")  # which hold such pages alone

PAGES: dict[str, Callable[[], str]] = {
    "algorithms.md": algorithms_page,
    "techniques.md": techniques_page,
    "benchmark_programs.md": benchmark_programs_page,
    "methods.md": methods_page,
    "cli.md": cli_page,
    "examples.md": examples_page,
    "options.md": options_page,
    "result.md": result_page,
    "api/index.md": index_page,
    **{f"api/{file}.md": partial(reference_page, file) for file in REFERENCE},
    **{f"techniques/{cls.name}.md": partial(technique_page, cls) for cls in technique_classes()},
    **{
        f"algorithms/{cls.__name__.lower()}.md": partial(algorithm_page, cls)
        for cls in algorithm_classes()
    },
    CONTRIBUTING: contributing_page,  # counts the blocks of the others
}


def stale_pages() -> list[Path]:
    """Pages of what is no longer there."""
    pages = [path for folder in FOLDERS for path in sorted((FOLDER / folder).glob("*.md"))]
    return [path for path in pages if path.relative_to(FOLDER).as_posix() not in PAGES]


if __name__ == "__main__":
    for name, make in PAGES.items():
        (FOLDER / name).parent.mkdir(exist_ok=True)
        (FOLDER / name).write_text(make())
    for path in stale_pages():
        path.unlink()
    write_benchmarks([])
