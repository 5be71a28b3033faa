"""Channels are cut from all the tensors that they run through, at once and in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compressor.errors import SurgeryError
from compressor.structure.attention import is_replaceable, make_prunable
from compressor.structure.groups import ChannelGroup
from compressor.structure.layers import block_size, count_channels
from compressor.structure.programs.programmed import is_programmed
from compressor.structure.surgery import (
    Edit,
    Holder,
    check_kept,
    get,
    holders_of,
    own_tensor,
    replace,
    reprogram,
    slice_tensor,
    whole_or_not_at_all,
)


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
    cuts = [(group, tuple(kept)) for group, kept in cuts]
    with whole_or_not_at_all(model):
        edit = _prepare(model, cuts)
        tensors = _named_tensors(model)
        holders = holders_of(model)
        sliced: dict[int, dict[int, tuple[int, ...]]] = defaultdict(dict)
        for (name, dim), kept in _kept_entries(cuts).items():
            tensor = _find_tensor(tensors, model, name)
            kept.check(name, tensor.shape[dim])
            for holder in holders[id(tensor)]:
                _check_blocks(holder, dim, kept)
            if sliced[id(tensor)].setdefault(dim, kept.entries) != kept.entries:
                raise SurgeryError(
                    f"{name!r} is tied, and its names would keep different entries. "
                    "Prune neither, or untie the parameter."
                )
        for number, cut in sliced.items():
            slices = [(dim, entries) for dim, entries in cut.items()]
            if any(len(entries) < _size(holders[number], dim) for dim, entries in slices):
                edit = edit.then(slice_tensor(holders[number], slices))
        for module in {holder.module for number in sliced for holder in holders[number]}:
            count_channels(module)
        _lower_counts(model, cuts)
    return edit


@dataclass(frozen=True)
class _Kept:
    """The entries of one dimension of a tensor that stay."""

    size: int
    entries: tuple[int, ...]

    def check(self, name: str, size: int) -> None:
        if size != self.size:
            raise SurgeryError(
                f"{name!r} has {size} entries, not the {self.size} of its group. "
                "Cut groups that share a layer in one `keep_many`, or find them again."
            )
        if not self.entries:
            raise SurgeryError(f"All entries of {name!r} would be removed. Keep one at least.")


def _prepare(model: nn.Module, cuts: Sequence[tuple[ChannelGroup, Sequence[int]]]) -> Edit:
    """Give modules of hard-wired width a form that can be cut."""
    edit = Edit()
    for step in dict.fromkeys(step for group, _ in cuts for step in group.prepared):
        module = get(model, step.module)
        if step.program:
            if not is_programmed(module):
                reprogram(model, step.module, step.program)
        elif is_replaceable(module):
            edit = edit.then(replace(model, step.module, make_prunable(module)))
    return edit


def _kept_entries(
    cuts: Sequence[tuple[ChannelGroup, Sequence[int]]],
) -> dict[tuple[str, int], _Kept]:
    """For each dimension of each tensor: its size, and the entries that stay."""
    sizes: dict[tuple[str, int], int] = {}
    pruned: dict[tuple[str, int], set[int]] = defaultdict(set)
    for group, kept in cuts:
        check_kept(group.name, kept, group.size)
        for member in group.members:
            key = (member.tensor, member.dim)
            if any(not 0 <= entry < member.size for own in member.index for entry in own):
                raise SurgeryError(
                    f"The group {group.name!r} has channels beyond the {member.size} entries of "
                    f"{member.tensor!r}. It does not describe this model."
                )
            if sizes.setdefault(key, member.size) != member.size:
                raise SurgeryError(f"The groups at {member.tensor!r} are not of one model.")
            pruned[key].update(e for c in group.pruned(kept) for e in member.index[c])
    return {
        key: _Kept(size, tuple(entry for entry in range(size) if entry not in pruned[key]))
        for key, size in sizes.items()
    }


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _find_tensor(tensors: Mapping[str, Tensor], model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer `name`, which surgery may reshape."""
    owner, _, key = name.rpartition(".")
    if name not in tensors:
        return own_tensor(get(model, owner), key, name)  # raises: says what is in the way
    return tensors[name]


def _check_blocks(holder: Holder, dim: int, kept: _Kept) -> None:
    """Grouped convolutions and group norms lose whole blocks."""
    block = block_size(holder.module, holder.key, dim)
    if block > 1 and len(kept.entries) != block * len({entry // block for entry in kept.entries}):
        raise SurgeryError(
            f"{holder.name!r} works in blocks of {block} channels, of which only whole ones can be "
            f"kept; {len(kept.entries)} of {kept.size} channels would be."
        )


def _lower_counts(model: nn.Module, cuts: Sequence[tuple[ChannelGroup, Sequence[int]]]) -> None:
    lowered: dict[tuple[str, str, tuple[int, ...]], int] = defaultdict(int)
    for group, kept in cuts:
        for count in group.counts:
            fall = sum(count.amounts[channel] for channel in group.pruned(kept))
            lowered[count.module, count.attribute, count.path] += fall
    for (name, attribute, path), fall in lowered.items():
        if fall:
            module = get(model, name)
            setattr(module, attribute, _lower(getattr(module, attribute), path, fall))


def _lower(value: Any, path: tuple[int, ...], fall: int) -> Any:
    """`value` with the integer at `path` in its nested tuples made less by `fall`."""
    if not path:
        return value - fall
    first, *rest = path
    return (*value[:first], _lower(value[first], tuple(rest), fall), *value[first + 1 :])


def _size(holders: Sequence[Holder], dim: int) -> int:
    size: int = getattr(holders[0].module, holders[0].key).shape[dim]
    return size
