"""Programs: a module's `forward` as data, so that the widths its code fixes can be changed.

A program replays the ATen operations that the code ran between the calls of the module's children,
which are called as modules: they keep their names, and train as before. It is made by
`trace.trace_program`, and consists of nested tuples only:

    (format, batch, inputs, steps, outputs, buffers)
    batch    (number of the input leaf, dimension) whose length is the batch, or ()
    inputs   (form of (args, kwargs), its leaves): ("tensor", *sizes), any size without sizes, or
             ("constant", value)
    steps    ("op", "aten.view.default", args, names of keywords, their values, dead)
             ("call", name of a child, form of (args, kwargs), leaves, leaf of the result, dead)
             ("item", number of a step, index in its result, dead)
             where `dead` numbers the steps whose results nobody needs afterwards
    outputs  (form, leaves)
    buffers  (name, "attribute", name of the tensor that is an attribute now) or
             (name, "data", data type, shape, entries): tensors that the operations read, and that
             are neither parameters nor buffers before

Numbers, booleans and None stand for themselves. What else a value may be, see `_DECODERS`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compressor.errors import CheckpointError, ModelError

Program = tuple[Any, ...]
Path = tuple[int, ...]

FORMAT = 1
BATCH, INPUTS, STEPS, OUTPUTS, BUFFERS = 1, 2, 3, 4, 5  # places in a program
NAMESPACES = ("aten", "torchvision")


def get_integer(program: Program, path: Path) -> int:
    """The integer at `path`: the index to take in each nested tuple.

    >>> get_integer((7, (8, 9)), (1, 0))
    8
    """
    value: Any = program
    for index in path:
        value = value[index]
    assert isinstance(value, int), value
    return value


def with_integer(program: Program, path: Path, value: int) -> Program:
    """The same program with another integer at `path`.

    >>> with_integer((7, (8, 9)), (1, 0), 6)
    (7, (6, 9))
    """
    index, *rest = path
    new = with_integer(program[index], tuple(rest), value) if rest else value
    return (*program[:index], new, *program[index + 1 :])


def check_program(program: Program) -> None:
    """Refuse a program that could do anything but compute on tensors.

    Raises:
        CheckpointError: if it is of another format, or has a step that is no ATen or torchvision
            operation and no call of a child.
    """
    if not isinstance(program, tuple) or len(program) != 6 or program[0] != FORMAT:
        raise CheckpointError(
            f"The program of a module is not of format {FORMAT}. "
            "Read it with the version that wrote it."
        )
    forms = [program[INPUTS][0], program[OUTPUTS][0]]
    for step in program[STEPS]:
        if step[0] == "op":
            operation(step[1])
        elif step[0] == "call":
            forms.append(step[2])
        elif step[0] != "item":
            raise CheckpointError(
                f"A module's program has a step {step[0]!r}. It has 'op', 'call' and 'item' only."
            )
    for form in forms:
        if "defaultdict" in form:  # reading its form imports what the form names
            raise CheckpointError("A module's program has a defaultdict. Use a dict.")
        try:
            _form(form)
        except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"A module's program has arguments or results of an unknown form: {error}. "
                "Import what defines their types first."
            ) from error


def operation(name: str) -> torch._ops.OpOverload:
    """The operation "aten.view.default".

    Raises:
        CheckpointError: if it is not one that a program may run.
    """
    found = _find_operation(name)
    if found is None or any(argument.name == "filename" for argument in found._schema.arguments):
        raise CheckpointError(
            f"A module's program names the operation {name!r}, which is none of "
            f"{' or '.join(NAMESPACES)} on tensors. Do not load files that you do not trust."
        )
    return found


def form_of(spec: pytree.TreeSpec) -> str:
    """A form as a program has it: "leaf", "args 2" for two leaves by position, or torch's JSON.

    Raises:
        NotImplementedError: if a type in it is not known to torch.
    """
    count = spec.num_leaves
    texts = ("leaf", f"args {count}")
    return next((text for text in texts if _form(text) == spec), "") or pytree.treespec_dumps(spec)


def run_program(
    module: nn.Module,
    program: Program,
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What the `forward` that became `program` returns for these arguments.

    Args:
        module: with the children, parameters and buffers of the program.
        program: of `trace.trace_program`.
        signature: of the `forward`, with `self`.
        args: by position.
        kwargs: by name.

    Raises:
        ModelError: if they are of another form than those the program was made for: other
            constants, another nesting, another length of a dimension that is not the batch.
    """
    frame = _Frame(module, program, _input_leaves(module, program, signature, args, kwargs))
    for step in program[STEPS]:
        frame.results.append(_RUNNERS[step[0]](frame, *step[1:-1]))
        for number in step[-1]:
            frame.results[number] = None
    form, leaves = program[OUTPUTS]
    return pytree.tree_unflatten([frame.decode(leaf) for leaf in leaves], _form(form))


