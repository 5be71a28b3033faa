"""Whether all processes train the same model, to the bit; and the one thing in which they may not.

What a batch norm has seen differs between processes that see different samples. All else must not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compressor.distributed.context import Context
from compressor.distributed.failures import RankError

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**22  # entries that are summed at once: 8 bytes each, several times
# Multipliers of SplitMix64 (Steele, Lea and Flood, 2014), as signed numbers.
_GOLDEN, _MIX = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64


class DivergedRanksError(RankError):
    """The processes no longer train the same model; the message names where it begins."""


class Entry(NamedTuple):
    """What is compared of a parameter or buffer.

    Attributes:
        name: of it.
        kind: "parameter" or "buffer".
        shape: of it.
        dtype: of it.
        value: from which its content is known, but for accidents; 0 where only the form counts.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    value: int = 0


def check_structure(context: Context, model: nn.Module) -> None:
    """Do nothing if parameters and buffers have the same names, shapes and types everywhere.

    Raises:
        DivergedRanksError: naming the first that has not, in all processes.
    """
    if context.world_size > 1:
        _compare(context, [entry for entry, _ in _entries(model)])


def check_agreement(context: Context, model: nn.Module) -> None:
    """Do nothing if parameters and buffers are equal in all processes, to the bit.

    Raises:
        DivergedRanksError: naming the first that is not, in all processes.
    """
    if context.world_size > 1:
        pairs = _entries(model)
        values = digests([tensor for _, tensor in pairs])
        entries = [entry for entry, _ in pairs]
        _compare(context, [e._replace(value=v) for e, v in zip(entries, values, strict=True)])


def agree(context: Context, model: nn.Module) -> None:
    """Check that the model is the same everywhere, and make its buffers so, in place.

    Raises:
        DivergedRanksError: if it is not; only buffers' values may differ.
    """
    check_structure(context, model)
    agree_on(context, list(model.buffers()))
    check_agreement(context, model)


def agree_on(context: Context, tensors: Sequence[Tensor]) -> None:
    """Set floating `tensors` to their mean over all, and others to those of rank 0, in place.

    They are equal to the bit then: where rank 0 has 0.0 and another -0.0, both have 0.0. What is
    equal everywhere stays as it is.

    Args:
        context: the processes.
        tensors: of the same shapes in all of them.
    """
    if context.world_size == 1 or not tensors:
        return
    with torch.no_grad():
        first = [tensor.detach().clone() for tensor in tensors]
        context.broadcast(first)
        # Differences are averaged: a mean of equal values would be rounded, and inf stays inf.
        changes = [
            _at_least_float(torch.where(tensor == base, torch.zeros_like(tensor), tensor - base))
            for tensor, base in zip(tensors, first, strict=True)
            if tensor.is_floating_point()
        ]
        if changes:
            context.average(changes)
        left = iter(changes)
        for tensor, base in zip(tensors, first, strict=True):
            agreed = base
            if tensor.is_floating_point():
                change = next(left)
                agreed = torch.where(change == 0, base, (base + change).to(base.dtype))
            is_equal = torch.equal(_bits(tensor), _bits(agreed))
            if not is_equal:  # an expanded one cannot be written to
                tensor.copy_(agreed)


def digests(tensors: Sequence[Tensor]) -> list[int]:
    """A number for each, which is another if a bit of it is another, but for accidents.

    It is computed where the tensor is, so that only the number leaves the GPU.
    """
    sums = [_digest(tensor.detach()) for tensor in tensors]
    if not sums:
        return []
    numbers: list[int] = torch.stack([value.to(sums[0].device) for value in sums]).tolist()
    return numbers


def _at_least_float(tensor: Tensor) -> Tensor:
    """In float32, unless it is more precise: halves are not averaged."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _digest(tensor: Tensor) -> Tensor:
    """Sum of bits × a number that belongs to the position, modulo 2**64."""
    bits = _bits(tensor)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for first in range(0, len(bits), _CHUNK):
        part = bits[first : first + _CHUNK].long()
        positions = torch.arange(first + 1, first + 1 + len(part), device=bits.device)
        mixed = positions * _GOLDEN
        total += (part * ((mixed ^ (mixed >> 31)) * _MIX)).sum()
    return total


def _bits(tensor: Tensor) -> Tensor:
    """The entries as integers, in a row."""
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.dtype is torch.bool:
        tensor = tensor.to(torch.int8)
    flat = tensor.contiguous().reshape(-1)
    return flat.view(_INTEGERS[flat.element_size()])


def _entries(model: nn.Module) -> list[tuple[Entry, Tensor]]:
    named = [
        *((name, "parameter", value) for name, value in model.named_parameters()),
        *((name, "buffer", value) for name, value in model.named_buffers()),
    ]
    return [
        (Entry(name, kind, tuple(value.shape), str(value.dtype)), value)
        for name, kind, value in named
    ]


def _compare(context: Context, own: list[Entry]) -> None:
    digest = hashlib.sha256(repr(own).encode()).digest()
    if len(set(context.gather(digest))) == 1:
        return
    everybody = [{entry.name: entry for entry in entries} for entries in context.gather(own)]
    names = dict.fromkeys(name for entries in everybody for name in entries)
    for name in names:
        found = [entries.get(name) for entries in everybody]
        if len(set(found)) > 1:
            raise DivergedRanksError(
                f"{_describe(name, found)} All processes must change a model alike: decide from "
                "what they have in common, such as weights and averaged gradients, or give all the "
                "decision of rank 0 (`state.context.share`)."
            )
    raise DivergedRanksError(
        "The processes have the same parameters in another order. Build the model alike in all."
    )


def _describe(name: str, found: Sequence[Entry | None]) -> str:
    """Which processes have what."""
    groups: dict[str, list[int]] = {}
    for rank, entry in enumerate(found):
        groups.setdefault(_form(entry), []).append(rank)
    kind = next(entry.kind for entry in found if entry is not None)
    if len(groups) > 1:
        forms = ", ".join(f"{form} in {_ranks(ranks)}" for form, ranks in groups.items())
        return f"The {kind} {name!r} is not the same in all processes: {forms}."
    values: dict[int, list[int]] = {}
    for rank, entry in enumerate(found):
        assert entry is not None
        values.setdefault(entry.value, []).append(rank)
    parties = " and ".join(_ranks(ranks) for ranks in values.values())
    return f"The {kind} {name!r} has other values in {parties}."


def _form(entry: Entry | None) -> str:
    return "missing" if entry is None else f"{entry.shape} of {entry.dtype}"


def _ranks(ranks: Sequence[int]) -> str:
    word = "rank" if len(ranks) == 1 else "ranks"
    return f"{word} {', '.join(map(str, ranks))}"
