"""A compressed model's weights in the full shape of its reference, to cut deeper from there.

Where each weight came from is not told by the edits but seen: a copy of the reference whose tensors
hold the numbers of their own entries is edited alike, and the numbers that are left tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from compressor.errors import ModelError, SurgeryError, first_line
from compressor.structure import surgery
from compressor.structure.factored import SPATIAL, TUCKER2, Factored
from compressor.structure.programs.programmed import base_class
from compressor.structure.trace import FORWARD_FAILURES, copy_model

Apply: TypeAlias = Callable[[nn.Module], None]

# Added to the numbers, so that no constant is taken for one; float64 is exact up to 2**53.
FIRST = 2**40


def widened(reference: nn.Module, apply: Apply, model: nn.Module) -> nn.Module:
    """A copy of `reference` that holds the weights of `model` wherever `model` has such an entry.

    All else is the reference's: channels and blocks that `model` has lost, `requires_grad`, mode,
    device. `apply` gives a copy of it exactly the weights of `model`, and a plan that cuts deeper
    starts from them. Layers that `model` has in a low-rank form are multiplied out.

    Args:
        reference: is not changed.
        apply: cuts a copy of the reference, in place, as `model` was cut. It may remove and choose
            entries; low-rank forms and all that looks at the values of weights it leaves out.
        model: trained since; is not changed.

    Raises:
        ModelError: if `model` has other tensors than `apply` leaves.
        SurgeryError: if a tensor that `apply` leaves is computed from the reference's, and not made
            of entries of them; new modules may have such tensors, of which nothing is taken over.
    """
    cut = copy_model(reference)
    apply(cut)  # on true weights first: a technique may look for its sites now
    trained = _named_tensors(_multiplied_out(model))
    _check_alike(cut, trained)
    wide = copy_model(reference)
    tensors = _named_tensors(wide)
    pieces = list(_pieces(reference, apply))
    with torch.no_grad():
        for piece in pieces:
            target = tensors[piece.source]
            values = trained[piece.name].detach().cpu().flatten()[piece.places]
            entries = target.detach().cpu().flatten()
            if not torch.equal(entries[piece.entries], values.to(entries)):
                entries = entries.clone()
                entries[piece.entries] = values.to(entries)
                target.copy_(entries.view(target.shape))
    _check_inverse(wide, apply, trained, {piece.name for piece in pieces})
    return wide


@dataclass(frozen=True)
class _Piece:
    """Entries of a tensor of an edited model that come from one tensor of the reference.

    Attributes:
        name: of the tensor in the edited model.
        places: of the entries there, flat.
        source: name of the tensor of the reference.
        entries: where they are there, flat, in the order of `places`.
    """

    name: str
    places: Tensor
    source: str
    entries: Tensor


def _pieces(reference: nn.Module, apply: Apply) -> Iterator[_Piece]:
    """Where all entries come from that `apply` leaves of `reference`."""
    marked = copy_model(reference)
    names, starts = _number(marked)
    count = int(starts[-1])
    try:
        apply(marked)
    except FORWARD_FAILURES as error:
        raise SurgeryError(
            f"The edits need to run the model, or true weights: {first_line(error)} Leave low-rank "
            "forms, zeros and palettes out; cutting and removing need no values."
        ) from error
    known = _named_tensors(reference)
    for name, numbers in _named_tensors(marked).items():
        flat = numbers.detach().flatten()
        entries = flat.to(torch.int64) - FIRST
        is_entry = (entries >= 0) & (entries < count) & (flat == flat.round())
        if not is_entry.all():
            is_new = name not in known or _is_replaced(reference, marked, name)
            if bool(is_entry.any()) or not is_new:
                raise SurgeryError(
                    f"{name!r} is computed by the edits, and not made of entries of the reference. "
                    "Leave low-rank forms, zeros and palettes out, and go on from what was cut."
                )
            continue
        owners = torch.bucketize(entries, starts, right=True) - 1
        for owner in torch.unique(owners).tolist():
            places = (owners == owner).nonzero()[:, 0]
            yield _Piece(name, places, names[owner], entries[places] - starts[owner])


def _number(model: nn.Module) -> tuple[list[str], Tensor]:
    """Put the numbers of their entries into all tensors of `model`, in place, on the CPU.

    Returns:
        The first name of each tensor, and (tensors + 1,) the number of its first entry, at the end
        that of all entries; numbers in the model are larger by `FIRST`.
    """
    names, starts = [], [0]
    for holders in surgery.holders_of(model).values():
        tensor: Tensor = getattr(holders[0].module, holders[0].key)
        first, end = starts[-1], starts[-1] + tensor.numel()
        dtype = torch.float64 if tensor.is_floating_point() else torch.int64
        numbers = torch.arange(first + FIRST, end + FIRST, dtype=dtype).reshape(tensor.shape)
        if isinstance(tensor, nn.Parameter):
            numbers = nn.Parameter(numbers, requires_grad=False)
        for holder in holders:
            setattr(holder.module, holder.key, numbers)
        names.append(holders[0].name)
        starts.append(end)
    return names, torch.tensor(starts)


def _is_replaced(reference: nn.Module, edited: nn.Module, tensor: str) -> bool:
    """Whether the module that holds `tensor` is of another class than in the reference."""
    owner = tensor.rpartition(".")[0]
    classes = [base_class(surgery.get(model, owner)) for model in (reference, edited)]
    return classes[0] is not classes[1]


def _check_alike(cut: nn.Module, trained: dict[str, Tensor]) -> None:
    """See that both have tensors of the same names and shapes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in _named_tensors(cut).items()}
    others = {name: tuple(tensor.shape) for name, tensor in trained.items()}
    for name in [*shapes, *others]:
        if shapes.get(name) != others.get(name):
            raise ModelError(
                f"The model's {name!r} is {others.get(name, 'not there')}, and the edits leave "
                f"{shapes.get(name, 'none')}. Give the edits that the model was made by, and a "
                "model that was trained in float."
            )


