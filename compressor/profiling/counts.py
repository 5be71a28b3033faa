"""Parameters and multiply-accumulates of a model, counted on one real forward.

Each ATen operation is looked up in `formulas` and booked on the innermost module that runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.formulas import macs_of
from compressor.profiling.inference import inference, plain_attention


@dataclass(frozen=True)
class LayerCount:
    """A module that has parameters of its own or that computes.

    Attributes:
        name: by `named_modules`; "" is the model itself.
        type: name of the class.
        params: of its own, not of its children; a tied tensor belongs to the first of its layers.
        macs: of all its calls in one forward.
        input_shape: of the first tensor of its first call; () if it was not called.
        output_shape: likewise.
        parameter_bytes: of `params`, in their dtype.
    """

    name: str
    type: str
    params: int
    macs: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameter_bytes: int


@dataclass(frozen=True)
class Counts:
    """What a model is made of and what one call computes.

    Attributes:
        params: all of them, frozen ones too, a tied one once.
        macs: of one call with the inputs given, all samples of the batch together.
        layers: in the order of `named_modules`; their `params` and `macs` add up to the model's.
        uncounted: operations with arithmetic of unknown cost, and how often they ran.
    """

    params: int
    macs: int
    layers: tuple[LayerCount, ...]
    uncounted: Mapping[str, int]


def count(model: nn.Module, inputs: ModelInputs) -> Counts:
    """Count on one forward in evaluation mode; mode, gradients and random state are restored.

    Args:
        model: called once.
        inputs: on the model's device.

    >>> import torch
    >>> conv = nn.Conv2d(16, 32, 3, padding=1, bias=False)
    >>> count(conv, ModelInputs((torch.zeros(1, 16, 8, 8),))).macs
    294912
    """
    calls = _Calls()
    with inference(model), plain_attention(), _watched(model, calls), _CountingMode(calls):
        inputs.call(model)
    layers = tuple(_layers(model, calls))
    return Counts(
        params=sum(layer.params for layer in layers),
        macs=sum(layer.macs for layer in layers),
        layers=layers,
        uncounted=dict(calls.uncounted),
    )


@dataclass
class _Calls:
    """What is seen during the forward, by module name."""

    running: list[str] = field(default_factory=lambda: [""])
    macs: Counter[str] = field(default_factory=Counter)
    input_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    output_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    uncounted: Counter[str] = field(default_factory=Counter)


class _CountingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, calls: _Calls) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = calls

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        macs = macs_of(func, args, result)
        if macs is None:
            self.calls.uncounted[func.overloadpacket._qualified_op_name] += 1
        else:
            self.calls.macs[self.calls.running[-1]] += macs
        return result


@contextmanager
def _watched(model: nn.Module, calls: _Calls) -> Iterator[None]:
    """Note in `calls` which module runs, and its shapes."""
    with ExitStack() as stack:
        for name, module in model.named_modules():

            def enter(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                calls.running.append(name)
                calls.input_shapes.setdefault(name, _first_shape((args, kwargs)))

            def leave(_: nn.Module, args: Any, result: Any, name: str = name) -> None:
                calls.running.pop()
                calls.output_shapes.setdefault(name, _first_shape(result))

            before = module.register_forward_pre_hook(enter, with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield


def _first_shape(value: Any) -> tuple[int, ...]:
    leaves = pytree.tree_leaves(value)
    return next((tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)), ())


def _layers(model: nn.Module, calls: _Calls) -> Iterator[LayerCount]:
    owned: set[Tensor] = set()  # tensors hash by identity
    for name, module in model.named_modules():
        parameters = [p for p in module.parameters(recurse=False) if p not in owned]
        owned.update(parameters)
        has_parameters = any(True for _ in module.parameters(recurse=False))
        if has_parameters or calls.macs[name]:
            yield LayerCount(
                name,
                type(module).__name__,
                params=sum(p.numel() for p in parameters),
                macs=calls.macs[name],
                input_shape=calls.input_shapes.get(name, ()),
                output_shape=calls.output_shapes.get(name, ()),
                parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
            )
