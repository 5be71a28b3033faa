"""Which single weights matter: scores from plain functions of tensors, and masks from scores.

Magnitude: Han et al. 2015 (1506.02626). SNIP: Lee et al. 2019 (1810.02340). Wanda: Sun et al. 2024
(2306.11695).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from compressor.errors import ConfigError
from compressor.interfaces.inputs import ModelInputs
from compressor.structure.trace import copy_model, watch
from compressor.techniques.base import TechniqueContext
from compressor.techniques.values import WeightLayer
from compressor.training.algorithms.gradual_sparsity import magnitude_mask

Criterion = Literal["magnitude", "snip", "wanda"]
CRITERIA: tuple[Criterion, ...] = ("magnitude", "snip", "wanda")


def snip_scores(weight: Tensor, gradient: Tensor) -> Tensor:
    """First-order change of the loss when each weight goes, without sign: |w * dL/dw|.

    >>> snip_scores(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0]))
    tensor([1., 3.])
    """
    return (weight.detach() * gradient).abs()


def wanda_scores(weight: Tensor, input_norms: Tensor) -> Tensor:
    """What each weight moves its layer's output by: |w| times the norm of the input that it reads.

    Args:
        weight: (out, in, …).
        input_norms: of a shape that broadcasts to that of `weight`; see `input_norms`.

    >>> wanda_scores(torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 4.0]]))
    tensor([[2., 4.]])
    """
    return weight.detach().abs() * input_norms


def input_norms(
    model: nn.Module, inputs: ModelInputs, layers: Mapping[str, WeightLayer]
) -> dict[str, Tensor]:
    """For each weight, the euclidean norm of all that it is multiplied with in one call of `model`.

    Over samples and positions; of a convolution these are the columns of its unfolded input.

    Args:
        model: runs in eval mode.
        inputs: of one call.
        layers: of `model`, by name; those that are not called are not in the result.

    Returns:
        Norms of the shape of the layer's weight, by the layer's name.
    """
    sums: dict[str, Tensor] = {}
    busy: set[str] = set()

    def note(name: str, received: ModelInputs, _: Any) -> None:
        if name not in layers or name in busy or not received.tensors():
            return
        busy.add(name)  # the call below comes by here again
        squares = _squared_inputs(layers[name], received.tensors()[0])
        busy.discard(name)
        sums[name] = sums[name] + squares if name in sums else squares

    watch(model, inputs, note)
    return {name: total.sqrt() for name, total in sums.items()}


def score_weights(
    model: nn.Module,
    layers: Mapping[str, WeightLayer],
    criterion: Criterion,
    context: TechniqueContext,
) -> dict[str, Tensor]:
    """Scores of the weights of `layers`, of their shapes, by the layer's name. Changes nothing.

    A layer that takes no part in the call, or in the loss, is scored by magnitude.

    Raises:
        ConfigError: if `criterion` is unknown, or "snip" and nothing gives gradients.
    """
    scores = {name: layer.weight.detach().abs() for name, layer in layers.items()}
    if criterion == "wanda":
        norms = input_norms(model, context.inputs, layers)
        scores |= {n: wanda_scores(layers[n].weight, norm) for n, norm in norms.items()}
    elif criterion == "snip":
        gradients = _gradients(model, layers, context)
        scores |= {n: snip_scores(layers[n].weight, g) for n, g in gradients.items()}
    elif criterion != "magnitude":
        raise ConfigError(
            f"There is no criterion {criterion!r} for single weights. Write one of "
            f"{', '.join(CRITERIA)}."
        )
    return scores


def global_masks(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Which weights are kept when the lowest of all go, whichever layer they are in.

    Args:
        scores: 0 or more, of any shapes.
        sparsity: fraction of all that goes, 0 to 1.

    Returns:
        Of the shapes of `scores`, False where a weight goes.

    >>> masks = global_masks({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([2.0, 4.0])}, 0.5)
    >>> masks["a"], masks["b"]
    (tensor([False,  True]), tensor([False,  True]))
    """
    together = torch.cat([score.flatten() for score in scores.values()])
    mask = magnitude_mask(together, sparsity)
    parts = torch.split(mask, [score.numel() for score in scores.values()])
    shaped = zip(scores.items(), parts, strict=True)
    return {name: part.view(score.shape) for (name, score), part in shaped}


def _squared_inputs(layer: WeightLayer, x: Tensor) -> Tensor:
    """Sum of the squares of what each weight is multiplied with.

    A layer is linear in its weight, so this is the gradient of the sum of its outputs, on squares:
    right for every stride, padding, dilation and group, without unfolding.
    """
    with torch.enable_grad():
        weight = torch.zeros_like(layer.weight).requires_grad_(True)
        output = functional_call(layer, {"weight": weight}, (x.detach().square(),))
        (sums,) = torch.autograd.grad(output.sum(), weight)
    return sums.detach()


def _gradients(
    model: nn.Module, layers: Collection[str], context: TechniqueContext
) -> dict[str, Tensor]:
    if context.accumulate_gradients is None:
        raise ConfigError(
            "The criterion 'snip' needs gradients of the loss, and there is nothing that gives "
            "them. Set `accumulate_gradients` of the context, or use 'wanda' or 'magnitude'."
        )
    copy = copy_model(model).requires_grad_(True)
    with torch.enable_grad():
        context.accumulate_gradients(copy)
    named = {name: copy.get_submodule(name)._parameters["weight"] for name in layers}
    return {n: w.grad for n, w in named.items() if w is not None and w.grad is not None}
