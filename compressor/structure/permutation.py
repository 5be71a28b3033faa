"""Another order of the channels of a group, in place: the model computes what it did."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from compressor.errors import SurgeryError
from compressor.structure import surgery
from compressor.structure.groups import ChannelGroup, Member
from compressor.structure.surgery import Edit


def permute_channels(model: nn.Module, group: ChannelGroup, order: Sequence[int]) -> Edit:
    """Put channel `order[i]` of `group` where channel i is, in all its tensors, in place.

    Whether the model still computes the same is for the caller to check: what removes channels one
    by one may hold them in a fixed order, such as the groups of a convolution.

    Args:
        model: in which the group was found.
        group: that needs no preparation, of channels with equally many entries.
        order: its channels, each once.

    Raises:
        SurgeryError: if `order` is none, the group does not allow one, or a tensor is in no state
            dict, which would bring the old order back.
    """
    if sorted(order) != list(range(group.size)):
        raise SurgeryError(
            f"{list(order)[:8]} is no order of the {group.size} channels of {group.name!r}. "
            "Name each once."
        )
    if group.prepared:
        raise SurgeryError(
            f"Channels of {group.name!r} are cut from modules that are remade for it, so they have "
            "no order in this model."
        )
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    moves = [(member, _moved_entries(group, member, order)) for member in group.members]
    for member, _ in moves:
        owner = surgery.get(model, member.module)
        key = member.tensor.rpartition(".")[2]
        if member.tensor not in tensors or key in owner._non_persistent_buffers_set:
            raise SurgeryError(
                f"{member.tensor!r} is in no state dict, so a loaded model would have its channels "
                f"in the old order. Leave {group.name!r} as it is."
            )
    edit = Edit()
    for member, entries in moves:
        old = tensors[member.tensor]
        new = old.detach().index_select(member.dim, torch.tensor(entries, device=old.device))
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        for name in [name for name, tensor in tensors.items() if tensor is old]:
            edit = edit.then(surgery.set_tensor(model, name, new))
            tensors[name] = new
    return edit


def _moved_entries(group: ChannelGroup, member: Member, order: Sequence[int]) -> list[int]:
    """For each entry of the dimension, which one comes there."""
    moved = list(range(member.size))
    for here, there in zip(member.index, (member.index[c] for c in order), strict=True):
        if len(here) != len(there):
            raise SurgeryError(
                f"The channels of {group.name!r} have {len(here)} and {len(there)} entries in "
                f"{member.tensor!r}, so none can take another's place."
            )
        for slot, entry in zip(here, there, strict=True):
            moved[slot] = entry
    return moved
