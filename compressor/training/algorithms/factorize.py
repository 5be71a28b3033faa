"""Two or three small layers for a large one, from its trained weight (Denton et al., 2014).

https://arxiv.org/abs/1404.0736. The arithmetic is that of `structure.low_rank`: factors that come
nearest to the weight, so that the training of the model goes on instead of beginning anew.
"""

from __future__ import annotations

from typing import cast

from torch import nn

from compressor.errors import ConfigError, ModelError
from compressor.structure import surgery
from compressor.structure.factored import (
    SVD,
    Factored,
    Layer,
    factorize,
    forms_of,
    settled_ranks,
    widths,
)
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


def factorized(layer: Layer, latent: float) -> Factored | None:
    """A chain of smaller layers that computes nearly what `layer` does; `layer` is not changed.

    Linear layers and 1×1 convolutions become two (SVD), others three (Tucker-2). Nearest in the
    weight: whatever `latent` keeps, no other factors have a smaller error in it (SVD), or hardly
    one (Tucker-2). A weight of no higher rank is kept but for rounding.

    Args:
        layer: linear, or a convolution.
        latent: features between the layers: a number, or below 1 a fraction of the smaller side
            (SVD), of each side (Tucker-2).

    Returns:
        None if it has no such form, or the factors would not be smaller.

    >>> factorized(nn.Linear(8, 8), latent=0.25).ranks
    (2,)
    """
    forms = forms_of(layer)
    if not forms:
        return None
    inputs, outputs = widths(layer)
    sides = (min(inputs, outputs),) if forms[0] == SVD else (outputs, inputs)
    ranks = [max(int(latent if latent >= 1 else latent * side), 1) for side in sides]
    settled = settled_ranks(forms[0], ranks, layer.weight.shape)
    return factorize(layer, forms[0], settled) if settled else None


def apply_factorization(
    model: nn.Module,
    factorize_convs: bool = True,
    factorize_linears: bool = True,
    min_channels: int = 256,
    latent_channels: float = 0.25,
    min_features: int = 256,
    latent_features: float = 0.25,
) -> Edit:
    """Replace wide layers of `model` by chains of smaller ones with nearly its weights, in place.

    What the model computes changes by what the ranks leave out: see `factorized`. Layers whose
    weight is another's as well, or computed, or read by a fused kernel of torch's transformer
    layers, stay; so do those that would not become smaller. Done again, it changes nothing.

    Args:
        model: of any architecture.
        factorize_convs: whether convolutions are treated.
        factorize_linears: whether linear layers are.
        min_channels: convolutions with fewer inputs or outputs stay.
        latent_channels: between the layers of a chain; below 1, a fraction.
        min_features: linear layers with fewer inputs or outputs stay.
        latent_features: between the layers of a chain; below 1, a fraction.

    Returns:
        What happened to the parameters: weights have become those of the chains.

    Raises:
        ConfigError: if neither kind is to be treated, or a latent size is not above 0.
        ModelError: if there is nothing to factorize.

    >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    >>> _ = apply_factorization(model, min_features=16)
    >>> [tuple(layer.weight.shape) for layer in model[0]]
    [(4, 16), (16, 4)]
    """
    if not (factorize_convs or factorize_linears):
        raise ConfigError("Nothing is to be factorized. Let convolutions or linear layers be.")
    for option, latent in (
        ("latent_channels", latent_channels),
        ("latent_features", latent_features),
    ):
        if not latent > 0:
            raise ConfigError(f"{option}={latent} lets nothing through. Write a number above 0.")
    is_factored = any(isinstance(module, Factored) for module in model.modules())
    chosen = {}
    for name, layer in _free_layers(model).items():
        if isinstance(layer, nn.Linear):
            is_wanted, least, latent = factorize_linears, min_features, latent_features
        else:
            is_wanted, least, latent = factorize_convs, min_channels, latent_channels
        if is_wanted and min(widths(layer)) >= least:
            chosen[name] = factorized(layer, latent)
    edit = Edit()
    for name, new in chosen.items():
        if new is not None:
            edit, is_factored = edit.then(surgery.replace(model, name, new)), True
    if not is_factored:
        raise ModelError(
            f"The {type(model).__name__} has no plain convolution of {min_channels} channels or "
            f"linear layer of {min_features} features that factors would make smaller. Lower "
            "min_channels, min_features or the latent sizes, or leave Factorize out."
        )
    return edit


class Factorize(Algorithm):
    """Applies `apply_factorization` before training.

    The compression engine chooses ranks by what they cost and save, with the technique "low_rank";
    this takes the same share of all layers.

    Args:
        factorize_convs: whether convolutions are treated.
        factorize_linears: whether linear layers are.
        min_channels: convolutions with fewer inputs or outputs stay.
        latent_channels: between the layers of a chain; below 1, a fraction.
        min_features: linear layers with fewer inputs or outputs stay.
        latent_features: between the layers of a chain; below 1, a fraction.
    """

    events = frozenset({Event.SETUP})
    before = (*FIRST_AT_SETUP, "BlurPool")  # which takes a chain, and is not taken by one
    conflicts = changing_layers("apply_factorization", *GROUPED, *MASKED)
    card = Card(
        summary="Replaces wide layers by chains of small ones that come nearest to their weights.",
        source="Denton et al. (2014), Exploiting Linear Structure Within Convolutional Networks "
        "for Efficient Evaluation; Kim et al. (2016), 1511.06530, for Tucker-2",
        functional="apply_factorization",
        settings="`latent_channels` and `latent_features`, the part of the width that is "
        "left; `min_channels` and `min_features`, below which layers stay.",
        use_when="A trained model is fine-tuned smaller, and its layers are wide.",
        avoid_when="Layers are narrow; or the engine may choose: its technique low_rank has a rank "
        "for each layer, and keeps to a budget.",
        cost="One decomposition a layer. Layers save what the ranks leave out, less where two "
        "small ones are slower than a large one.",
    )

    def __init__(
        self,
        factorize_convs: bool = True,
        factorize_linears: bool = True,
        min_channels: int = 256,
        latent_channels: float = 0.25,
        min_features: int = 256,
        latent_features: float = 0.25,
    ) -> None:
        self.factorize_convs = factorize_convs
        self.factorize_linears = factorize_linears
        self.min_channels = min_channels
        self.latent_channels = latent_channels
        self.min_features = min_features
        self.latent_features = latent_features

    def on(self, event: Event, state: State) -> None:
        """Replace."""
        state.edit(
            lambda model: apply_factorization(
                model,
                self.factorize_convs,
                self.factorize_linears,
                self.min_channels,
                self.latent_channels,
                self.min_features,
                self.latent_features,
            )
        )


def _free_layers(model: nn.Module) -> dict[str, Layer]:
    """The layers that a chain can stand for: whose weight is their own, and read by nobody else."""
    holders = surgery.holders_of(model)
    modules = dict(model.named_modules())
    found = {}
    for name, module in modules.items():
        parent = modules[name.rpartition(".")[0]]
        is_read = isinstance(parent, (Factored, nn.TransformerEncoderLayer))
        weight = module._parameters.get("weight")
        if not name or is_read or not forms_of(module) or weight is None:
            continue
        if len({id(holder.module) for holder in holders[id(weight)]}) == 1:
            found[name] = cast(Layer, module)
    return found
