"""Tensors in fewer bytes without loss: zeros as bits of a mask, few values as a palette.

A tensor becomes the smallest of four forms: as it is; a mask and the values that are not zero; a
palette and an index an entry; a mask, a palette and an index for each entry that is not zero. All
are tensors under the name of the whole, so that any format which holds named tensors holds them.
After Han et al. 2016, Deep compression (1510.00149), without its entropy coding.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
import torch
from torch import Tensor

from compressor.errors import CheckpointError

MARK = ".."  # in no name of a state dict, whose parts are never empty
LARGEST_PALETTE = 256
SAMPLE = 65536  # entries in which too many values are soon found
# Of a safetensors header an entry: name, dtype, shape and offsets. A tensor is taken apart only
# where it pays for them.
ENTRY_BYTES = 100
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """`tensor` in its smallest form, as one to three tensors on the CPU; for `unpack`.

    Bit for bit: -0.0 is no zero, and every NaN is a value of its own.

    Args:
        name: of the tensor; the parts are called "name..mask.2x3" and the like, where 2x3 is its
            shape.
        tensor: of any shape and dtype.

    Raises:
        CheckpointError: if `name` looks like that of a part.

    >>> sorted(pack("w", torch.eye(64)))
    ['w..indices.64x64', 'w..palette']
    >>> list(pack("w", torch.arange(4.0)))
    ['w']
    """
    if MARK in name:
        raise CheckpointError(
            f"The tensor name {name!r} has {MARK!r}, which marks the parts of packed tensors. "
            "Rename the module that holds it."
        )
    tensor = tensor.detach().cpu().contiguous()
    words = _words(tensor)
    if words is None:
        return {name: tensor}
    size, bits = words.numel(), 8 * tensor.element_size()
    is_set = words != 0
    nonzero = int(is_set.sum())
    forms = [("dense", size * bits), ("mask", packed_bits(size, bits, nonzero=nonzero))]
    values = _few_values(words)
    if values is not None:
        few = len(values)
        of_set = few - int(bool((values == 0).any()))
        forms.append(("palette", packed_bits(size, bits, distinct=few)))
        forms.append(("both", packed_bits(size, bits, nonzero=nonzero, distinct=of_set)))
    form = min(forms, key=lambda each: each[1] + 8 * ENTRY_BYTES * _ENTRIES[each[0]])[0]
    if form == "dense":
        return {name: tensor}
    parts: dict[str, Tensor] = {}
    shape = "x".join(map(str, tensor.shape))
    flat = tensor.flatten()
    if form in ("mask", "both"):
        parts[f"{name}{MARK}mask.{shape}"] = _to_planes(is_set.to(torch.int64), 1)
        flat, words, shape = flat[is_set], words[is_set], ""
    if form == "mask":
        parts[f"{name}{MARK}values"] = flat
        return parts
    palette, indices = torch.unique(words, return_inverse=True)
    parts[f"{name}{MARK}palette"] = palette.view(tensor.dtype)
    parts[f"{name}{MARK}indices.{shape}"] = _to_planes(indices, index_bits(len(palette)))
    return parts


def unpack(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of which `pack` made `parts`, which may come from several calls.

    Raises:
        CheckpointError: if parts are missing or do not fit each other.
    """
    whole: dict[str, Tensor] = {}
    packed: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for key, tensor in parts.items():
        name, mark, rest = key.partition(MARK)
        if mark:
            kind, _, shape = rest.partition(".")
            packed.setdefault(name, {})[kind] = (shape, tensor)
        else:
            whole[name] = tensor
    for name, kinds in packed.items():
        try:
            whole[name] = _join(kinds)
        except (KeyError, IndexError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"The packed tensor {name!r} is damaged: {error!r}. Save the model again."
            ) from error
    return whole


