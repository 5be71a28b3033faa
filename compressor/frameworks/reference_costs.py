"""What the layers of one reference cost on the target of a job, in any state they may have."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from torch import nn

from compressor.config import Config
from compressor.frameworks.deployment import QUANTIZATION, Deployment
from compressor.frameworks.latency_model import LatencyModel, group_latency_ms, in_int8
from compressor.frameworks.layer_costs import (
    costly_layers,
    latency_cost,
    layer_state,
    macs_cost,
    size_cost,
    stored_layers,
)
from compressor.frameworks.numbers import Numbers
from compressor.interfaces.inputs import ModelInputs, device_of
from compressor.profiling.counts import count
from compressor.result import digest
from compressor.search.space import LayerCost, LayerState
from compressor.structure.groups import ChannelGroup
from compressor.structure.trace import input_shapes
from compressor.targets.layer_latencies import LayerLatencies

TIMING_SHARE = 0.1  # of the minutes: for timing single layers
DRYRUN_SECONDS = 5.0  # for the same


class ReferenceCosts:
    """Bytes, multiply-accumulates and milliseconds of layers, by their names."""

    def __init__(
        self,
        reference: nn.Module,
        example: ModelInputs,
        config: Config,
        deployment: Deployment,
        numbers: Numbers,
        *,
        techniques: Collection[str],
        folder: Path,
        key: str,
        latency_ms: Callable[[], float],
        time_ms: Callable[[nn.Module], float],
        is_dryrun: bool = False,
    ) -> None:
        """Time nothing yet.

        Args:
            reference: on the device of the job.
            example: inputs of a call, on the CPU.
            config: of the job.
            deployment: its target.
            numbers: the reference in few bits.
            techniques: names of those that are tried.
            folder: keeps the times.
            key: digest of the reference.
            latency_ms: of the reference on the target.
            time_ms: the latency of a deployed module on the scale of `latency_ms`.
            is_dryrun: a few layers are timed, and the others estimated.
        """
        self._reference = reference
        self._example = example
        self._config = config
        self._deployment = deployment
        self._numbers = numbers
        self._techniques = techniques
        self._folder = folder
        self._key = key
        self._latency_ms = latency_ms
        self._time_ms = time_ms
        self._is_dryrun = is_dryrun
        self._layers = costly_layers(reference)

    def layer_cost(self, resource: str) -> LayerCost:
        """Cost of a layer in a state, for resource "latency_ms", "size_bytes" or "macs"."""
        if resource == "size_bytes":
            stored = stored_layers(self._reference)
            return size_cost(stored, stores_compact=self._deployment.target.stores_compact)
        if resource == "macs":
            inputs = self._example.with_batch(1).to(device_of(self._reference))
            counted = count(self._reference, inputs)
            return macs_cost(
                self._layers,
                {layer.name: layer.macs for layer in counted.layers},
                {layer.name: layer.input_shape for layer in counted.layers},
            )
        cost = self._latency.cost  # of LSTMs, attention and tables no time is measured alone
        return lambda name, state: cost(name, state) if name in self._layers else 0.0

    def layer_saves(self, name: str, form: str, ranks: tuple[int, ...]) -> bool:
        """Whether a layer is faster as a chain, at the widths of the reference.

        In float or in int8, whichever is faster where a run may choose: a chain of two small layers
        seldom pays in int8.
        """
        stored = stored_layers(self._reference)
        if name not in stored:  # inside an attention that pruning replaces
            return False
        whole = layer_state(stored[name])
        chain = replace(whole, form=form, ranks=ranks)
        return self._fastest_ms(name, chain) < self._fastest_ms(name, whole)

    def _fastest_ms(self, name: str, state: LayerState) -> float:
        states = [state, in_int8(state)] if name in self._int8_layers else [state]
        return min(self._latency.cost(name, each) for each in states)

    def group_cost(self, group: ChannelGroup, width: int) -> float:
        """Milliseconds of the layers of `group` at a width."""
        return group_latency_ms(group, width, self._layers, self._latency.cost, self._int8_layers)

    @property
    def _int8_layers(self) -> Sequence[str]:
        """Layers that may be quantized in this run."""
        return self._numbers.static_layers if QUANTIZATION in self._techniques else ()

    @cached_property
    def _latency(self) -> LatencyModel:
        """Milliseconds of layers within the reference."""
        config = self._config
        inputs = self._example.with_batch(config.target.batch_size)
        shapes = input_shapes(self._reference, inputs.to(device_of(self._reference)))
        minutes = config.budget.minutes
        target = dict(self._deployment.describe())
        key = digest([self._key, target, minutes, sorted(self._techniques)])
        told = LayerLatencies(self._folder / f"layer_costs-{key}.jsonl")
        model = LatencyModel(
            {name: layer_state(layer) for name, layer in self._layers.items()},
            latency_cost(self._layers, shapes, self._deployment.layer_latency_ms),
            self.layer_cost("macs"),
            told,
            limit_seconds=self._limit_seconds(minutes),
        )
        model.calibrate(self._latency_ms())
        if int8 := self._int8_layers:
            mixed = int8[1::3]  # none of them beside another
            int8_ms = told.get("int8", lambda: self._int8_latency_ms(int8))
            others = [name for name in int8 if name not in mixed]
            mixed_ms = told.get("mixed", lambda: self._int8_latency_ms(others))
            model.calibrate_int8(int8, int8_ms, mixed, mixed_ms)
        return model

    def _limit_seconds(self, minutes: float | None) -> float:
        """For timing single layers."""
        if self._is_dryrun:
            return DRYRUN_SECONDS
        return math.inf if minutes is None else minutes * 60 * TIMING_SHARE

    def _int8_latency_ms(self, layers: Sequence[str]) -> float:
        """Of the reference with `layers` in int8."""
        return self._time_ms(self._numbers.runtime_model(layers))
