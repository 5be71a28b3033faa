"""The one door for edits: the only code that replaces or reshapes a module. All of it in place.

What runs through many tensors at once, as channels do, comes in by `structure.cutting`.

A module or parameter that hangs in several places is changed in all of them. Every edit returns an
`Edit`, by which a trainer rebinds its optimizer to the new parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from compressor.errors import SurgeryError, suggest
from compressor.structure.programs.program import Program
from compressor.structure.programs.programmed import set_program

Slice = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class Edit:
    """What happened to the parameters of a model, under each of their names.

    A name in neither field holds the parameter object that it held before.

    Attributes:
        sliced: parameter name -> (dimension, kept entries), in the order of application.
        added: names that hold a parameter which was not in the model.
        removed: names whose parameter is gone. A name in both holds another parameter now.
    """

    sliced: Mapping[str, tuple[Slice, ...]] = field(default_factory=dict)
    added: frozenset[str] = frozenset()
    removed: frozenset[str] = frozenset()

    def then(self, later: Edit) -> Edit:
        """This edit followed by `later`, as one."""
        sliced = {name: cuts for name, cuts in self.sliced.items() if name not in later.removed}
        for name, cuts in later.sliced.items():
            if name not in self.added:  # a new parameter has no moments to slice
                sliced[name] = sliced.get(name, ()) + cuts
        # What came and went again was never there for the trainer, unless the name is older.
        return Edit(
            sliced,
            added=(self.added - later.removed) | later.added,
            removed=self.removed | (later.removed - self.added),
        )


class Skip(nn.Module):
    """Stands for a removed block: gives its first argument back."""

    def forward(self, x: Any, *_: Any, **__: Any) -> Any:
        """`x`, unchanged."""
        return x


def get(model: nn.Module, name: str) -> nn.Module:
    """The module called `name`; '' is the model itself.

    Raises:
        SurgeryError: if there is none.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        raise SurgeryError(f"The model has no module {name!r}. {suggest(name, modules)}")
    return modules[name]


def replace(model: nn.Module, name: str, new: nn.Module) -> Edit:
    """Put `new` where the module `name` is, and everywhere else that module hangs, in place.

    Raises:
        SurgeryError: for the root, which nothing holds, or an unknown name.
    """
    old = get(model, name)
    if old is model:
        raise SurgeryError(
            f"{name!r} is the whole model, which cannot be replaced inside itself. "
            "Use the new model instead of the old one."
        )
    new.train(old.training)
    before = _parameters(model)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new
    return _difference(before, _parameters(model))


def remove(model: nn.Module, name: str) -> Edit:
    """Delete the module `name` from its parent, in place. What calls it must be gone already.

    Raises:
        SurgeryError: for the root, or an unknown name.
    """
    if get(model, name) is model:
        raise SurgeryError("The whole model cannot be removed. Name one of its modules.")
    before = _parameters(model)
    parent, _, key = name.rpartition(".")
    del get(model, parent)._modules[key]
    return _difference(before, _parameters(model))


def slice_parameter(model: nn.Module, name: str, dim: int, kept: Sequence[int]) -> Edit:
    """Keep the entries `kept` of a parameter or buffer along `dim`, under all its names, in place.

    A parameter becomes a new one of the same dtype, device and `requires_grad`, without gradient.

    Raises:
        SurgeryError: if there is no such tensor, the dimension or an entry is out of range, or the
            tensor is computed by a parametrization.
    """
    owner, _, key = name.rpartition(".")
    tensor = own_tensor(get(model, owner), key, name)
    if not -tensor.dim() <= dim < tensor.dim():
        raise SurgeryError(f"{name!r} has {tensor.dim()} dimensions; there is no dimension {dim}.")
    check_kept(name, kept, tensor.shape[dim])
    return slice_tensor(holders_of(model)[id(tensor)], [(dim % tensor.dim(), tuple(kept))])


def reprogram(model: nn.Module, name: str, program: Program) -> None:
    """Let the module `name` run `program` instead of its code, in place; '' is the model itself.

    The module stays the same object, of its class, with its children and parameters. One that is
    programmed already gets another program.

    Raises:
        CheckpointError: if `program` names what a program may not run.
        SurgeryError: if there is no such module, or it has attributes of those names already.
    """
    set_program(get(model, name), program)


def set_tensor(model: nn.Module, name: str, value: Tensor | None) -> Edit:
    """Put `value` under one name of a parameter or buffer, in place; other names keep the old one.

    Raises:
        SurgeryError: if the model has no such name, or only one of old and new is a parameter.
    """
    owner_name, _, key = name.rpartition(".")
    owner = get(model, owner_name)
    before = _parameters(model)
    if key in owner._buffers and not isinstance(value, nn.Parameter):
        owner._buffers[key] = value
    elif key in owner._parameters and (value is None or isinstance(value, nn.Parameter)):
        owner.register_parameter(key, value)
    else:
        kind = "parameter" if isinstance(value, nn.Parameter) else "buffer"
        raise SurgeryError(f"The model has no {kind} {name!r}. Name one that it has.")
    return _difference(before, _parameters(model))


