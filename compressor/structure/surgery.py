"""The one door for edits: the only code that replaces or reshapes a module. All of it in place.

A module or parameter that hangs in several places is changed in all of them. Every edit returns an
`Edit`, by which a trainer rebinds its optimizer to the new parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from compressor.errors import SurgeryError, suggest
from compressor.structure.groups import ChannelGroup, Side
from compressor.structure.layers import Axis, layer_axis, set_channels

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
    tensor = _own_tensor(get(model, owner), key, name)
    if not -tensor.dim() <= dim < tensor.dim():
        raise SurgeryError(f"{name!r} has {tensor.dim()} dimensions; there is no dimension {dim}.")
    _check_kept(name, kept, tensor.shape[dim])
    return _slice(_holders(model)[id(tensor)], [(dim % tensor.dim(), tuple(kept))])


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


def keep_channels(model: nn.Module, group: ChannelGroup, kept: Sequence[int]) -> Edit:
    """Keep the channels `kept` of `group`, remove the others from all its layers, in place.

    Args:
        model: of the same structure as the one in which `group` was found.
        group: of `find_groups`.
        kept: numbers below `group.size`, ascending.

    Raises:
        SurgeryError: if the model would break; then it is left as it was. Also when another group
            was cut from a layer that this one passes through: cut both with `keep_many`.
    """
    return keep_many(model, [(group, kept)])


def keep_many(model: nn.Module, cuts: Iterable[tuple[ChannelGroup, Sequence[int]]]) -> Edit:
    """`keep_channels` for several groups of one model at once, in place.

    Groups may share a layer, as those that a concatenation joins do: the numbers of one would be
    wrong after the other is cut, so they are cut together.

    Raises:
        SurgeryError: if the model would break; then it is left as it was.
    """
    sides = _kept_entries(cuts)
    layers = {name: get(model, name) for name, _ in sides}
    axes: dict[tuple[str, Side], Axis] = {}
    for (name, side), (size, _) in sides.items():
        axes[name, side] = axis = layer_axis(layers[name], side)
        if axis.size != size:
            raise SurgeryError(
                f"{name!r} has {axis.size} {side} channels, not the {size} of its group. "
                "Cut groups that share a layer in one `keep_many`, or find them again."
            )
    _check_blocks(layers, axes, sides)
    edit = Edit()
    for holders, cuts_of_tensor in _cuts_by_tensor(model, layers, axes, sides):
        edit = edit.then(_slice(holders, cuts_of_tensor))
    for (name, side), (_, entries) in sides.items():
        set_channels(layers[name], side, len(entries))
    return edit


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, `model` may be edited; at its end it has its old modules and tensors.

    For trying an edit out without a copy. Values written into a tensor in place stay written.
    """
    saved = [
        (store, dict(store))
        for module in model.modules()
        for store in (vars(module), module._parameters, module._buffers, module._modules)
    ]
    try:
        yield
    finally:
        for store, values in saved:
            store.clear()
            store.update(values)


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def _difference(before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> Edit:
    return Edit(
        added=frozenset(name for name, value in after.items() if before.get(name) is not value),
        removed=frozenset(name for name, value in before.items() if after.get(name) is not value),
    )


@dataclass(frozen=True)
class _Holder:
    """One name of a tensor."""

    name: str
    module: nn.Module
    key: str


def _holders(model: nn.Module) -> dict[int, list[_Holder]]:
    """All names of each parameter and buffer, by the `id` of the tensor."""
    holders: dict[int, list[_Holder]] = defaultdict(list)
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                name = f"{prefix}.{key}" if prefix else key
                holders[id(tensor)].append(_Holder(name, module, key))
    return holders


def _slice(holders: Sequence[_Holder], cuts: Sequence[Slice]) -> Edit:
    old = new = getattr(holders[0].module, holders[0].key)
    for dim, kept in cuts:
        new = new.detach().index_select(dim, torch.tensor(kept, device=new.device))
    is_parameter = isinstance(old, nn.Parameter)
    if is_parameter:
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for holder in holders:
        setattr(holder.module, holder.key, new)
    return Edit({holder.name: tuple(cuts) for holder in holders if is_parameter})


def _own_tensor(owner: nn.Module, key: str, name: str) -> Tensor:
    if is_parametrized(owner, key):
        raise SurgeryError(
            f"{name!r} is computed by a parametrization and cannot be reshaped. Bake it in first: "
            f"torch.nn.utils.parametrize.remove_parametrizations(module, {key!r})."
        )
    tensor: Tensor | None = owner._parameters.get(key)
    if tensor is None:
        tensor = owner._buffers.get(key)
    if tensor is not None:
        return tensor
    if isinstance(getattr(owner, key, None), Tensor):
        raise SurgeryError(
            f"{name!r} is computed by a hook (weight_norm, spectral_norm) and cannot be reshaped. "
            f"Bake it in first: torch.nn.utils.remove_weight_norm(module, {key!r}) or the like."
        )
    raise SurgeryError(f"The model has no parameter or buffer {name!r}.")


def _check_kept(name: str, kept: Sequence[int], size: int) -> None:
    ascending = all(a < b for a, b in pairwise(kept))
    if not kept or not ascending or kept[0] < 0 or kept[-1] >= size:
        raise SurgeryError(
            f"Cannot keep {list(kept)[:8]} of the {size} entries of {name!r}. "
            f"Give at least one number from 0 to {size - 1}, ascending, each once."
        )


Sides = dict[tuple[str, Side], tuple[int, tuple[int, ...]]]


def _kept_entries(cuts: Iterable[tuple[ChannelGroup, Sequence[int]]]) -> Sides:
    """For each side of each layer: its size, and the entries that stay."""
    sizes: dict[tuple[str, Side], int] = {}
    pruned: dict[tuple[str, Side], set[int]] = defaultdict(set)
    for group, kept in cuts:
        _check_kept(group.name, kept, group.size)
        stays = set(kept)
        for member in group.members:
            key = (member.module, member.side)
            if any(not 0 <= entry < member.size for own in member.index for entry in own):
                raise SurgeryError(
                    f"The group {group.name!r} has channels beyond the {member.size} {member.side} "
                    f"channels of {member.module!r}. It does not describe this model."
                )
            if sizes.setdefault(key, member.size) != member.size:
                raise SurgeryError(f"The groups at {member.module!r} are not of one model.")
            for channel in range(group.size):
                if channel not in stays:
                    pruned[key].update(member.index[channel])
    return {
        key: (size, tuple(entry for entry in range(size) if entry not in pruned[key]))
        for key, size in sizes.items()
    }


def _check_blocks(
    layers: Mapping[str, nn.Module], axes: Mapping[tuple[str, Side], Axis], sides: Sides
) -> None:
    """Grouped convolutions and group norms lose whole blocks, a convolution the same ones twice."""
    for (name, side), axis in axes.items():
        size, entries = sides[name, side]
        if not entries:
            raise SurgeryError(
                f"All {side} channels of {name!r} would be removed. Keep one at least."
            )
        if axis.blocks == 1:
            continue
        blocks = {axis.block_of(entry) for entry in entries}
        if len(entries) * axis.blocks != len(blocks) * size:
            raise SurgeryError(
                f"{name!r} works in {axis.blocks} blocks of {size // axis.blocks} {side} channels, "
                f"of which only whole ones can be kept; {len(entries)} channels would be."
            )
        if isinstance(layers[name], nn.GroupNorm):
            continue
        other: Side = "in" if side == "out" else "out"
        there = sides.get((name, other))
        if there is None or blocks != {axes[name, other].block_of(entry) for entry in there[1]}:
            raise SurgeryError(
                f"The grouped convolution {name!r} would lose other blocks of its {side} channels "
                f"than of its {other} channels. Cut both with one group."
            )


def _cuts_by_tensor(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    axes: Mapping[tuple[str, Side], Axis],
    sides: Sides,
) -> list[tuple[list[_Holder], list[Slice]]]:
    """What to keep of each tensor; all modules that hold a tied one must agree."""
    cuts: dict[int, dict[int, tuple[int, ...]]] = defaultdict(dict)  # tensor -> dim -> kept
    cutters: dict[tuple[int, int], set[int]] = defaultdict(set)  # (tensor, dim) -> modules
    holders = _holders(model)
    for (name, side), axis in axes.items():
        layer, entries = layers[name], sides[name, side][1]
        for key, dim in axis.tensors:
            if getattr(layer, key, None) is None:  # no bias, no affine
                continue
            tensor = _own_tensor(layer, key, f"{name}.{key}")
            if cuts[id(tensor)].setdefault(dim, entries) != entries:
                raise SurgeryError(
                    f"{name + '.' + key!r} is tied, and the layers that hold it would keep "
                    "different entries. Prune none of them, or untie the parameter."
                )
            cutters[id(tensor), dim].add(id(layer))
    for (tensor_id, _), modules in cutters.items():
        outside = [h.name for h in holders[tensor_id] if id(h.module) not in modules]
        if outside:
            raise SurgeryError(
                f"{outside[0]!r} is tied to a parameter of the channel group and would be cut with "
                "it. Prune neither, or untie the parameter."
            )
    return [(holders[tensor], list(by_dim.items())) for tensor, by_dim in cuts.items()]
