"""From choices to a problem for `allocate`: sites, damages, and each layer's cost in each state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain, product
from math import prod

import numpy as np

from compressor.result import Choice, Plan
from compressor.search.allocate import Factor, Floats, Problem, Site

FLOAT_BITS = 32
MOST_ENTRIES = 4096  # of one factor; six sites of four options
NOTHING = Plan()


@dataclass(frozen=True)
class LayerState:
    """What the choices have made of a layer.

    Attributes:
        inputs: channels or features that it takes.
        outputs: channels or features that it makes.
        bits: of its weights in the file; 32 is float.
        format: how it is stored and computed, "" in float; see `quantization.plan.FORMATS`.
        is_removed: the layer is gone and costs nothing.
        form: of the chain that the layer has become, "" for a whole one; see `structure.factored`.
        ranks: of that chain, as they were chosen; a narrow layer takes what it has of them.
        stored_bits: of a weight in a file that is packed, on average; None is `bits`.
    """

    inputs: int
    outputs: int
    bits: float = FLOAT_BITS
    format: str = ""
    is_removed: bool = False
    form: str = ""
    ranks: tuple[int, ...] = ()
    stored_bits: float | None = None


@dataclass(frozen=True)
class LayerChange:
    """What one choice does to a layer; changes of several choices add up.

    Of two packings the smaller counts: what is sparse and has few values packs smaller still.
    """

    inputs: int = 0
    outputs: int = 0
    bits: float | None = None
    format: str = ""
    removes: bool = False
    form: str = ""
    ranks: tuple[int, ...] = ()
    stored_bits: float | None = None

    def applied_to(self, state: LayerState) -> LayerState:
        """`state` after this change."""
        return LayerState(
            state.inputs + self.inputs,
            state.outputs + self.outputs,
            self.bits or state.bits,
            self.format or state.format,
            state.is_removed or self.removes,
            self.form or state.form,
            self.ranks or state.ranks,
            min(
                (bits for bits in (state.stored_bits, self.stored_bits) if bits is not None),
                default=None,
            ),
        )


Effects = Mapping[str, Mapping[str, LayerChange]]  # choice key -> layer -> change
LayerCost = Callable[[str, LayerState], float]


class Space:
    """The choices of a run as one problem: what may be combined, at what damage and cost."""

    def __init__(
        self,
        choices: Sequence[Choice],
        effects: Effects,
        layers: Mapping[str, LayerState],
        made: Plan = NOTHING,
    ) -> None:
        """Group the choices by site.

        Args:
            choices: from all techniques.
            effects: of each choice, by its key; those in `made` too.
            layers: every layer whose cost can change, as it is in the reference.
            made: choices that every plan holds, unless another one of the same site takes its
                place.
        """
        self.layers = layers
        self.effects = effects
        first = {(choice.technique, choice.site): choice for choice in made}
        self.sites: dict[tuple[str, str], list[Choice]] = {site: [] for site in first}
        for choice in choices:
            self.sites.setdefault((choice.technique, choice.site), []).append(choice)
        self._options: list[list[Choice | None]] = [
            [first.get(site), *choices] for site, choices in self.sites.items()
        ]

    def problem(
        self,
        damage: Mapping[str, float],
        layer_cost: LayerCost,
        limits: Sequence[tuple[LayerCost, float]] = (),
    ) -> Problem:
        """The problem with these damages (by choice key), cost, and (cost, bound) limits.

        A layer's cost is exact for every combination of what touches it, up to `MOST_ENTRIES` of
        them. Above that (a layer that reads two dozen concatenated ones) it is additive: the cost
        with no choice, plus what each choice changes on its own.
        """
        sites = tuple(
            Site(
                ":".join(name),
                (0.0, *(max(damage[choice.key], 0.0) for choice in self.sites[name])),
            )
            for name in self.sites
        )
        return Problem(
            sites,
            self._factors(layer_cost),
            self._overrules(),
            tuple((self._factors(cost), bound) for cost, bound in limits),
        )

    def plan(self, options: Sequence[int]) -> Plan:
        """The plan that takes option `options[i]` at site i."""
        taken = [self._options[i][option] for i, option in enumerate(options)]
        return Plan(tuple(choice for choice in taken if choice is not None))

    def taken(self, options: Sequence[int]) -> list[Choice]:
        """The choices of the sites that are not left as they are, in the order of the sites."""
        pairs = zip(self._options, options, strict=True)
        return [choice for site, o in pairs if o and (choice := site[o]) is not None]

    def options(self, plan: Plan) -> list[int]:
        """The inverse of `plan`, for plans made of this space's choices."""
        keys = {choice.key for choice in plan}
        return [
            next((o for o, c in enumerate(options) if c is not None and c.key in keys), 0)
            for options in self._options
        ]

    def holds(self, plan: Plan) -> bool:
        """Whether `plan` is made of this space's choices."""
        return self.plan(self.options(plan)) == plan

    def interactions(self, damages: Mapping[tuple[str, str], float]) -> tuple[Factor, ...]:
        """Damages of pairs of choices, by key, beyond their sum: as tables over two sites."""
        place = {
            choice.key: (site, option)
            for site, options in enumerate(self._options)
            for option, choice in enumerate(options)
            if choice is not None
        }
        tables: dict[tuple[int, int], Floats] = {}
        for pair, damage in damages.items():
            if all(key in place for key in pair):
                (i, a), (j, b) = sorted(place[key] for key in pair)
                shape = len(self._options[i]), len(self._options[j])
                tables.setdefault((i, j), np.zeros(shape))[a, b] = damage
        return tuple(Factor(sites, table) for sites, table in tables.items())

    def _factors(self, layer_cost: LayerCost) -> tuple[Factor, ...]:
        return tuple(chain(*(self._factor(layer, layer_cost) for layer in self.layers)))

    def _factor(self, layer: str, layer_cost: LayerCost) -> list[Factor]:
        """The factors whose sum is the layer's cost: one, or additive ones if it were too large."""
        sites = tuple(i for i in range(len(self._options)) if self._touches(i, layer))
        if prod(len(self._options[i]) for i in sites) <= MOST_ENTRIES:
            return [self._joint_factor(layer, sites, layer_cost)]
        constant = self._joint_factor(layer, (), layer_cost)
        alone = [self._joint_factor(layer, (site,), layer_cost) for site in sites]
        return [constant, *(Factor(each.sites, each.cost - constant.cost) for each in alone)]

    def _joint_factor(self, layer: str, sites: tuple[int, ...], layer_cost: LayerCost) -> Factor:
        """The layer's cost under every combination of the options of `sites`, and of no others."""
        tables = [self._options[i] for i in sites]
        costs = [layer_cost(layer, self._state(layer, taken)) for taken in product(*tables)]
        return Factor(sites, np.array(costs).reshape([len(table) for table in tables]))

    def _state(self, layer: str, taken: Sequence[Choice | None]) -> LayerState:
        changes = [self.effects[c.key][layer] for c in taken if c and layer in self.effects[c.key]]
        return reduce(lambda state, change: change.applied_to(state), changes, self.layers[layer])

    def _touches(self, site: int, layer: str) -> bool:
        return any(choice and layer in self.effects[choice.key] for choice in self._options[site])

    def _overrules(self) -> tuple[tuple[int, int], ...]:
        """A site that removes every layer that another one acts on leaves it nothing to do."""
        removed = [self._layers(i, removed_only=True) for i in range(len(self._options))]
        touched = [self._layers(i, removed_only=False) for i in range(len(self._options))]
        return tuple(
            (i, j)
            for i, gone in enumerate(removed)
            for j, layers in enumerate(touched)
            if i != j and gone and layers and layers <= gone
        )

    def _layers(self, site: int, *, removed_only: bool) -> set[str]:
        return {
            layer
            for choice in self._options[site]
            if choice
            for layer, change in self.effects[choice.key].items()
            if change.removes or not removed_only
        }
