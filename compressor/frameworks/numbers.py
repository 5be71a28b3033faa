"""The reference in few bits: what its layers may be, what that does to it, and the file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from torch import nn

from compressor.config import Config
from compressor.export.post_training import PostTraining
from compressor.frameworks.deployment import Deployment
from compressor.frameworks.latency_model import STATIC
from compressor.frameworks.layer_costs import tables
from compressor.frameworks.layer_formats import allowed_formats, possible_formats
from compressor.interfaces.inputs import ModelInputs
from compressor.result import Choice


class Numbers:
    """One reference; traced and calibrated once, when it is first asked for."""

    def __init__(
        self,
        config: Config,
        deployment: Deployment,
        reference: nn.Module,
        inputs: ModelInputs,
        calibration: Iterable[ModelInputs],
    ) -> None:
        """Do nothing yet.

        Args:
            config: what the user allows.
            deployment: the target.
            reference: on any device.
            inputs: of one call, on the CPU.
            calibration: calls of the reference, on the CPU.
        """
        self._config = config
        self._deployment = deployment
        self._reference = reference
        self._inputs = inputs
        self._calibration = calibration

    @cached_property
    def formats(self) -> Mapping[str, Sequence[str]]:
        """What each layer may be quantized to, in the order in which they run; then embeddings."""
        if not self._deployment.target.formats:
            return {}
        config, runs = self._config, self._deployment.target.runs
        embeddings = tables(self._reference)
        looked_up = [name for name in self._quantizer.tables if name in embeddings]
        layers = [*self._quantizer.layers, *looked_up]
        possible = possible_formats(layers, self._reference, config.optimization, runs)
        return allowed_formats(possible, self._reference, config.custom_compression, runs)

    @property
    def static_layers(self) -> list[str]:
        """Layers that may run on integers whose ranges are fixed."""
        return [name for name, formats in self.formats.items() if STATIC in formats]

    def simulate(self, choice: Choice) -> nn.Module:
        """The reference with one layer quantized, in torch."""
        form = self._deployment.format(choice.setting["format"])
        return self._deployment.simulate(self._quantizer, {choice.site: form})

    def runtime_model(self, layers: Sequence[str]) -> nn.Module:
        """The reference with `layers` on integers, as it runs on the target."""
        formats = dict.fromkeys(layers, self._deployment.format(STATIC))
        return self._deployment.quantized_file(self._quantizer, formats)

    @cached_property
    def _quantizer(self) -> PostTraining:
        return self._deployment.quantizer(self._reference, self._inputs, self._calibration)
