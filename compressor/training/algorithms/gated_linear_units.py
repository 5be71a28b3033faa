"""Feed-forward layers with a gate (Shazeer, 2020, https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.structure import surgery
from compressor.structure.surgery import Edit
from compressor.training.algorithm import Algorithm
from compressor.training.algorithms.surgical import (
    FIRST_AT_SETUP,
    GROUPED,
    MASKED,
    changing_layers,
)
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State

FORMS = (("dense", "intermediate_act_fn"), ("linear1", "activation"))
"""Attributes of a feed-forward: the first layer, and the activation behind it.

Those of transformers' BERT and its kin, and of torch's transformer layers.
"""
SAME_IN_TORCH: Mapping[str, Callable[[], nn.Module]] = {
    "GELUActivation": nn.GELU,
    "NewGELUActivation": partial(nn.GELU, approximate="tanh"),
    "FastGELUActivation": partial(nn.GELU, approximate="tanh"),
    "GELUTanh": partial(nn.GELU, approximate="tanh"),
    "SiLUActivation": nn.SiLU,
}
"""By the class of an activation of transformers, which a file of ours must not name."""


class FeedForward(NamedTuple):
    """Names, in a model, of the first layer of a feed-forward and of its activation."""

    owner: str
    linear: str
    activation: str


class GatedActivation(nn.Module):
    """activation(value) * gate, of which each is half of the features.

    Args:
        activation: of the value.
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(..., 2 * F) -> (..., F)."""
        value, gate = x.chunk(2, dim=-1)
        gated: Tensor = self.activation(value) * gate
        return gated


def with_gate(linear: nn.Linear) -> nn.Linear:
    """A layer whose first outputs are those of `linear`, and as many others are 1.

    So a `GatedActivation` behind it gives what the activation alone gave, and learns.

    >>> with_gate(nn.Linear(3, 2))(torch.rand(1, 3))[0, 2:].tolist()
    [1.0, 1.0]
    """
    weight = linear.weight.detach()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach()
    new = nn.Linear(linear.in_features, 2 * linear.out_features, device="meta")
    values = torch.cat([weight, torch.zeros_like(weight)])
    new.weight = nn.Parameter(values, linear.weight.requires_grad)
    new.bias = nn.Parameter(torch.cat([bias, torch.ones_like(bias)]), linear.weight.requires_grad)
    return new


def apply_gated_linear_units(model: nn.Module, act_fn: nn.Module | None = None) -> Edit:
    """Gate the feed-forward layers of the transformers in `model`, in place.

    Their first layer gets as many outputs again, by which the activation is multiplied. All gates
    begin at 1, so that what the model computes stays, but for rounding. Done again, it changes
    nothing.

    For BERT and its kin in transformers, and for torch's `nn.TransformerEncoderLayer` and
    `nn.TransformerDecoderLayer` whose activation is a module, as `activation=nn.GELU()` makes it.

    Args:
        model: has such layers somewhere.
        act_fn: of the values, in place of the model's own, which then computes something else:
            nn.SiLU() is SwiGLU, nn.Identity() the gated linear unit itself. None leaves it.

    Returns:
        What happened to the parameters: those of the first layers are others.

    Raises:
        ModelError: if there is no such layer, or a file could not name its activation.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.GELU())
    >>> edit = apply_gated_linear_units(layer)
    >>> layer.linear1.out_features, sorted(edit.added)
    (32, ['linear1.bias', 'linear1.weight'])
    """
    found = list(_feed_forwards(model))
    is_gated = any(isinstance(module, GatedActivation) for module in model.modules())
    if not found and not is_gated:
        raise ModelError(_nothing_found(model))
    _check_unshared(model, found)
    activations = {each: _activation(model, each, act_fn) for each in found}
    edit = Edit()
    for each, activation in activations.items():
        linear = surgery.get(model, each.linear)
        assert isinstance(linear, nn.Linear)
        edit = edit.then(surgery.replace(model, each.linear, with_gate(linear)))
        edit = edit.then(surgery.replace(model, each.activation, GatedActivation(activation)))
        _leave_fused_kernel(model, surgery.get(model, each.owner))
    return edit


class GatedLinearUnits(Algorithm):
    """Applies `apply_gated_linear_units` before training.

    Args:
        act_fn: of the values, in place of the model's own; None leaves it.
    """

    events = frozenset({Event.SETUP})
    before = (*FIRST_AT_SETUP, "Factorize")  # which then has a wider layer to share out
    conflicts = changing_layers("apply_gated_linear_units", *GROUPED, *MASKED)
    card = Card(
        summary="Multiplies the hidden features of a feed-forward by a second linear layer.",
        source="Shazeer (2020), GLU Variants Improve Transformer",
        functional="apply_gated_linear_units",
        settings="`act_fn`, such as nn.SiLU(), for another gate; a trained model then "
        "computes something else.",
        use_when="A transformer is trained for long. What a trained one computes stays, and it "
        "goes on from there.",
        avoid_when="The model is to be small: its feed-forwards grow by half.",
        cost="Half as many parameters and MACs again in each feed-forward, also at inference; "
        "torch's own layers leave their fused kernel.",
    )

    def __init__(self, act_fn: nn.Module | None = None) -> None:
        self.act_fn = act_fn

    def on(self, event: Event, state: State) -> None:
        """Replace."""
        state.edit(lambda model: apply_gated_linear_units(model, self.act_fn))


def _feed_forwards(model: nn.Module) -> Iterator[FeedForward]:
    """Those that have no gate yet."""
    for name, module in model.named_modules():
        for linear, activation in FORMS:
            first, behind = module._modules.get(linear), module._modules.get(activation)
            is_gated = isinstance(behind, GatedActivation)
            if type(first) is nn.Linear and behind is not None and not is_gated:
                names = (f"{name}.{key}".lstrip(".") for key in (linear, activation))
                yield FeedForward(name, *names)


def _check_unshared(model: nn.Module, found: Sequence[FeedForward]) -> None:
    """A whole feed-forward may be shared, as it is changed once; but not half of one."""
    owners: dict[int, set[int]] = defaultdict(set)
    for module in model.modules():
        for child in module.children():
            owners[id(child)].add(id(module))
    for name in (name for each in found for name in (each.linear, each.activation)):
        if len(owners[id(surgery.get(model, name))]) > 1:
            raise ModelError(
                f"{name!r} is part of another layer as well, and a gate is for one only. Give each "
                "feed-forward a linear layer and an activation of its own."
            )


def _activation(model: nn.Module, feed_forward: FeedForward, act_fn: nn.Module | None) -> nn.Module:
    """Of torch, so that a file can name it."""
    old = surgery.get(model, feed_forward.activation)
    new = copy.deepcopy(old if act_fn is None else act_fn)
    if type(new).__module__.startswith("torch.nn."):
        return new
    if type(new).__name__ not in SAME_IN_TORCH:
        raise ModelError(
            f"The activation {feed_forward.activation!r} is a {type(new).__name__}, which has no "
            "equal in torch.nn. Give a module of torch.nn as act_fn, such as nn.GELU()."
        )
    return SAME_IN_TORCH[type(new).__name__]()


def _leave_fused_kernel(model: nn.Module, layer: nn.Module) -> None:
    """Torch's own layers have one for evaluation, which knows of no gate."""
    if isinstance(layer, nn.TransformerEncoderLayer):
        layer.activation_relu_or_gelu = 0
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False


def _nothing_found(model: nn.Module) -> str:
    layers = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    names = [name for name, module in model.named_modules() if isinstance(module, layers)]
    if names:
        return (
            f"The activation of {names[0]!r} is a function, in whose place no gate can be put. "
            "Make the layer with a module: activation=nn.ReLU()."
        )
    return (
        f"The {type(model).__name__} has no feed-forward of BERT or of torch's transformer layers "
        "that could be gated. Leave GatedLinearUnits out."
    )