def packed_bits(
    size: int, entry_bits: int, *, nonzero: int | None = None, distinct: int | None = None
) -> int:
    """Bits of a packed tensor, names and shapes left out.

    Args:
        size: entries of the tensor.
        entry_bits: of one entry as it is.
        nonzero: entries that are not zero, if the zeros are left out.
        distinct: different values among those that are stored, if they make a palette.

    >>> packed_bits(1000, 32, nonzero=250)
    9000
    >>> packed_bits(1000, 32, distinct=16)
    4512
    """
    mask = 0 if nonzero is None else 8 * _plane_bytes(size)
    stored = size if nonzero is None else nonzero
    if distinct is None:
        return mask + stored * entry_bits
    return mask + distinct * entry_bits + 8 * _plane_bytes(stored) * index_bits(distinct)


def stored_bits(size: int, entry_bits: int, **form: int) -> float:
    """Bits an entry that a file needs for a packed tensor, its part of the header included.

    Args:
        size: as in `packed_bits`.
        entry_bits: as in `packed_bits`; the most that is returned.
        **form: `nonzero`, `distinct` of `packed_bits`.
    """
    header = 8 * ENTRY_BYTES * len(form)
    return min((packed_bits(size, entry_bits, **form) + header) / size, float(entry_bits))


def index_bits(distinct: int) -> int:
    """Bits of an index into a palette of so many values."""
    return max(distinct - 1, 0).bit_length()


_ENTRIES = {"dense": 0, "mask": 1, "palette": 1, "both": 2}  # besides the one of any tensor


def _words(tensor: Tensor) -> Tensor | None:
    """The entries as integers of their size, flat; None for what has no such (complex128)."""
    word = WORDS.get(tensor.element_size())
    if word is None or tensor.is_quantized or not tensor.numel():
        return None
    return tensor.flatten().view(word)


def _few_values(words: Tensor) -> Tensor | None:
    """The different entries; None if they are more than a palette takes."""
    if len(torch.unique(words[:SAMPLE])) > LARGEST_PALETTE:
        return None
    values: Tensor = torch.unique(words)
    return values if len(values) <= LARGEST_PALETTE else None


def _plane_bytes(count: int) -> int:
    return (count + 7) // 8


def _to_planes(indices: Tensor, bits: int) -> Tensor:
    """Integers -> (bits, bytes): the lowest bit of each, eight a byte, then the next bits."""
    planes = [np.packbits((indices >> bit & 1).to(torch.uint8).numpy()) for bit in range(bits)]
    if not planes:
        return torch.empty(0, _plane_bytes(len(indices)), dtype=torch.uint8)
    return torch.from_numpy(np.stack(planes))


def _from_planes(planes: Tensor, count: int) -> Tensor:
    """The inverse of `_to_planes`, for `count` integers."""
    if planes.dtype != torch.uint8 or planes.dim() != 2 or planes.shape[1] != _plane_bytes(count):
        raise ValueError(f"{tuple(planes.shape)} bytes for {count} entries")
    indices = torch.zeros(count, dtype=torch.int64)
    for bit, plane in enumerate(planes):
        indices |= torch.from_numpy(np.unpackbits(plane.numpy(), count=count)).long() << bit
    return indices


def _join(kinds: Mapping[str, tuple[str, Tensor]]) -> Tensor:
    if "mask" not in kinds:
        shape, indices = kinds["indices"]
        size = _parse_shape(shape)
        return kinds["palette"][1][_from_planes(indices, prod(size))].reshape(size)
    shape, mask = kinds["mask"]
    size = _parse_shape(shape)
    is_set = _from_planes(mask, prod(size)).bool()
    if "values" in kinds:
        values = kinds["values"][1]
    else:
        values = kinds["palette"][1][_from_planes(kinds["indices"][1], int(is_set.sum()))]
    if values.shape != (int(is_set.sum()),):
        raise ValueError(f"{tuple(values.shape)} values for {int(is_set.sum())} entries")
    # By words: some dtypes cannot be written by a mask.
    words = torch.zeros(prod(size), dtype=WORDS[values.element_size()])
    words[is_set] = values.view(words.dtype)
    return words.view(values.dtype).reshape(size)


def _parse_shape(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("x")) if text else ()
