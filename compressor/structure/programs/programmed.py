"""Modules that run a program instead of their code: see `program`."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import SurgeryError
from compressor.structure.programs.program import BUFFERS, Program, check_program, run_program

ATTRIBUTE = "compressor_program"  # no name that a user's class has


class Programmed(nn.Module):
    """Base of a module whose `forward` runs its `program` once it has one; see `set_program`."""

    def _get_name(self) -> str:
        prefix = "Programmed" if is_programmed(self) else ""
        return prefix + base_class(self).__name__


def set_program(module: nn.Module, program: Program) -> None:
    """Let `module` run `program` instead of its `forward`, in place; it stays of its class.

    Everything else stays too: children, parameters, other methods, hooks. `copy.deepcopy` works,
    pickling the whole module does not: save its state dict and `describe.diff`.

    Args:
        module: of the structure that `program` was made of; or programmed, then the program is
            replaced, and buffers that it has already stay as they are.
        program: of `trace_program`.

    Raises:
        CheckpointError: if `program` names what a program may not run.
        SurgeryError: if the module has an attribute or a buffer of its own in the way.
    """
    check_program(program)
    names = [ATTRIBUTE, *(name for name, *_ in program[BUFFERS])]
    taken = [name for name in names if hasattr(module, name)]
    if taken and not is_programmed(module):
        raise SurgeryError(
            f"A {type(module).__name__} has an attribute {taken[0]!r}, which its program would "
            "overwrite. Rename the attribute."
        )
    for name, *source in program[BUFFERS]:
        if name not in module._buffers:
            module.register_buffer(name, _new_buffer(module, *source))
    if not isinstance(module, Programmed):
        cls: Any = type(module)  # of which mypy does not see that it is hashable
        module.__class__ = _programmed_class(cls)
    setattr(module, ATTRIBUTE, program)


def is_programmed(module: nn.Module) -> bool:
    """Whether `module` runs a program instead of its own `forward`."""
    return isinstance(module, Programmed) and ATTRIBUTE in vars(module)


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class that `module` was made as, whether it is programmed or not."""
    cls = type(module)
    return cls.__bases__[1] if issubclass(cls, Programmed) else cls


def _new_buffer(module: nn.Module, kind: str, *source: Any) -> Tensor:
    if kind == "attribute":
        owner, _, key = source[0].rpartition(".")
        found: Tensor = getattr(module.get_submodule(owner), key)
        return found.detach().clone()
    dtype, shape, entries = source
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)
    return torch.tensor(entries, dtype=getattr(torch, dtype), device=device).reshape(shape)


@cache
def _programmed_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `cls` that runs its program; one for each class, so that types compare."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not is_programmed(self):  # the edit was undone
            return cls.forward(self, *args, **kwargs)
        return run_program(self, getattr(self, ATTRIBUTE), signature, args, kwargs)

    signature = inspect.signature(cls.forward)
    # exporters and forward passes read the names of the arguments
    forward.__signature__ = signature  # type: ignore[attr-defined]
    namespace = {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(f"Programmed{cls.__name__}", (Programmed, cls), namespace)