def _find_operation(name: str) -> torch._ops.OpOverload | None:
    namespace, *rest = name.split(".")
    if namespace not in NAMESPACES or len(rest) != 2:
        return None
    found = _look_up(namespace, *rest)
    if found is None and namespace == "torchvision":
        try:
            importlib.import_module("torchvision")  # which registers its operations
        except ImportError:
            return None
        found = _look_up(namespace, *rest)
    return found


def _look_up(namespace: str, name: str, overload: str) -> torch._ops.OpOverload | None:
    packet = getattr(getattr(torch.ops, namespace), name, None)
    found = getattr(packet, overload, None)
    return found if isinstance(found, torch._ops.OpOverload) else None


_FORMS: dict[str, pytree.TreeSpec] = {}  # read before; torch.compile passes over other caches


def _form(text: str) -> pytree.TreeSpec:
    if text not in _FORMS:
        kind, _, count = text.partition(" ")
        if kind == "args":
            _FORMS[text] = pytree.tree_structure(((0,) * int(count), {}))
        else:
            leaf = kind == "leaf"
            _FORMS[text] = pytree.tree_structure(0) if leaf else pytree.treespec_loads(text)
    return _FORMS[text]


class _Frame:
    """One run of a program: what has been computed so far."""

    def __init__(self, module: nn.Module, program: Program, inputs: list[Any]) -> None:
        self.module = module
        self.inputs = inputs
        self.results: list[Any] = []
        axis = program[BATCH]
        self.batch = inputs[axis[0]].shape[axis[1]] if axis else 1

    def decode(self, value: Any) -> Any:
        if not isinstance(value, tuple):
            return value
        return _DECODERS[value[0]](self, *value[1:])

    def tensor(self, name: str) -> Any:
        owner, _, key = name.rpartition(".")
        return getattr(self.module.get_submodule(owner), key)

    def in_batch(self, base: int, numerator: int, denominator: int) -> int:
        """`base + batch * numerator / denominator`."""
        share = self.batch * numerator
        return base + (share if denominator == 1 else share // denominator)

    def in_mode(self, owner: str, in_training: Any, otherwise: Any) -> Any:
        return in_training if self.module.get_submodule(owner).training else otherwise

    def dtype(self, name: str) -> torch.dtype:
        if name != "inputs":
            found: torch.dtype = getattr(torch, name)
            return found
        tensors = [leaf for leaf in self.inputs if isinstance(leaf, Tensor)]
        for tensor in (*tensors, *self.module.parameters(), *self.module.buffers()):
            if tensor.is_floating_point():
                return tensor.dtype
        return torch.get_default_dtype()

    def device(self) -> torch.device:
        tensors = [leaf for leaf in self.inputs if isinstance(leaf, Tensor)]
        for tensor in (*tensors, *self.module.parameters(), *self.module.buffers()):
            return tensor.device
        return torch.device("cpu")

    def run_op(
        self, name: str, args: Sequence[Any], keys: Sequence[str], values: Sequence[Any]
    ) -> Any:
        kwargs = dict(zip(keys, map(self.decode, values), strict=True))
        found: Any = _find_operation(name)  # checked when the program was set
        return found(*map(self.decode, args), **kwargs)

    def call_child(self, name: str, form: str, leaves: Sequence[Any], leaf: int) -> Any:
        args, kwargs = pytree.tree_unflatten([self.decode(arg) for arg in leaves], _form(form))
        result = self.module.get_submodule(name)(*args, **kwargs)
        return result if isinstance(result, Tensor) else pytree.tree_leaves(result)[leaf]

    def take_item(self, number: int, index: int) -> Any:
        return self.results[number][index]


_RUNNERS: dict[str, Callable[..., Any]] = {
    "op": _Frame.run_op,
    "call": _Frame.call_child,
    "item": _Frame.take_item,
}
_DECODERS: dict[str, Callable[..., Any]] = {
    "value": lambda frame, number: frame.results[number],
    "input": lambda frame, number: frame.inputs[number],
    "tensor": _Frame.tensor,
    "batch": _Frame.in_batch,
    "mode": _Frame.in_mode,
    "dtype": _Frame.dtype,
    "device": _Frame.device,
    "list": lambda frame, *items: [frame.decode(item) for item in items],
    "text": lambda frame, text: text,
    "float": lambda frame, text: float(text),  # JSON has no infinity
    "memory_format": lambda frame, name: getattr(torch, name),
    "layout": lambda frame, name: getattr(torch, name),
}


def _input_leaves(
    module: nn.Module,
    program: Program,
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[Any]:
    """The leaves of the arguments, checked against those the program was made for."""
    form, expected = program[INPUTS]
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if spec != _form(form):
        args, kwargs = _as_traced(module, _form(form), signature, args, kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != _form(form):
            raise ModelError(
                f"{_name(module)} takes the arguments {_form(form)}, not {spec}. "
                "Call it as it was called when it was compressed."
            )
    frame = _Frame(module, program, leaves) if program[BATCH] else None
    for leaf, (kind, *rest) in zip(leaves, expected, strict=True):
        if (kind == "tensor") != isinstance(leaf, Tensor):
            raise _other_argument(module, leaf, kind)
        if kind == "constant" and leaf is not rest[0] and leaf != rest[0]:
            raise _other_argument(module, leaf, rest[0])
        if kind == "tensor" and rest and torch._C._get_tracing_state() is None:
            sizes = [frame.decode(size) if frame else size for size in rest]
            if list(leaf.shape) != sizes:
                raise ModelError(
                    f"{_name(module)} takes a tensor of shape {tuple(sizes)}, not "
                    f"{tuple(leaf.shape)}: only its batch may change. "
                    "Give inputs of the size that it was compressed with."
                )
    return leaves


def _as_traced(
    module: nn.Module,
    form: pytree.TreeSpec,
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with arguments by position or by name as `form` has them.

    What `form` does not have must be the default, which the program has in it.
    """
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    try:
        bound = signature.bind(module, *args, **kwargs)
    except TypeError as error:
        raise ModelError(
            f"{_name(module)} cannot be called so: {error}. "
            "Call it as it was called when it was compressed."
        ) from error
    bound.apply_defaults()
    by_position, by_name = pytree.tree_unflatten(range(form.num_leaves), form)
    count, names = len(by_position), list(by_name)
    values, named = list(bound.args[1:]), dict(bound.kwargs)
    positions = list(signature.parameters)[1:]
    named |= dict(zip(positions[count:], values[count:], strict=False))
    for name in set(named) - set(names):
        default = defaults.get(name, inspect.Parameter.empty)
        if named[name] is not default and not _is_equal(named[name], default):
            raise ModelError(
                f"{_name(module)} was compressed without the argument {name!r}; it now got a "
                f"{type(named[name]).__name__}. Leave it out, or compress with it."
            )
    return tuple(values[:count]), {name: named[name] for name in names if name in named}


def _is_equal(value: Any, default: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) and value == default


def _other_argument(module: nn.Module, value: Any, expected: Any) -> ModelError:
    got = "a tensor" if isinstance(value, Tensor) else repr(value)
    return ModelError(
        f"{_name(module)} was compressed with the argument {expected!r}; it now got {got}. "
        "Call it as it was called when it was compressed."
    )


def _name(module: nn.Module) -> str:
    name = type(module).__name__.removeprefix("Programmed")
    return f"The compressed {name}"