def parametrize(model: nn.Module, name: str, parametrization: nn.Module) -> Edit:
    """Let `parametrization` compute the parameter `name` of a module from what it was, in place.

    The trained parameter stays the same object, and is called "….parametrizations.weight.original"
    from then on; torch's `parametrize.remove_parametrizations` bakes the computed one in.

    Raises:
        SurgeryError: if there is no such parameter, or it is computed already.
    """
    owner_name, _, key = name.rpartition(".")
    owner = get(model, owner_name)
    own_tensor(owner, key, name)
    before = _parameters(model)
    register_parametrization(owner, key, parametrization)
    return _difference(before, _parameters(model))


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, `model` may be edited; at its end it has its old modules and tensors.

    For trying an edit out without a copy. Values written into a tensor in place stay written.
    """
    restore = _snapshot(model)
    try:
        yield
    finally:
        restore()


@contextmanager
def whole_or_not_at_all(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, `model` may be edited; if that fails, it is as it was."""
    restore = _snapshot(model)
    try:
        yield
    except BaseException:
        restore()
        raise


def _snapshot(model: nn.Module) -> Callable[[], None]:
    """What gives the modules of `model` the tensors, children and attributes back they have now."""
    modules = list(model.modules())
    classes = [type(module) for module in modules]
    saved = [
        (store, dict(store))
        for module in modules
        for store in (vars(module), module._parameters, module._buffers, module._modules)
    ]

    def restore() -> None:
        for module, cls in zip(modules, classes, strict=True):
            if type(module) is not cls:
                module.__class__ = cls
        for store, values in saved:
            store.clear()
            store.update(values)
        for module in modules:
            if isinstance(module, nn.RNNBase):  # its list of weights was changed in place
                module._flat_weights = [getattr(module, n) for n in module._flat_weights_names]

    return restore


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def _difference(before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> Edit:
    return Edit(
        added=frozenset(name for name, value in after.items() if before.get(name) is not value),
        removed=frozenset(name for name, value in before.items() if after.get(name) is not value),
    )


@dataclass(frozen=True)
class Holder:
    """One name of a tensor."""

    name: str
    module: nn.Module
    key: str


def holders_of(model: nn.Module) -> dict[int, list[Holder]]:
    """All names of each parameter and buffer, by the `id` of the tensor."""
    holders: dict[int, list[Holder]] = defaultdict(list)
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                name = f"{prefix}.{key}" if prefix else key
                holders[id(tensor)].append(Holder(name, module, key))
    return holders


def slice_tensor(holders: Sequence[Holder], cuts: Sequence[Slice]) -> Edit:
    """Keep entries of a tensor along some dimensions, under all its names, in place."""
    old = new = getattr(holders[0].module, holders[0].key)
    for dim, kept in cuts:
        new = new.detach().index_select(dim, torch.tensor(kept, device=new.device))
    is_parameter = isinstance(old, nn.Parameter)
    if is_parameter:
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for holder in holders:
        setattr(holder.module, holder.key, new)
    return Edit({holder.name: tuple(cuts) for holder in holders if is_parameter})


def own_tensor(owner: nn.Module, key: str, name: str) -> Tensor:
    """The parameter or buffer `key` of a module, which is `name` in the model.

    Raises:
        SurgeryError: if there is none, or it is computed by a parametrization or a hook.
    """
    if is_parametrized(owner, key):
        raise SurgeryError(
            f"{name!r} is computed by a parametrization and cannot be edited. Bake it in first: "
            f"torch.nn.utils.parametrize.remove_parametrizations(module, {key!r})."
        )
    tensor: Tensor | None = owner._parameters.get(key)
    if tensor is None:
        tensor = owner._buffers.get(key)
    if tensor is not None:
        return tensor
    if isinstance(getattr(owner, key, None), Tensor):
        raise SurgeryError(
            f"{name!r} is computed by a hook (weight_norm, spectral_norm) and cannot be edited. "
            f"Bake it in first: torch.nn.utils.remove_weight_norm(module, {key!r}) or the like."
        )
    raise SurgeryError(f"The model has no parameter or buffer {name!r}.")


def check_kept(name: str, kept: Sequence[int], size: int) -> None:
    """Check that some entries are kept, in order, of the `size` that `name` has.

    Raises:
        SurgeryError: if not.
    """
    ascending = all(a < b for a, b in pairwise(kept))
    if not kept or not ascending or kept[0] < 0 or kept[-1] >= size:
        raise SurgeryError(
            f"Cannot keep {list(kept)[:8]} of the {size} entries of {name!r}. "
            f"Give at least one number from 0 to {size - 1}, ascending, each once."
        )
