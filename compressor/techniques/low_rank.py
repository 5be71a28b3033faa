"""Low rank: a layer as a chain of two or three that has fewer weights and needs fewer MACs.

Linear layers and 1×1 convolutions by SVD, others by the better of Tucker-2 and two one-dimensional
convolutions; all in the metric of the layer's own inputs. The arithmetic is in
`structure.low_rank`, the chains are in `structure.factored`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from compressor.errors import ModelError
from compressor.interfaces.inputs import ModelInputs, output_tensors
from compressor.result import Choice
from compressor.structure import surgery
from compressor.structure.factored import (
    Factored,
    Layer,
    blank,
    chain_macs,
    check_form,
    factorize,
    forms_of,
    input_moment,
    ranks_for,
    settled_ranks,
    widths,
)
from compressor.structure.trace import eval_mode, input_shapes, run, watch
from compressor.techniques.base import TECHNIQUES, Lost, Stage, Technique, TechniqueContext
from compressor.training.card import Card

KEPT_FRACTIONS = (0.75, 0.5, 0.25)  # of a layer's weights
MOST_COMPARED = 2**22  # entries of a layer's input on which two forms are compared
FORM_LABELS = {"svd": "SVD", "spatial": "spatial SVD", "tucker2": "Tucker-2"}


@TECHNIQUES.register
class LowRank(Technique):
    """Fewer weights and MACs in the same widths; the layers around it do not change."""

    name = "low_rank"
    stage = Stage.RANK
    card: ClassVar[Card] = Card(
        summary="Splits a layer into a chain of two or three with few channels between them.",
        source="SVD: Eckart and Young (1936), The approximation of one matrix by another of lower "
        "rank; spatial SVD: Jaderberg et al. (2014), Speeding up convolutional neural networks "
        "with low rank expansions; Tucker-2: Kim et al. (2016), Compression of deep convolutional "
        "neural networks for fast and low power mobile applications",
        functional=None,
        use_when="Layers are wide: linear layers of transformers, late convolutions of classic "
        "CNNs. No neighbour has to change, so it works where channels cannot be pruned.",
        avoid_when="Layers are narrow, depthwise or grouped, or the target's time goes into calls "
        "of kernels rather than arithmetic: one layer becomes two or three.",
        cost="An eigenvalue problem of the smaller side for each layer and rank, and one forward "
        "pass for the second moments of the layers' inputs.",
    )

    def choices(self, model: nn.Module, context: TechniqueContext) -> Iterator[Choice]:
        """For every layer that is large enough: ranks that keep 3/4, 1/2 or 1/4 of its weights.

        Where a convolution has two forms, the one whose outputs on `context.inputs` are nearer.
        """
        layers = _factorable(model, context)
        shapes = input_shapes(model, context.inputs)
        offers = {
            name: _offers(name, layer, shapes[name], context) for name, layer in layers.items()
        }
        forms: dict[str, list[str]] = {}

        def note(name: str, received: ModelInputs, _: Any) -> None:
            if name in layers:
                inputs = received.tensors()[0]
                forms[name] = [_nearest_form(layers[name], each, inputs) for each in offers[name]]

        watch(model, context.inputs, note)
        for name in layers:
            for form, ranks in zip(forms[name], offers[name], strict=True):
                yield Choice(
                    technique=self.name,
                    site=name,
                    setting={"form": form, "ranks": list(ranks[form])},
                    label=f"{FORM_LABELS[form]} of rank {'×'.join(map(str, ranks[form]))}",
                    modules=(name,),
                )

    def apply(self, model: nn.Module, choices: Sequence[Choice], context: TechniqueContext) -> None:
        """Replace each chosen layer by its factors, in place.

        Ranks are cut to what the layer has by now; it stays whole where factors would be larger.
        """
        layers = {choice.site: surgery.get(model, choice.site) for choice in choices}
        settings = {choice.site: choice.setting for choice in choices}
        for name, setting in settings.items():
            check_form(layers[name], setting["form"])
        moments: dict[str, Tensor] = {}

        def note(name: str, received: ModelInputs, _: Any) -> None:
            if name in settings:
                layer = cast(Layer, layers[name])
                moments[name] = input_moment(layer, settings[name]["form"], received.tensors()[0])

        watch(model, context.inputs, note)
        for name, setting in settings.items():
            layer = cast(Layer, layers[name])
            ranks = settled_ranks(setting["form"], setting["ranks"], tuple(layer.weight.shape))
            if ranks:
                factors = factorize(layer, setting["form"], ranks, moments.get(name))
                surgery.replace(model, name, factors)


@torch.no_grad()
def output_error(layer: nn.Module, other: nn.Module, inputs: Tensor) -> float:
    """Distance of the outputs of `other` from those of `layer`, relative to their deviation.

    0 is equal; 1 is as far as a constant output. The bias does not count.
    """
    outputs: Tensor = layer.forward(inputs)  # not by a call: a hook of the layer may be asking
    spread = outputs.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
    spread = spread - spread.mean(1, keepdim=True)
    return float((other.forward(inputs) - outputs).norm() / spread.norm().clamp_min(1e-12))


def _factorable(model: nn.Module, context: TechniqueContext) -> dict[str, Layer]:
    """The layers that can be replaced by a chain, by first name; the others are reported."""
    calls: Counter[str] = Counter()
    watch(model, context.inputs, lambda name, *_: calls.update([name]))
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for tensor in (module, *module.parameters(recurse=False)):
            names.setdefault(id(tensor), []).append(name)
    inside = {
        f"{name}.{child}"
        for name, module in model.named_modules()
        if isinstance(module, Factored)
        for child, _ in module.named_children()
    }
    layers = {}
    for name, module in model.named_modules():
        if not name or name in inside or not _may_be_factored(module):
            continue
        layer = cast(Layer, module)
        if min(widths(layer)) < 2 * context.min_width:
            continue
        reason = _in_the_way(name, layer, names, calls[name])
        if reason is None:
            layers[name] = layer
        else:
            context.lost.append(Lost(LowRank.name, name, reason))
    return _called_as_modules(model, layers, context)


def _may_be_factored(module: nn.Module) -> bool:
    """Whether it is a layer that has low-rank forms, or a variant of one."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.groups == 1
    return isinstance(module, nn.Linear)


