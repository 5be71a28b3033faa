"""The reference in few bits: what its layers may be, what that does to it, and the file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

from torch import nn

from compressor.config import Config
from compressor.export.post_training import PostTraining
from compressor.frameworks.deployment import Deployment
from compressor.frameworks.latency_model import STATIC
from compressor.frameworks.layer_costs import stored_layers
from compressor.frameworks.layer_formats import allowed_formats, possible_formats, sites
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.plan import find_format
from compressor.result import Plan


class Numbers:
    """One reference; traced and calibrated once, when it is first asked for."""

    def __init__(
        self,
        config: Config,
        deployment: Deployment,
        reference: nn.Module,
        inputs: ModelInputs,
        calibration: Iterable[ModelInputs],
        lose: Callable[[str], None],
    ) -> None:
        """Do nothing yet.

        Args:
            config: what the user allows.
            deployment: the target.
            reference: on any device.
            inputs: of one call, on the CPU.
            calibration: calls of the reference, on the CPU.
            lose: told what cannot be done, and why.
        """
        self._config = config
        self._deployment = deployment
        self._reference = reference
        self._inputs = inputs
        self._calibration = calibration
        self._lose = lose

    @cached_property
    def formats(self) -> Mapping[str, Sequence[str]]:
        """What each layer may be quantized to, in the order in which they run; then embeddings."""
        if not self._deployment.target.formats:
            return {}
        config, runs = self._config, self._deployment.target.runs
        counted = stored_layers(self._reference)  # of others nobody knows what it gains
        found = sites(self._quantizer.graph, self._reference)
        found = {
            name: site
            for name, site in found.items()
            if name in counted or site.kind in {"convolution", "linear"}
        }
        possible = possible_formats(found, config.optimization, runs)
        allowed = allowed_formats(possible, found, self._reference, config.custom_compression, runs)
        if possible and not allowed:
            self._lose(
                f"None of the {len(possible)} layers that the target can quantize is quantized: "
                f"custom_compression leaves all in float. {_option(config)}"
            )
        return allowed

    @property
    def static_layers(self) -> list[str]:
        """Layers that may run on integers whose ranges are fixed."""
        return [
            name
            for name, formats in self.formats.items()
            if any(find_format(form).activations == "static" for form in formats)
        ]

    def simulate(self, plan: Plan) -> nn.Module:
        """The reference with the layers quantized that `plan` names, in torch."""
        formats = {c.site: self._deployment.format(c.setting["format"]) for c in plan}
        return self._deployment.simulate(self._quantizer, formats)

    def runtime_model(self, layers: Sequence[str]) -> nn.Module:
        """The reference with `layers` on integers, as it runs on the target."""
        formats = dict.fromkeys(layers, self._deployment.format(STATIC))
        return self._deployment.quantized_file(self._quantizer, formats)

    @cached_property
    def _quantizer(self) -> PostTraining:
        return self._deployment.quantizer(self._reference, self._inputs, self._calibration)


def _option(config: Config) -> str:
    """What to change of `custom_compression` where it leaves no layer."""
    custom = config.custom_compression
    args = None if custom is None else custom.quantization_args
    if args is None:
        return "Write a precision below 32 for one of its layers."
    if args.skip_layers_ratio:
        return f"It has skip_layers_ratio={args.skip_layers_ratio:g}: write a smaller one."
    return "Write quantize_conv11=True or quantize_group=True, or fewer skip_layers."
