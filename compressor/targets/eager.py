"""Plain torch as a target."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.latency import Call, eager_call, interleave
from compressor.quantization.plan import Formats, QuantizationPlan
from compressor.structure.archive import packed_size_bytes
from compressor.structure.trace import copy_model, in_eval
from compressor.targets.base import Deployed, Layer, Target


class EagerTarget(Target):
    """The model as it is, in torch; on CUDA timed with a full queue."""

    name = "eager"
    devices = ("cpu", "cuda")
    stores_compact: ClassVar[bool] = True  # what ships is the packed archive

    def deploy(
        self,
        model: nn.Module,
        inputs: ModelInputs,
        folder: Path,
        *,
        formats: Formats | QuantizationPlan | None = None,
        calibration: Iterable[ModelInputs] | None = None,
    ) -> Deployed:
        """A copy of `model` on the target's device, in evaluation mode; no file is written.

        Its size is that of the weights in a saved archive, where zeros and palettes are packed.
        """
        if formats:
            raise self._missing("quantized layers")
        module = in_eval(copy_model(model).to(self.device))
        return Deployed(module, packed_size_bytes(module))

    def _call(self, module: nn.Module, inputs: ModelInputs) -> AbstractContextManager[Call]:
        # An evaluation in between may have moved it to the device of the training.
        return eager_call(module.to(self.device), inputs, threads=self.threads)

    def _time_layer(self, layer: Layer, input_shape: tuple[int, ...], form: str) -> float:
        return time_eager_layer(layer, input_shape, self.device, self.threads)


def time_eager_layer(
    layer: Layer, input_shape: tuple[int, ...], device: torch.device, threads: int
) -> float:
    """Milliseconds of one call of a copy of `layer` on `device`, alone."""
    module = copy_model(layer).to(device)
    inputs = ModelInputs((torch.zeros(input_shape, dtype=layer.weight.dtype),))
    with eager_call(module, inputs, threads=threads) as call:
        timing = interleave({"layer": call}, total_ms=25, block_ms=2.5, warmup_ms=10, device=device)
    return timing["layer"].best_ms
