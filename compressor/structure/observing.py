"""What the criteria of `structure.scores` need to see of a model while it runs: gathered here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from compressor.interfaces.inputs import ModelInputs
from compressor.structure.scores import NOTHING, Observed
from compressor.structure.trace import copy_model, watch

Backward = Callable[[nn.Module], None]
NEEDS_GRADIENTS = frozenset({"taylor", "hessian"})


def observe(
    model: nn.Module, criterion: str, inputs: ModelInputs, backward: Backward | None
) -> Observed:
    """What `criterion` needs of `model`; `NOTHING` if that is nothing. The model is not changed.

    Args:
        model: on the device of `inputs`.
        criterion: one of `structure.scores.CRITERIA`.
        inputs: of one call, for activations.
        backward: adds the gradients of a loss to the parameters of the model that it is given, one
            `.backward()` a batch; None leaves gradients unknown.

    Raises:
        ModelError: if the model does not run on `inputs`.
    """
    if criterion == "activation":
        return Observed(activations=mean_activations(model, inputs))
    if criterion not in NEEDS_GRADIENTS or backward is None:
        return NOTHING
    copy = copy_model(model).requires_grad_(True)
    if criterion == "hessian":
        return Observed(squared_gradients=mean_squared_gradients(copy, backward))
    with torch.enable_grad():
        backward(copy)
    named = copy.named_parameters()
    return Observed(gradients={name: p.grad for name, p in named if p.grad is not None})


def mean_squared_gradients(model: nn.Module, backward: Backward) -> dict[str, Tensor]:
    """Mean over the calls of `.backward()` of the squared gradient, by parameter name.

    Changes the gradients of `model`: there are none left.
    """
    sums: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def note(name: str) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            sums[name] = sums.get(name, 0) + parameter.grad.detach().square()
            calls[name] += 1
            parameter.grad = None  # the next batch's gradient comes alone

        return add

    handles = [
        parameter.register_post_accumulate_grad_hook(note(name))  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        with torch.enable_grad():
            backward(model)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / calls[name] for name, total in sums.items()}


def mean_activations(model: nn.Module, inputs: ModelInputs) -> dict[str, Tensor]:
    """Mean absolute output of each channel of every layer: name -> (channels,).

    Layers are convolutions, linear layers, embeddings and norms; a layer that is called several
    times counts as often.

    Raises:
        ModelError: if the model does not run on `inputs`.
    """
    sums: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()
    modules = dict(model.named_modules())

    def note(name: str, _: ModelInputs, output: Any) -> None:
        dim = channel_dim(modules[name])
        if dim is not None and isinstance(output, Tensor) and output.dim() > 1:
            magnitudes = output.detach().float().abs().movedim(dim, 0).flatten(1).mean(1)
            sums[name] = sums.get(name, 0) + magnitudes
            calls[name] += 1

    watch(model, inputs, note)
    return {name: total / calls[name] for name, total in sums.items()}


def channel_dim(layer: nn.Module) -> int | None:
    """The dimension of the output of `layer` that holds its channels; None if it makes none."""
    if isinstance(layer, (_ConvNd, _NormBase, nn.GroupNorm)):
        return 1
    if isinstance(layer, (nn.Linear, nn.LayerNorm, nn.Embedding)):
        return -1
    return None
