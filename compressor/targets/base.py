"""A target: where the compressed model will run, and where it is therefore measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from compressor.errors import ConfigError
from compressor.export.post_training import PostTraining
from compressor.interfaces.device import Device
from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.latency import Call, Timing, interleave
from compressor.quantization.kinds import Kind, reason_against
from compressor.quantization.plan import Formats, LayerFormat, QuantizationPlan, find_format
from compressor.structure.factored import Factored, chain_shapes
from compressor.targets.layer_latencies import LayerLatencies

Layer = _ConvNd | nn.Linear


@dataclass(frozen=True)
class Deployed:
    """A model as it runs on a target.

    Attributes:
        module: called like the model, on the target's device.
        size_bytes: of the file to deploy.
        files: what was written, by kind: "onnx" is the file to deploy, "onnx_float" its float form.
        simulate: makes what the file to deploy computes in torch; None if nothing is quantized, or
            there is no simulation.
    """

    module: nn.Module
    size_bytes: int
    files: Mapping[str, Path] = field(default_factory=dict)
    simulate: Callable[[], nn.Module] | None = None


class Target(ABC):
    """A runtime with a device, a number of threads and a batch size.

    Attributes:
        name: in the configuration.
        devices: that it runs on.
        stores_compact: what is deployed is packed: zeros and palettes take fewer bytes.

    Args:
        device: "cpu" or "cuda".
        threads: of one call on a CPU.
        batch_size: of the calls that are timed; what is deployed takes any.
        cache_path: a JSON file for what `layer_latency_ms` measures; None keeps it in memory.

    Raises:
        ConfigError: if the runtime does not run on such a device, or a number is below 1.
        DeviceError: if this machine does not have the device.
    """

    name: ClassVar[str]
    devices: ClassVar[tuple[str, ...]]
    stores_compact: ClassVar[bool] = False

    def __init__(
        self,
        device: str = "cpu",
        threads: int = 1,
        batch_size: int = 1,
        cache_path: Path | None = None,
    ) -> None:
        if device not in self.devices:
            raise ConfigError(
                f"The target runtime {self.name!r} does not run on device {device!r}. "
                f"Write one of {', '.join(self.devices)}, or choose another runtime."
            )
        for option, value in (("threads", threads), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError(f"target: {option}={value} is below 1. Write 1 or more.")
        Device.of(device).check_available(device)
        self.device = torch.device(device)
        self.threads = threads
        self.batch_size = batch_size
        self._latencies = LayerLatencies(cache_path)

    @abstractmethod
    def deploy(
        self,
        model: nn.Module,
        inputs: ModelInputs,
        folder: Path,
        *,
        formats: Formats | QuantizationPlan | None = None,
        calibration: Iterable[ModelInputs] | None = None,
    ) -> Deployed:
        """Make `model` what it is on this target; `model` itself is not changed.

        Args:
            model: in float, on any device.
            inputs: of one call.
            folder: for files; made if it is missing.
            formats: of the layers to quantize, by name, or all scales as well; None or empty is
                float.
            calibration: inputs to quantize by; asked for one after another.

        Raises:
            ConfigError: for a format that the target does not have.
            DataError: if int8 is asked for and there is nothing to calibrate on.
            ExportError: if the model cannot be written for the runtime.
            ModelError: if the model cannot be copied, or a layer does not exist.
        """

    @property
    def formats(self) -> frozenset[str]:
        """Those that it computes, by the names that `find_format` knows."""
        return frozenset()

    def runs(self, kind: Kind, layer: nn.Module | None, form: str) -> bool:
        """Whether it takes `layer`, or a weight that is no layer's, in that format."""
        del layer
        return form in self.formats and reason_against(kind, find_format(form), self.name) is None

    def simulate(self, quantizer: PostTraining, formats: Formats) -> nn.Module:
        """What the model of `quantizer` computes here with these layers quantized, in torch.

        It judges a format before anything is deployed: it need not be fast.
        """
        return quantizer.simulate(formats)

    def open(self, model: nn.Module, files: Mapping[str, Path]) -> nn.Module:
        """What `deploy` made of `model`, again.

        Args:
            model: as it was saved, in float.
            files: what `deploy` wrote, among others.
        """
        del files
        return model.to(self.device)

    def format(self, name: str) -> LayerFormat:
        """The format of that name, as this target computes it right.

        Raises:
            ConfigError: if there is no such format.
        """
        return find_format(name)

    def measure(self, modules: Mapping[str, nn.Module], inputs: ModelInputs) -> dict[str, Timing]:
        """Time deployed `modules` in turn, at this target's threads and batch size."""
        inputs = inputs.with_batch(self.batch_size)
        with ExitStack() as stack:
            calls = {
                name: stack.enter_context(self._call(module, inputs))
                for name, module in modules.items()
            }
            return interleave(calls, device=self.device)

    def layer_latency_ms(
        self, layer: nn.Module, input_shape: Sequence[int], form: str = ""
    ) -> float:
        """Time that `layer` alone takes here; measured once for each kind and shape.

        Args:
            layer: a convolution, a linear layer, or the chain of them that a layer has become; 0.0
                for any other, and for one that the runtime merges into its neighbours.
            input_shape: of its input in the model, batch first: (N, in, H, W), (N, in), (N, L, in).
            form: by name, one of `formats`; "" is float.

        Raises:
            ConfigError: for a format that the target does not have.
        """
        if form and form not in self.formats:
            raise self._missing(form)
        if isinstance(layer, Factored):  # in one file its layers take the same, within 3 %
            shapes = chain_shapes(layer.layers, input_shape)
            parts = zip(layer.layers, shapes[:-1], strict=True)
            return sum(self.layer_latency_ms(part, shape, form) for part, shape in parts)
        if not isinstance(layer, (_ConvNd, nn.Linear)) or not input_shape:
            return 0.0
        key = f"{self._signature()} {form or 'float'} {layer} {tuple(input_shape)}"
        return self._latencies.get(key, lambda: self._time_layer(layer, tuple(input_shape), form))

    def _missing(self, form: str) -> ConfigError:
        """The error where a format that the target does not have is asked for."""
        return ConfigError(
            f"The target runtime {self.name!r} does not run {form} on {self.device.type}. "
            f"{self.way_out()}"
        )

    def way_out(self) -> str:
        """What to do about a format that is missing."""
        return "Write target: {'runtime': 'onnxruntime', 'device': 'cpu'}, or do not quantize."

    def _signature(self) -> str:
        """What a layer's time depends on besides the layer."""
        return f"{self.name} {self.device.type} threads={self.threads}"

    @abstractmethod
    def _call(self, module: nn.Module, inputs: ModelInputs) -> AbstractContextManager[Call]:
        """One call of a deployed module, ready to be timed."""

    @abstractmethod
    def _time_layer(self, layer: Layer, input_shape: tuple[int, ...], form: str) -> float:
        """Milliseconds."""
