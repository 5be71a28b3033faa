"""Which integer of a program an integer of the module's functional graph is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram

from compressor.structure.programs.encode import Encoded
from compressor.structure.programs.program import INPUTS, STEPS, Path, Program

Position = tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """An integer of a program.

    Attributes:
        path: where it is, for `get_integer` and `with_integer`.
        scale: the graph's integer is `scale` times the program's: of `view(n * 12, 64)`, traced
            with n = 2, the graph has 24 and the program 12.
    """

    path: Path
    scale: Fraction = Fraction(1)


Slots = dict[tuple[fx.Node, Position], Slot]
Following = frozenset[tuple[fx.Node, Position]]


def locate(
    graph: ExportedProgram, encoded: Encoded, program: Program, batch: int
) -> tuple[Slots, Following, dict[fx.Node, int]]:
    """Slots, integers that adapt by themselves, and steps of the nodes of `graph`.

    Args:
        graph: `encoded.exported` made functional.
        encoded: what `program` was made of.
        program: whose slots are wanted.
        batch: length of the batch in `graph`.
    """
    sources = {node.name: node for node in encoded.exported.graph.nodes}
    slots: Slots = {}
    following: set[tuple[fx.Node, Position]] = set()
    step_of: dict[fx.Node, int] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder" and node.name in encoded.inputs:
            found: Iterator[tuple[Position, Path | None]] = _dimensions(node, encoded, program)
        elif node.op == "call_function":
            source = sources.get(_source_name(node))
            if source is None or source.name not in encoded.step_of:
                continue
            number = step_of[node] = encoded.step_of[source.name]
            found = _integers(node, source, program, number)
        else:
            continue
        for position, path in found:
            if path == ():
                following.add((node, position))
            elif path is not None and (slot := _slot(program, path, batch)) is not None:
                slots[node, position] = slot
    return slots, frozenset(following), step_of


def _source_name(node: fx.Node) -> str:
    sources = node.meta.get("from_node")
    return sources[-1].name if sources else ""


def _dimensions(
    node: fx.Node, encoded: Encoded, program: Program
) -> Iterator[tuple[Position, Path | None]]:
    leaf = encoded.inputs[node.name]
    sizes = program[INPUTS][1][leaf][1:]
    value = node.meta.get("val")
    for dim in range(value.dim() if isinstance(value, Tensor) else 0):
        yield (dim,), (INPUTS, 1, leaf, 1 + dim) if sizes else ()


def _integers(
    node: fx.Node, source: fx.Node, program: Program, number: int
) -> Iterator[tuple[Position, Path | None]]:
    """Each integer of `node` with its path; () where it follows, None where it is fixed."""
    if program[STEPS][number][0] != "op":
        return
    theirs = dict(_flat((*source.args, *source.kwargs.values())))
    for position, value in _flat((*node.args, *node.kwargs.values())):
        origin = _origin(source, position)
        if origin is None or not theirs or theirs.get(origin) == -1:
            yield position, ()
        elif theirs.get(origin) == value:
            yield position, _path(number, len(source.args), origin)
        else:
            yield position, None


def _origin(source: fx.Node, position: Position) -> Position | None:
    """Where `source` has the integer that its functional form has at `position`; None: nowhere."""
    name = str(source.target).split(".")[1]
    if name in ("flatten", "chunk"):
        return None
    if name == "unflatten" and len(position) == 2:
        tensor, dim, sizes = source.args[:3]
        assert isinstance(tensor, fx.Node)
        assert isinstance(dim, int)
        assert isinstance(sizes, list)
        start = dim % tensor.meta["val"].dim()
        inside = position[1] - start
        return (2, inside) if 0 <= inside < len(sizes) else None
    return position


def _path(number: int, count: int, position: Position) -> Path:
    """The place of argument `position` of a step; nested lists have their tag first."""
    first, *rest = position
    place = (2, first) if first < count else (4, first - count)
    return (STEPS, number, *place, *(index + 1 for index in rest))


def _slot(program: Program, path: Path, batch: int) -> Slot | None:
    value: Any = program
    for index in path:
        value = value[index]
    if isinstance(value, int):
        return Slot(path)
    if isinstance(value, tuple) and value[0] == "batch" and value[1] == 0:
        return Slot((*path, 2), Fraction(batch, value[3]))
    return None


def _flat(value: Any) -> Iterator[tuple[Position, int]]:
    """The integers in nested sequences, with their positions."""
    for index, item in enumerate(value):
        if isinstance(item, (list, tuple)):
            yield from (((index, *position), found) for position, found in _flat(item))
        elif isinstance(item, int) and not isinstance(item, bool):
            yield (index,), item
