"""Weights as the techniques of stage VALUES find, read and write them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from compressor.errors import SurgeryError
from compressor.structure import surgery
from compressor.structure.attention import is_replaceable
from compressor.techniques.base import Lost, TechniqueContext

WeightLayer = _ConvNd | nn.Linear
ROOT = ""  # of a model that is itself a layer, its only one


def compact_layers(
    technique: str, model: nn.Module, context: TechniqueContext
) -> dict[str, WeightLayer]:
    """The layers whose weights may be made alike, by first name; each weight once.

    What cannot be is noted in `context.lost`: everything, if the target's files stay as large.
    """
    if not context.stores_compact:
        reason = (
            "The target's file holds every weight in full, so equal values do not make it smaller."
        )
        context.lost.append(Lost(technique, "", reason))
        return {}
    found: dict[int, tuple[str, WeightLayer]] = {}
    remade = [f"{name}." for name, module in model.named_modules() if is_replaceable(module)]
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, _ConvNd)):
            continue
        weight = layer._parameters.get("weight")
        if name.startswith(tuple(remade)):
            reason = "Its attention is remade when heads are pruned, and the layer goes with it."
            context.lost.append(Lost(technique, name, reason))
        elif weight is None:
            context.lost.append(Lost(technique, name, "Its weight is computed, not stored."))
        elif weight.is_floating_point():
            found.setdefault(id(weight), (name, layer))
    return dict(found.values())


def layers_at(model: nn.Module, site: str) -> dict[str, WeightLayer]:
    """The layer called `site`, or the layers inside, if another technique has factored it.

    Raises:
        SurgeryError: if there is none.
    """
    module = surgery.get(model, site)
    found = {
        f"{site}.{name}".strip("."): layer
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, _ConvNd)) and layer._parameters.get("weight") is not None
    }
    if not found:
        raise SurgeryError(
            f"{site!r} is a {type(module).__name__} and holds no weight of a convolution or linear "
            "layer. Apply a plan to a copy of the reference that it was made for."
        )
    return found


def names_of(model: nn.Module, weight: Tensor) -> Sequence[str]:
    """All names of a parameter in `model`."""
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, parameter in named if parameter is weight]


def write_weight(model: nn.Module, weight: Tensor, values: Tensor) -> None:
    """Put a new parameter of these values where `weight` is, under all its names, in place.

    `weight` itself is not written into: a skeleton shares it with the reference.
    """
    new = nn.Parameter(values.detach().to(weight.dtype), requires_grad=weight.requires_grad)
    for name in names_of(model, weight):
        surgery.set_tensor(model, name, new)