def _in_the_way(
    name: str, layer: Layer, names: Mapping[int, Sequence[str]], calls: int
) -> str | None:
    """Why a layer cannot be replaced alone."""
    others = [
        other
        for tensor in (layer, *layer.parameters(recurse=False))
        for other in names[id(tensor)]
        if other != name
    ]
    if others:
        return f"its weights are those of {others[0]!r} as well"
    if not calls:
        return "it is not called: the model leaves it out, or reads its weight itself"
    if calls > 1:
        return f"it is called {calls} times in one forward pass"
    if is_parametrized(layer) or not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return "its weight is computed by a parametrization or a hook"
    if not forms_of(layer):
        return f"it is a {type(layer).__name__}, whose code may do more than torch's own layer"
    return None


def _called_as_modules(
    model: nn.Module, layers: Mapping[str, Layer], context: TechniqueContext
) -> dict[str, Layer]:
    """Those of `layers` of which the model reads nothing but the output.

    Some models multiply by `layer.weight` themselves, or ask for its dtype.
    """
    if _runs_with_hidden(model, list(layers), context.inputs):
        return dict(layers)
    kept = {}
    for name, layer in layers.items():
        if _runs_with_hidden(model, [name], context.inputs):
            kept[name] = layer
        else:
            reason = "the model reads more of it than its output, such as its weight"
            context.lost.append(Lost(LowRank.name, name, reason))
    return kept


def _runs_with_hidden(model: nn.Module, names: Sequence[str], inputs: ModelInputs) -> bool:
    """Whether the outputs are the same with each layer inside a container without attributes."""
    with eval_mode(model), torch.no_grad():
        expected = output_tensors(run(model, inputs))
        with surgery.undone(model):
            for name in names:
                surgery.replace(model, name, nn.Sequential(surgery.get(model, name)))
            try:
                outputs = output_tensors(run(model, inputs))
            except ModelError:
                return False
    pairs = zip(expected, outputs, strict=False)
    return len(expected) == len(outputs) and all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True) for a, b in pairs
    )


def _offers(
    name: str, layer: Layer, input_shape: tuple[int, ...], context: TechniqueContext
) -> list[dict[str, tuple[int, ...]]]:
    """Form -> ranks, for each of `KEPT_FRACTIONS` at which some form saves."""
    offers = (
        {
            form: ranks
            for form in forms_of(layer)
            if (ranks := _rounded_ranks(layer, form, fraction, input_shape, context))
            and (context.layer_saves is None or context.layer_saves(name, form, ranks))
        }
        for fraction in KEPT_FRACTIONS
    )
    return [offer for offer in offers if offer]


def _rounded_ranks(
    layer: Layer,
    form: str,
    fraction: float,
    input_shape: tuple[int, ...],
    context: TechniqueContext,
) -> tuple[int, ...]:
    """Ranks on the target's grid at which the form has fewer weights and MACs; else ()."""
    shape = tuple(layer.weight.shape)
    multiple = context.width_multiple
    ranks = tuple(
        rank // multiple * multiple if rank > multiple else rank
        for rank in ranks_for(form, shape, fraction)
    )
    if min(ranks) < context.min_width or not settled_ranks(form, ranks, shape):
        return ()
    return ranks if _needs_fewer_macs(layer, form, ranks, input_shape) else ()


def _needs_fewer_macs(
    layer: Layer, form: str, ranks: Sequence[int], input_shape: tuple[int, ...]
) -> bool:
    with torch.device("meta"):
        chain = blank(layer, form, ranks).layers
    return chain_macs(chain, input_shape) < chain_macs([layer], input_shape)


def _nearest_form(layer: Layer, offers: Mapping[str, Sequence[int]], inputs: Tensor) -> str:
    """The form whose outputs are nearest to the layer's: a first estimate of the damage."""
    if len(offers) == 1:
        return next(iter(offers))
    few = inputs[: max(MOST_COMPARED // inputs[0].numel(), 1)]
    errors = {
        form: output_error(
            layer, factorize(layer, form, ranks, input_moment(layer, form, inputs)), few
        )
        for form, ranks in offers.items()
    }
    return min(errors, key=lambda form: errors[form])
