"""What a layer costs in milliseconds within the whole model, from its time alone.

Timed alone, layers do not add up to their model: it also adds, pools, reshapes and converts, and
its caches are fuller. That rest goes with the layers, so a layer's time is multiplied by a factor:
one for float and one for int8, such that the whole reference costs what was measured of it in
either. Measured on six networks (four are in `benchmarks/latency_table.py`), this predicts pruned,
shortened and int8 variants better than a constant for the model, a constant for each layer, or half
a factor and half a constant do; the last is a little better for a ViT, and worse for most others.

Where a layer in float has neighbours in int8, the runtime converts in between, which costs more
than a small layer takes. So a layer that could be int8 and is not costs a constant on top, measured
on the reference with a third of them left in float. Where all are in float, and int8 was a choice,
the model is therefore cheaper than the sum says.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from compressor.frameworks.layer_costs import layer_state
from compressor.logs import get_logger
from compressor.quantization.plan import find_format
from compressor.search.space import FLOAT_BITS, LayerCost, LayerState
from compressor.structure.factored import Layer
from compressor.structure.groups import ChannelGroup
from compressor.targets.layer_latencies import LayerLatencies

logger = get_logger(__name__)

INT8_BITS = 8
STATIC = "static_int8"


class LatencyModel:
    """Cost of any layer in any state. What a run was once told stays the same when it goes on."""

    def __init__(
        self,
        layers: Mapping[str, LayerState],
        alone: LayerCost,
        macs: LayerCost,
        table: LayerLatencies,
        *,
        limit_seconds: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Time nothing yet.

        Args:
            layers: as they are in the reference.
            alone: milliseconds of a layer by itself, timed when asked.
            macs: of a layer; where the time is up, latency is proportional to them.
            table: what this run has been told.
            limit_seconds: for timing; what is then still missing is estimated.
            clock: seconds, for tests.
        """
        self._layers = layers
        self._alone = alone
        self._macs = macs
        self._table = table
        self._limit_seconds = limit_seconds
        self._clock = clock
        self._spent_seconds = 0.0
        self._timed: dict[str, dict[LayerState, float]] = {}
        self._factors = {False: 1.0, True: 1.0}  # by whether a layer is int8
        self._conversion_ms = 0.0
        self._int8_layers: frozenset[str] = frozenset()
        self._is_said = False

    def calibrate(self, float_ms: float) -> None:
        """Make the reference cost what was measured of it in float."""
        self._factors[False] = _ratio(float_ms, self._sum(()))
        self._factors[True] = self._factors[False]

    def calibrate_int8(
        self,
        int8_layers: Collection[str],
        int8_ms: float,
        mixed_layers: Collection[str],
        mixed_ms: float,
    ) -> None:
        """Make it cost what was measured with int8 as well; after `calibrate`.

        Args:
            int8_layers: those that the runtime can run in int8.
            int8_ms: of the reference with them in int8.
            mixed_layers: those that were left in float.
            mixed_ms: of the reference with the others in int8.
        """
        int8 = [name for name in self._layers if name in int8_layers]
        alone_ms = sum(self._raw(name, in_int8(self._layers[name])) for name in int8)
        in_float_ms = self._sum(()) - sum(self.cost(name, self._layers[name]) for name in int8)
        if int8_ms > in_float_ms:
            self._factors[True] = _ratio(int8_ms - in_float_ms, alone_ms)
        converting = [name for name in int8 if name in mixed_layers]
        if converting and int8_ms < self._sum(()):
            extra_ms = mixed_ms - self._sum([name for name in int8 if name not in converting])
            self._conversion_ms = max(extra_ms / len(converting), 0.0)
            self._int8_layers = frozenset(int8)

    def cost(self, name: str, state: LayerState) -> float:
        """Milliseconds."""
        is_int8 = bool(state.format) and find_format(state.format).activations == "static"
        latency_ms = self._factors[is_int8] * self._raw(name, state)
        converts = latency_ms > 0 and not is_int8 and name in self._int8_layers
        return latency_ms + (self._conversion_ms if converts else 0.0)

    def _sum(self, int8_layers: Collection[str]) -> float:
        """Milliseconds of the reference with these in int8."""
        return sum(
            self.cost(name, in_int8(state) if name in int8_layers else state)
            for name, state in self._layers.items()
        )

    def _raw(self, name: str, state: LayerState) -> float:
        """Milliseconds alone: as told before, timed, or estimated."""
        if state.is_removed:
            return 0.0
        state = replace(state, bits=FLOAT_BITS, stored_bits=None)
        return self._table.get(f"{name} {state}", lambda: self._time(name, state))

    def _time(self, name: str, state: LayerState) -> float:
        if self._spent_seconds >= self._limit_seconds:
            return self._estimate(name, state)
        started = self._clock()
        latency_ms = self._timed.setdefault(name, {})[state] = self._alone(name, state)
        self._spent_seconds += self._clock() - started
        return latency_ms

    def _estimate(self, name: str, state: LayerState) -> float:
        """From the most similar state of this layer that was timed, else from all, by the MACs."""
        if not self._is_said:
            self._is_said = True
            logger.warning(
                "Timing single layers took %.0f s, as much as the minutes allow: what is missing "
                "is estimated from what was measured.",
                self._spent_seconds,
            )
        macs = self._macs(name, state)
        timed = {known: ms for known, ms in self._timed.get(name, {}).items() if ms > 0}
        if not timed or not macs:
            return macs * self._ms_per_mac()

        def distance(known: LayerState) -> tuple[bool, float]:
            return known.format != state.format, abs(math.log(self._macs(name, known) / macs))

        nearest = min(timed, key=distance)
        return timed[nearest] * macs / self._macs(name, nearest)

    def _ms_per_mac(self) -> float:
        known = [(self._macs(n, s), ms) for n, at in self._timed.items() for s, ms in at.items()]
        return _ratio(sum(ms for _, ms in known), sum(macs for macs, _ in known))


