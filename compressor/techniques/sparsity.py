"""Sparsity: single weights become 0, any of them, or two of every four neighbours.

Zeros take a bit in a packed file, see `structure.packing`; a runtime that computes densely is no
faster for them. Sources: Han et al. 2015 (1506.02626); Pool and Yu 2021 for the order of channels
in which 2:4 keeps most; see also `techniques.weight_scores`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.result import Choice
from compressor.structure.packing import stored_bits
from compressor.techniques.base import TECHNIQUES, Stage, Technique, TechniqueContext
from compressor.techniques.input_order import InputOrder
from compressor.techniques.permutation import STRIPE
from compressor.techniques.values import (
    ROOT,
    WeightLayer,
    compact_layers,
    layers_at,
    write_weight,
)
from compressor.techniques.weight_scores import Criterion, global_masks, score_weights
from compressor.training.algorithm import Algorithm
from compressor.training.algorithms.gradual_sparsity import magnitude_mask, nm_mask
from compressor.training.algorithms.hold_masks import HoldMasks
from compressor.training.card import Card

LEVELS = (0.5, 0.75, 0.9)  # fractions of the weights that go
PATTERN = "2:4"
MOST_OF_A_LAYER = 0.98  # that one threshold for all layers may take

Scope = Literal["layer", "global"]


@TECHNIQUES.register
class Sparsity(Technique):
    """Fewer bytes, where files are packed."""

    name = "sparsity"
    stage = Stage.VALUES
    card = Card(
        summary="Sets the least important single weights of a layer to 0, and holds them there.",
        source="Han et al. (2015), Learning both weights and connections for efficient neural "
        "networks; SNIP: Lee et al. (2019); Wanda: Sun et al. (2024); 2:4: Mishra et al. (2021), "
        "Accelerating sparse deep neural networks; orders of channels for it: Pool and Yu (2021)",
        functional="magnitude_mask",
        use_when="The file must be small, and is packed or sent compressed.",
        avoid_when="The aim is speed on a dense runtime: prune channels instead.",
        cost="A sort of the weights; for wanda one call on the example inputs, for snip the "
        "gradients on a small subset.",
    )

    def __init__(self, criterion: Criterion = "magnitude", scope: Scope = "layer") -> None:
        """Choose how weights are ranked.

        Args:
            criterion: "magnitude", "snip" (times the loss's gradient) or "wanda" (times the norm
                of the inputs).
            scope: what a level means. "layer": this fraction of each layer; "global": what is left
                of a layer when this fraction of the weights of all layers goes, the lowest first.

        Raises:
            ConfigError: if there is no such scope.
        """
        if scope not in ("layer", "global"):
            raise ConfigError(f"There is no scope {scope!r}. Write 'layer' or 'global'.")
        self.criterion = criterion
        self.scope = scope
        self._order = InputOrder()

    def choices(self, model: nn.Module, context: TechniqueContext) -> Iterator[Choice]:
        """For every layer, half, three quarters or nine tenths of the weights; and 2:4."""
        layers = compact_layers(self.name, model, context)
        for name, levels in self._levels(model, layers, context).items():
            layer = layers[name]
            size = layer.weight.numel()
            settings: list[float | str] = [*levels, *([PATTERN] if has_pattern(layer) else [])]
            for level in settings:
                sparsity = fraction_of(level)
                full = 8 * layer.weight.element_size()
                bits = stored_bits(size, full, nonzero=size - round(size * sparsity))
                if bits < full:
                    yield Choice(
                        technique=self.name,
                        site=name,
                        setting={
                            "sparsity": level,
                            "criterion": self.criterion,
                            "stored_bits": round(bits, 3),
                        },
                        label=PATTERN if level == PATTERN else f"{sparsity:.0%} zeros",
                        modules=(name,),
                    )

    def apply(self, model: nn.Module, choices: Sequence[Choice], context: TechniqueContext) -> None:
        """Write the zeros, in place; for 2:4 in the best order of channels that costs nothing."""
        layers = {c.site: layers_at(model, c.site) for c in choices}
        chosen = {name: c for c in choices for name in layers[c.site]}
        scores = _scores(model, chosen, context)
        patterned = [n for n, c in chosen.items() if c.setting["sparsity"] == PATTERN]
        fitting = {n: scores[n] for n in patterned if has_pattern(layers_at(model, n)[n])}
        if fitting and self._order.improve(model, fitting, context.inputs):
            scores = _scores(model, chosen, context)
        for name, choice in chosen.items():
            kept = _mask(scores[name], choice.setting["sparsity"])
            weight = layers_at(model, name)[name].weight
            write_weight(model, weight, weight.detach().masked_fill(~kept, 0.0))

    def algorithms(self, choices: Sequence[Choice]) -> Sequence[Algorithm]:
        """What holds the zeros in training."""
        sites = [choice.site for choice in choices]
        if not sites:
            return ()
        return [HoldMasks(None if ROOT in sites else sites)]

    def _levels(
        self, model: nn.Module, layers: Mapping[str, WeightLayer], context: TechniqueContext
    ) -> dict[str, Sequence[float]]:
        """The sparsities to offer of each layer."""
        if self.scope == "layer" or not layers:
            return {name: LEVELS for name in layers}
        scores = score_weights(model, layers, self.criterion, context)
        found: dict[str, set[float]] = {name: set() for name in layers}
        for level in LEVELS:
            for name, kept in global_masks(scores, level).items():
                gone = 1 - int(kept.sum()) / kept.numel()
                found[name].add(round(min(gone, MOST_OF_A_LAYER), 4))
        return {name: sorted(levels) for name, levels in found.items()}


def fraction_of(level: float | str) -> float:
    """Of the weights that go at a setting's "sparsity"."""
    return 0.5 if level == PATTERN else float(level)


def has_pattern(layer: WeightLayer) -> bool:
    """Whether 2:4 fits: groups of four along the inputs; transposed ones have them elsewhere."""
    is_transposed = getattr(layer, "transposed", False)
    return not is_transposed and layer.weight.shape[1] % STRIPE == 0


def _scores(
    model: nn.Module, chosen: Mapping[str, Choice], context: TechniqueContext
) -> dict[str, Tensor]:
    scores: dict[str, Tensor] = {}
    for criterion in sorted({choice.setting["criterion"] for choice in chosen.values()}):
        layers = {
            name: layers_at(model, name)[name]
            for name, choice in chosen.items()
            if choice.setting["criterion"] == criterion
        }
        scores |= score_weights(model, layers, criterion, context)
    return scores


def _mask(scores: Tensor, sparsity: float | str) -> Tensor:
    """False where a weight goes; half of a layer goes in any order where the pattern does not fit.

    It may not fit any more: channel pruning comes first and may have left a width that four does
    not divide.
    """
    if sparsity == PATTERN and scores.shape[1] % STRIPE == 0:
        return nm_mask(scores, 2, STRIPE)
    return magnitude_mask(scores, fraction_of(sparsity))
