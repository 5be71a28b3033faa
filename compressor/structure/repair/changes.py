"""What an edited model has of the one it is a copy of: which modules, which of their outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compressor.structure.programs.programmed import ATTRIBUTE
from compressor.structure.repair.linear_maps import as_linear_map
from compressor.structure.surgery import holders_of
from compressor.structure.trace import copy_skeleton

PLAIN = (bool, int, float, str)


def changed_modules(before: nn.Module, after: nn.Module) -> set[str]:
    """Names of the modules of `before` that in `after` compute something else, or are not there.

    A module in which another one changed is not listed for that; what `after` has new counts for
    the module that holds it.
    """
    old, new = dict(before.named_modules()), dict(after.named_modules())
    changed = {name for name in old if name not in new or not _is_same(old[name], new[name])}
    for name in new.keys() - old.keys():
        while name not in old:
            name = name.rpartition(".")[0]
        changed.add(name)
    return changed


def _is_same(old: nn.Module, new: nn.Module) -> bool:
    if type(old) is not type(new) or _plain(old) != _plain(new):
        return False
    for stores in ((old._parameters, new._parameters), (old._buffers, new._buffers)):
        if stores[0].keys() != stores[1].keys():
            return False
        if not all(_is_equal(stores[0][key], stores[1][key]) for key in stores[0]):
            return False
    return True


def _is_equal(old: Tensor | None, new: Tensor | None) -> bool:
    if old is None or new is None or old is new:
        return old is new
    return old.shape == new.shape and old.dtype == new.dtype and torch.equal(old, new)


def _plain(module: nn.Module) -> dict[str, Any]:
    """Numbers and words that say how a module computes."""
    found = {}
    for key, value in vars(module).items():
        if key == ATTRIBUTE or (key != "training" and not key.startswith("_")):
            items = value if isinstance(value, (tuple, list)) else (value,)
            if key == ATTRIBUTE or all(isinstance(item, PLAIN) for item in items):
                found[key] = value
    return found


def kept_outputs(model: nn.Module, edit: Callable[[nn.Module], None]) -> dict[str, Tensor]:
    """Which outputs of each layer `edit` keeps: numbers of the outputs in `model`, by layer.

    Seen on a copy in which every weight is the number of the output that it belongs to: edits
    choose entries of tensors. Layers whose weight is shared, or that `edit` makes anew, are not
    listed.

    Args:
        model: is not changed.
        edit: removes and chooses, in place; it must not look at the values of weights.
    """
    copy = copy_skeleton(model)
    shared = {key for key, holders in holders_of(copy).items() if len(holders) > 1}
    whole = {}
    for name, module in copy.named_modules():
        layer = as_linear_map(module)
        if layer is not None and id(layer.weight) not in shared:
            whole[name] = layer
            numbers = torch.arange(len(layer.weight), dtype=torch.float64)
            numbers = numbers.view(-1, *[1] * (layer.weight.dim() - 1)).expand(layer.weight.shape)
            layer._parameters["weight"] = nn.Parameter(numbers, requires_grad=False)
    edit(copy)
    found = {}
    for name, module in copy.named_modules():
        if whole.get(name) is module:
            numbers = whole[name].weight.detach().flatten(1)[:, 0]
            if bool((numbers == numbers.round()).all()):
                found[name] = numbers.long()
    return found