def group_latency_ms(
    group: ChannelGroup,
    width: int,
    layers: Mapping[str, Layer],
    cost: LayerCost,
    int8_layers: Collection[str] = (),
) -> float:
    """Milliseconds of the layers of `group` when it keeps `width` of its channels.

    All in float, or those that can be in int8: whichever takes less, as that is what the allocation
    will take. Not the cheaper type of each layer: neighbours of different types convert in between.

    Args:
        group: of the model that has the layers.
        width: 1 to `group.size`; which of the channels are kept does not matter.
        layers: by name; those that the group does not run through are left out.
        cost: milliseconds of a layer in a state.
        int8_layers: those that may be quantized.
    """
    states = narrowed(group, width, layers)
    in_float = sum(cost(name, state) for name, state in states.items())
    quantized = sum(
        cost(name, in_int8(state) if name in int8_layers else state)
        for name, state in states.items()
    )
    return min(in_float, quantized)


def narrowed(group: ChannelGroup, width: int, layers: Mapping[str, Layer]) -> dict[str, LayerState]:
    """The layers of `group`, by name, when it keeps `width` of its channels and all else stays."""
    states: dict[str, LayerState] = {}
    for member in group.members:
        owner, _, key = member.tensor.rpartition(".")
        if key != "weight" or owner not in layers:
            continue
        layer = layers[owner]
        state = states.get(owner, layer_state(layer))
        gone = round(sum(map(len, member.index)) * (group.size - width) / group.size)
        if member.side == "in":
            state = replace(state, inputs=state.inputs - gone)
        elif getattr(layer, "groups", 1) > 1:  # what it makes of a channel goes with the channel
            inputs = state.inputs - round(gone * state.inputs / state.outputs)
            state = replace(state, inputs=inputs, outputs=state.outputs - gone)
        else:
            state = replace(state, outputs=state.outputs - gone)
        states[owner] = state
    return states


def in_int8(state: LayerState) -> LayerState:
    """`state` with weights and activations of eight bits, in fixed ranges."""
    return replace(state, bits=INT8_BITS, format=STATIC)


def _ratio(value: float, whole: float) -> float:
    """1 where nothing can be said."""
    return value / whole if value > 0 and whole > 0 else 1.0
