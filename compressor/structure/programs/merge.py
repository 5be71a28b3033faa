"""Three encodings of one module as one program: what differs is the batch, or the mode."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import zip_longest
from typing import Any

import torch

from compressor.structure.programs.encode import Encoded, Step
from compressor.structure.programs.program import operation

END = 2**63 - 1  # of a slice that goes to the end


@dataclass(frozen=True)
class Batch:
    """Where the batch is, and its two lengths.

    Attributes:
        axis: (number of the input leaf, dimension), or () if the inputs are alike.
        small: its length in the first graph.
        large: in the second.
    """

    axis: tuple[int, ...]
    small: int = 1
    large: int = 1


class Misfit(Exception):
    """The graphs differ in something else; the message is the reason."""


def merge(
    few: Encoded, many: Encoded, training: Encoded, batch: Batch
) -> tuple[tuple[Any, ...], tuple[Step, ...], tuple[Any, ...]]:
    """Inputs, steps and outputs of the program.

    Raises:
        Misfit: if the three are not one program.
    """
    for other, change in ((many, "with another batch size"), (training, "in training mode")):
        for step, there in zip_longest(few.steps, other.steps, fillvalue=("", "nothing")):
            if step[:2] != there[:2]:
                raise Misfit(f"it does other things {change}: {there[1]!r}, not {step[1]!r}")
        if (few.form, few.outputs[0]) != (other.form, other.outputs[0]):
            raise Misfit(f"its results have another form {change}")
    steps: list[Step] = []
    for owner, *same in zip(few.owners, few.steps, many.steps, training.steps, strict=True):
        merger = _Merger(batch, owner)
        if same[0][0] == "op":
            count = max(len(step[2]) for step in same)
            same = [_with_defaults(step, count) for step in same]
        steps.append(tuple(merger.merge(*parts) for parts in zip(*same, strict=True)))
    merger = _Merger(batch, "")
    outputs = merger.merge(few.outputs[1], many.outputs[1], training.outputs[1])
    leaves = merger.merge(few.leaves, many.leaves, training.leaves)
    if not _depends_on_sizes(steps, few):
        leaves = tuple(leaf[:1] if leaf[0] == "tensor" else leaf for leaf in leaves)
    return (few.form, leaves), _with_deaths(steps, outputs), (few.outputs[0], outputs)


def _with_defaults(step: Step, count: int) -> Step:
    """The step of an operation with `count` arguments by position, as another graph has."""
    kind, name, args, *keywords = step
    defaults = tuple(argument.default_value for argument in _schema(name).arguments)
    return (kind, name, args + defaults[len(args) : count], *keywords)


@dataclass(frozen=True)
class _Merger:
    batch: Batch
    owner: str

    def merge(self, few: Any, many: Any, training: Any) -> Any:
        if few == many == training and type(few) is type(many) is type(training):
            return few
        if isinstance(few, tuple) and isinstance(many, tuple) and isinstance(training, tuple):
            if not len(few) == len(many) == len(training):
                raise Misfit("its graphs have other arguments")
            if few and isinstance(few[0], str) and few[0] not in ("list", "tensor"):
                raise Misfit(f"its graphs differ in {few}, {many} and {training}")
            return tuple(map(self.merge, few, many, training))
        if few != training:
            if few != many or not all(isinstance(x, (bool, float)) for x in (few, training)):
                raise Misfit(f"in training mode {few} is {training}")
            return ("mode", self.owner, training, few)
        if not all(isinstance(x, int) and not isinstance(x, bool) for x in (few, many)):
            raise Misfit(f"{few} is {many} with another batch size")
        return self.in_batch(few, many)

    def in_batch(self, few: int, many: int) -> tuple[Any, ...]:
        if not self.batch.axis:
            raise Misfit(f"{few} is {many} in the second trace, and no input differs")
        slope = Fraction(many - few, self.batch.large - self.batch.small)
        base = few - slope * self.batch.small
        if base.denominator != 1:
            raise Misfit(f"{few} is {many} with another batch size, which is no multiple of it")
        return ("batch", int(base), slope.numerator, slope.denominator)


def _depends_on_sizes(steps: Sequence[Step], encoded: Encoded) -> bool:
    """Whether an operation has an integer that may have been read off a shape."""
    return any(step[0] == "op" and not _is_free(*step[1:]) for step in steps)


def _is_free(name: str, args: Sequence[Any], keys: Sequence[str], values: Sequence[Any]) -> bool:
    schema, op = _schema(name), name.split(".")[1]
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False))
    given |= dict(zip(keys, values, strict=True))
    if op in _FREE:
        return _FREE[op](given)
    is_factory = not any("Tensor" in str(argument.type) for argument in schema.arguments)
    sizes = re.findall(r"SymInt[\[\]\d?]* (\w+)", str(schema))
    return not is_factory and all(_adapts(given.get(size)) for size in sizes)


def _schema(name: str) -> torch.FunctionSchema:
    return operation(name)._schema


def _adapts(size: Any) -> bool:
    """Whether a size is none, -1 or the batch."""
    if isinstance(size, tuple) and size and size[0] == "list":
        return all(map(_adapts, size[1:]))
    return size is None or size == -1 or (isinstance(size, tuple) and size[:1] == ("batch",))


def _pads_channels(given: dict[str, Any]) -> bool:
    """Padding of dimension 1 of (N, C, H, W) is of a number of channels; other may be of a size."""
    amounts = given["pad"][1:]
    return len(amounts) >= 4 and not any(amounts[:-2])


def _is_whole(given: dict[str, Any]) -> bool:
    return given.get("start") in (None, 0) and given.get("end") in (None, END)


_ALWAYS: Callable[[dict[str, Any]], bool] = lambda _: True  # noqa: E731
_FREE: dict[str, Callable[[dict[str, Any]], bool]] = {
    "slice": _is_whole,
    "pad": _pads_channels,
    "constant_pad_nd": _pads_channels,
} | dict.fromkeys(
    # their integers are the layer's own
    (
        *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "convolution"),
        *("select", "embedding", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
        *("adaptive_max_pool2d", "unsqueeze", "pixel_shuffle", "chunk", "flatten"),
    ),
    _ALWAYS,
)


def _with_deaths(steps: Sequence[Step], outputs: Any) -> tuple[Step, ...]:
    """The steps with the numbers of those whose results are not read any more, at their ends."""
    last = {number: number for number in range(len(steps))}
    for number, step in enumerate(steps):
        for read in _values_in(step):
            last[read] = number
    for read in _values_in(outputs):
        last.pop(read, None)
    dead: dict[int, list[int]] = {}
    for read, number in last.items():
        dead.setdefault(number, []).append(read)
    return tuple((*step, tuple(dead.get(number, ()))) for number, step in enumerate(steps))


def _values_in(value: Any) -> list[int]:
    if not isinstance(value, tuple):
        return []
    if value and value[0] in ("value", "item"):
        return [value[1]]
    return [number for item in value for number in _values_in(item)]
