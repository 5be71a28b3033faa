"""Zeros that stay zeros while the rest of the weights recovers, as after one-shot pruning."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.training.algorithms.holding import Holding
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State
from compressor.training.taps import find_module


class HoldMasks(Holding):
    """Holds the weights at 0 that are 0 when the training begins, or those of given masks.

    Through momentum, mixed precision, averages and interruptions; see `Holding`.

    Args:
        layers: whose zeros are held: names of modules with a `weight`, or with layers inside;
            None: all linear and convolution layers.
        masks: by the name of a layer, which of its weights are kept, False where they go, as
            `magnitude_mask` gives; instead of `layers`.

    Raises:
        ConfigError: if both are given.
    """

    participle = "masked"
    card = Card(
        summary="Holds pruned weights at 0 while the others are trained.",
        source="Han et al. (2015), Learning both weights and connections for efficient neural "
        "networks",
        functional=None,
        settings="`masks` by layer; without them, what is 0 when the fit begins is held.",
        use_when="The weights to keep were chosen before, by any criterion.",
        avoid_when="They are still to be chosen: GradualSparsity does it while training.",
        cost="A byte a weight of the layers, two passes over them a step.",
    )

    def __init__(
        self,
        layers: Collection[str] | None = None,
        *,
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        if layers is not None and masks is not None:
            raise ConfigError(
                "Both `layers` and `masks` are given. Masks name their layers: leave `layers` out."
            )
        super().__init__(masks if masks is not None else layers)
        self.masks = masks

    def project(self, values: Tensor, held: Tensor) -> None:
        """Zero where `held`."""
        values.masked_fill_(held, 0.0)

    def on(self, event: Event, state: State) -> None:
        """Mask gradients or weights; at the beginning of the first fit, take the masks."""
        if event is Event.FIT_START and not self._held:
            self.begin_to_hold(self._masks_of(state.model))
        super().on(event, state)

    def check_layer(self, name: str, holders: list[nn.Module]) -> None:
        """Refuse masks of another shape as well."""
        super().check_layer(name, holders)
        mask = None if self.masks is None else self.masks[name]
        shape = None if mask is None else mask.shape
        if shape is not None and (len(holders) > 1 or holders[0].weight.shape != shape):
            raise ConfigError(
                f"The mask of {name!r} has the shape {tuple(shape)}. Give one of the shape of "
                "the layer's `weight`."
            )

    def _masks_of(self, model: nn.Module) -> dict[str, Tensor]:
        """True where a weight goes."""
        targets = self.targets(model)
        if self.masks is None:
            return {name: weight.detach() == 0 for name, weight in targets.items()}
        own = {id(find_module(model, name).weight): kept for name, kept in self.masks.items()}
        return {n: ~own[id(w)].to(w.device) for n, w in targets.items()}
