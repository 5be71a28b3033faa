"""A module's `forward` traced into a program, and which of its integers a graph's integers are.

Three graphs of `torch.export` are encoded alike and merged: two batch sizes say which integers are
the batch, the training mode says which flags follow `module.training`. What does not merge is
refused, and the result must equal the module.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from compressor.interfaces.inputs import ModelInputs
from compressor.structure.programs.calls import watch_calls
from compressor.structure.programs.encode import Encoded, encode, export, refuse
from compressor.structure.programs.merge import Batch, Misfit, merge
from compressor.structure.programs.program import FORMAT, Program
from compressor.structure.programs.programmed import set_program
from compressor.structure.programs.slots import Position, Slot, locate
from compressor.structure.trace import FORWARD_FAILURES, copy_model, in_eval, in_mode, run

MOST_ENTRIES = 4096  # of a tensor that is written into a program
TOLERANCE = 1e-12  # relative, in float64: the operations are the same ones
SEED = 0  # of the dropout in the comparison


@dataclass(frozen=True)
class Traced:
    """A program, and the graph of the same module to reason about.

    Positions are index paths in `(*node.args, *node.kwargs.values())`; of a placeholder, `(d,)` is
    its dimension d, whose length the program checks if its operations depend on sizes.

    Attributes:
        program: for `surgery.reprogram`.
        graph: of a float64 copy in eval mode for the small inputs; functional, nothing decomposed.
        slots: which integer of the program an integer of the graph is.
        following: integers of the graph that adapt by themselves when the program runs, as a -1
            does, or the halves of `chunk`. What is in neither is fixed.
        step_of: for each node, the number of the step that it belongs to. Steps of kind "call" are
            children, whose insides the program does not have.
    """

    program: Program
    graph: ExportedProgram
    slots: Mapping[tuple[fx.Node, Position], Slot]
    following: frozenset[tuple[fx.Node, Position]]
    step_of: Mapping[fx.Node, int]


def trace_program(module: nn.Module, small: ModelInputs, large: ModelInputs) -> Traced:
    """The program that does what `module` does, in both modes, for any batch. Changes nothing.

    What `forward` is given besides tensors becomes a constant, and so do all sizes but the batch
    where operations depend on them. The trace is of a copy in float64, so that a data type which is
    float64 in it is that of the inputs.

    Args:
        module: whose `forward` is Python code; its children may be anything.
        small: one call's arguments.
        large: the same with another batch, which need not be dimension 0, and may be a multiple.

    Raises:
        ModelError: if there is no such program; the message says why.
    """
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise refuse("it has hooks, or a `forward` that is not its class's", module)
    double = in_eval(copy_model(module).cpu().double())
    small = _canonical(double, small.to("cpu").double())
    large = _canonical(double, large.to("cpu").double())
    batch = _batch(module, small, large)
    calls = watch_calls(double, small)
    few = encode(double, export(double, small, calls), small, calls)
    calls_of_many = watch_calls(double, large)
    exported = export(double, large, calls_of_many, few.opaque)
    many = encode(double, exported, large, calls_of_many, few.collapsed)
    exported = export(in_mode(double, is_training=True), small, calls, few.opaque)
    training = encode(double, exported, small, calls, few.collapsed)
    double.eval()
    buffers = _buffers(double, few, many)
    try:
        program: Program = (FORMAT, batch.axis, *merge(few, many, training, batch), buffers)
    except Misfit as reason:
        raise refuse(str(reason), module) from reason
    _check_equal(double, program, {False: [*_third(small, large), large][:1], True: [small]})
    graph = few.exported.run_decompositions({})
    slots, following, step_of = locate(graph, few, program, batch.small)
    return Traced(program, graph, slots, following, step_of)


def _canonical(module: nn.Module, inputs: ModelInputs) -> ModelInputs:
    """The same call with as many arguments by position as its `forward` takes so."""
    try:
        signature = inspect.signature(module.forward)
        bound = signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        raise refuse(f"it cannot be called so: {error}", module) from error
    return ModelInputs(bound.args, bound.kwargs)


def _batch(module: nn.Module, small: ModelInputs, large: ModelInputs) -> Batch:
    few, form = pytree.tree_flatten((small.args, dict(small.kwargs)))
    many, other = pytree.tree_flatten((large.args, dict(large.kwargs)))
    if form != other:
        raise refuse("its two calls have arguments of different forms", module)
    for number, (a, b) in enumerate(zip(few, many, strict=True)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            continue
        if a.dim() != b.dim():
            raise refuse("its two calls have tensors of different dimensions", module)
        for dim, (length, longer) in enumerate(zip(a.shape, b.shape, strict=True)):
            if length != longer:
                return Batch((number, dim), length, longer)
    return Batch(())


def _third(small: ModelInputs, large: ModelInputs) -> list[ModelInputs]:
    """Both calls as one: a third batch size. None if a tensor differs in two dimensions."""
    few, form = pytree.tree_flatten((small.args, dict(small.kwargs)))
    many = pytree.tree_leaves((large.args, dict(large.kwargs)))
    joined = []
    for a, b in zip(few, many, strict=True):
        if not isinstance(a, Tensor):
            joined.append(a)
            continue
        different = [dim for dim in range(a.dim()) if a.shape[dim] != b.shape[dim]]
        if len(different) > 1:
            return []
        joined.append(torch.cat([a, b], different[0]) if different else a)
    args, kwargs = pytree.tree_unflatten(joined, form)
    return [ModelInputs(args, kwargs)]


def _buffers(module: nn.Module, few: Encoded, many: Encoded) -> tuple[tuple[Any, ...], ...]:
    """Tensors made in Python, which must not depend on the batch."""
    attributes = {
        f"{prefix}.{key}".removeprefix("."): value
        for prefix, owner in module.named_modules()
        for key, value in vars(owner).items()
        if isinstance(value, Tensor)
    }
    buffers: list[tuple[Any, ...]] = []
    for name, (target, value) in few.constants.items():
        _, other = many.constants.get(name, (target, None))
        if other is None or not torch.equal(value, other):
            raise refuse(f"the tensor {target!r} depends on the batch", module)
        if attributes.get(target) is not None:
            buffers.append((name, "attribute", target))
        elif value.numel() <= MOST_ENTRIES:
            entries = tuple(value.flatten().tolist())
            buffers.append((name, "data", str(value.dtype)[6:], tuple(value.shape), entries))
        else:
            raise refuse(f"it makes a tensor of {value.numel()} entries in Python", module)
    return tuple(buffers)


def _check_equal(
    module: nn.Module, program: Program, calls: Mapping[bool, list[ModelInputs]]
) -> None:
    """The program gives what the module gives to these calls, in eval and in training mode."""
    for is_training, inputs in calls.items():
        original, programmed = copy.deepcopy(module), copy.deepcopy(module)
        set_program(programmed, program)
        for call in inputs:
            expected = _outputs(in_mode(original, is_training=is_training), call)
            try:
                got = _outputs(in_mode(programmed, is_training=is_training), call)
            except FORWARD_FAILURES as error:
                raise refuse(f"its program does not run: {error}", module) from error
            equal = len(expected) == len(got) and all(map(_is_equal, expected, got))
            if not equal:
                mode = "training" if is_training else "eval"
                raise refuse(f"its program gives other results in {mode} mode", module)


def _outputs(module: nn.Module, inputs: ModelInputs) -> list[object]:
    copied = inputs.map(torch.clone)  # which the module may write into
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(SEED)
        return pytree.tree_leaves((run(module, copied), copied.args, dict(copied.kwargs)))


def _is_equal(expected: object, got: object) -> bool:
    if not isinstance(expected, Tensor) or not isinstance(got, Tensor):
        return expected == got
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return False
    return torch.allclose(expected, got, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
