"""`torch.compile` as a target."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from compressor.errors import ExportError
from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.latency import Call, eager_call
from compressor.quantization.plan import Formats, QuantizationPlan
from compressor.structure.archive import packed_size_bytes
from compressor.structure.trace import copy_model, in_eval
from compressor.targets.base import Deployed, Layer, Target
from compressor.targets.eager import time_eager_layer


class InductorTarget(Target):
    """The model compiled by torch's inductor.

    A layer's own latency is its eager one: compiling every layer would take seconds each.
    """

    name = "inductor"
    devices = ("cpu", "cuda")
    supports_int8 = False
    stores_compact = True  # what ships is the packed archive

    def deploy(
        self,
        model: nn.Module,
        inputs: ModelInputs,
        folder: Path,
        *,
        formats: Formats | QuantizationPlan | None = None,
        calibration: Iterable[ModelInputs] | None = None,
    ) -> Deployed:
        """A compiled copy of `model`, called once so that errors come now; no file is written."""
        self._require_int8(bool(formats))
        module = in_eval(copy_model(model).to(self.device))
        size_bytes = packed_size_bytes(module)
        compiled = cast(nn.Module, torch.compile(module))
        try:
            with eager_call(
                compiled, inputs.with_batch(self.batch_size), threads=self.threads
            ) as call:
                call()
        except TorchDynamoException as error:
            fact = next((line for line in str(error).splitlines() if line.strip()), repr(error))
            raise ExportError(
                f"torch.compile refuses the model: {fact.strip()} "
                "Write target: {'runtime': 'eager'} or {'runtime': 'onnxruntime'}."
            ) from error
        return Deployed(compiled, size_bytes)

    def _call(self, module: nn.Module, inputs: ModelInputs) -> AbstractContextManager[Call]:
        return eager_call(module.to(self.device), inputs, threads=self.threads)

    def _time_layer(self, layer: Layer, input_shape: tuple[int, ...], form: str) -> float:
        return time_eager_layer(layer, input_shape, self.device, self.threads)