def _check_inverse(
    wide: nn.Module, apply: Apply, trained: dict[str, Tensor], names: set[str]
) -> None:
    """See that `apply` makes of `wide` what the model is."""
    again = copy_model(wide)
    apply(again)
    for name, tensor in _named_tensors(again).items():
        if name in names and not torch.equal(tensor.cpu(), trained[name].cpu().to(tensor.dtype)):
            raise SurgeryError(
                f"The edits keep other entries of {name!r} when its weights differ. Plans choose "
                "entries by their numbers; leave out what looks at values."
            )


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _multiplied_out(model: nn.Module) -> nn.Module:
    """`model`, or a copy with each low-rank chain as one layer that holds its weights."""
    names = [name for name, module in model.named_modules() if isinstance(module, Factored)]
    if not names:
        return model
    model = copy_model(model)
    for name in names:
        surgery.replace(model, name, _product(cast(Factored, surgery.get(model, name))))
    return model


def _product(chain: Factored) -> nn.Module:
    """A module that has the weight and bias of the layer that `chain` stands for."""
    first, *core, last = (part.weight.detach().double() for part in chain.layers)
    if chain.form == SPATIAL:
        weight = torch.einsum("orw,rih->oihw", last[:, :, 0], first[..., 0])
    elif chain.form == TUCKER2:
        inner = core[0].flatten(2)
        weight = torch.einsum("ob,bak,ai->oik", last.flatten(1), inner, first.flatten(1))
        weight = weight.reshape(*weight.shape[:2], *core[0].shape[2:])
    else:
        weight = (last.flatten(1) @ first.flatten(1)).reshape(len(last), *first.shape[1:])
    holder, end = nn.Module(), chain.layers[-1]
    holder.weight = nn.Parameter(weight.to(end.weight.dtype))
    holder.register_parameter("bias", cast(nn.Parameter | None, end.bias))
    return holder
