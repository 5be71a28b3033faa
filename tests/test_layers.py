"""Imports go downwards only: the layers of the design, checked on the syntax tree of every file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import compressor

PACKAGE = "compressor"
ROOT = Path(compressor.__file__).parent

# Lowest first. A part (a file or a package directly under compressor/) imports from lower rows
# and from itself; parts of one row do not import each other.
LAYERS = (
    ("errors",),
    (
        "evidence",
        "files",
        "hardware",
        "logs",
        "optional",
        "progress",
        "registry",
        "seeding",
        "units",
    ),
    ("interfaces", "result"),
    ("config",),
    ("report",),  # of a result alone
    ("distributed", "profiling", "structure"),
    ("training",),
    ("quantization",),
    ("techniques",),
    ("export",),
    ("targets",),
    ("search",),
    ("frameworks",),
    ("engine",),
    ("cli",),
    ("__main__",),
)
LAYER_OF = {part: number for number, parts in enumerate(LAYERS) for part in parts}
TOP = len(LAYERS)  # what may import anything, and is imported by none of the others
LAYER_OF |= {"functional": TOP, "testing": TOP}


def test_every_import_goes_downwards() -> None:
    violations = [
        violation
        for path in sorted(ROOT.rglob("*.py"))
        for violation in find_violations(path.read_text(), path.relative_to(ROOT))
    ]
    assert not violations, "\n" + "\n".join(violations)


def test_an_upward_import_is_named() -> None:
    source = "import torch\nfrom compressor.engine import Engine\n"
    assert find_violations(source, Path("training/trainer.py")) == [
        "compressor/training/trainer.py:2 imports compressor.engine: training (layer 6) may not "
        "import engine (layer 13)"
    ]


def test_packages_of_one_layer_do_not_import_each_other() -> None:
    source = "def late():\n    import compressor.profiling.counts\n"
    (violation,) = find_violations(source, Path("structure/trace.py"))
    assert "compressor/structure/trace.py:2 imports compressor.profiling.counts" in violation


def test_a_relative_import_is_resolved() -> None:
    (violation,) = find_violations("from ..search import space\n", Path("structure/trace.py"))
    assert "imports compressor.search" in violation
    assert not find_violations("from . import surgery\n", Path("structure/trace.py"))
    assert not find_violations("from .surgery import get\n", Path("structure/__init__.py"))


def test_a_part_named_after_from_is_seen() -> None:
    (violation,) = find_violations("from compressor import engine\n", Path("result.py"))
    assert "may not import engine" in violation


def test_the_package_itself_is_imported_by_the_top_only() -> None:
    source = "from compressor import Engine\n"
    assert find_violations(source, Path("search/study.py"))
    assert not find_violations(source, Path("cli/demo.py"))


def test_an_unknown_part_is_named() -> None:
    assert "no layer" in find_violations("", Path("helpers/misc.py"))[0]


def test_imports_for_types_are_exempt() -> None:
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from compressor.engine import Engine\n"
        "else:\n    from compressor.search import space\n"
    )
    (violation,) = find_violations(source, Path("training/state.py"))
    assert "compressor.search" in violation


def find_violations(source: str, path: Path) -> list[str]:
    """A line for each import of the file `path` (relative to the package) that breaks a layer."""
    part = path.parts[0].removesuffix(".py")
    if path == Path("__init__.py"):
        return []
    if part not in LAYER_OF:
        return [f"{PACKAGE}/{path}: {part} has no layer; add it to LAYERS in {Path(__file__).name}"]
    if LAYER_OF[part] == TOP:
        return []
    violations = []
    for line, name in _imported_names(ast.parse(source), path):
        other = name.split(".")[1] if "." in name else None
        if other == part or (other is None and part == "cli"):
            continue
        where = f"{PACKAGE}/{path}:{line} imports {name}: {part} (layer {LAYER_OF[part]})"
        if other is None:
            violations.append(f"{where} may not import the package itself")
        elif other not in LAYER_OF:
            violations.append(f"{where} may not import {other}, which has no layer")
        elif LAYER_OF[other] >= LAYER_OF[part]:
            violations.append(f"{where} may not import {other} (layer {LAYER_OF[other]})")
    return violations


def _imported_names(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import of this package, those for types alone left out."""
    for node in _walk_runtime(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = _absolute_module(node, path)
            if module == PACKAGE:  # a part, or one of the lazy names of the package itself
                names = [
                    f"{PACKAGE}.{alias.name}" if alias.name in LAYER_OF else PACKAGE
                    for alias in node.names
                ]
            else:
                names = [module]
        else:
            continue
        for name in names:
            if name.split(".")[0] == PACKAGE:
                yield node.lineno, name


def _walk_runtime(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    children = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING":
        children = iter(node.orelse)
    for child in children:
        yield from _walk_runtime(child)


def _absolute_module(node: ast.ImportFrom, path: Path) -> str:
    if not node.level:
        return node.module or ""
    package = [PACKAGE, *path.parent.parts]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])
