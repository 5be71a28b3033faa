"""How far an exported file's outputs are from the model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from compressor.errors import ExportError
from compressor.interfaces.inputs import ModelInputs, device_of, output_tensors
from compressor.result import Parity
from compressor.structure.trace import eval_mode


def parity(model: nn.Module, runtime_module: Callable[..., Any], inputs: ModelInputs) -> Parity:
    """Compare `model` in evaluation mode with the file that was made of it, on the same inputs.

    Raises:
        ExportError: if the file returns other outputs than the model, or some that are not finite.
    """
    with eval_mode(model), torch.no_grad():
        expected = output_tensors(inputs.to(device_of(model)).call(model))
        actual = output_tensors(inputs.call(runtime_module))
    wanted = [tuple(tensor.shape) for tensor in expected]
    if [tuple(tensor.shape) for tensor in actual] != wanted:
        raise ExportError(
            f"The exported file returns shapes {[tuple(tensor.shape) for tensor in actual]}, "
            f"the model {wanted}. Look for sizes that its forward computes in Python."
        )
    absolute, relative = 0.0, 0.0
    for tensor, reference in zip(actual, expected, strict=True):
        if not reference.numel():
            continue
        reference = reference.detach().double().cpu()
        error = float((tensor.detach().double().cpu() - reference).abs().max())
        if not error < float("inf"):
            raise ExportError(
                "The exported file returns values that are not finite. "
                "Export in fp32 if it was in fp16; else check the model's own outputs."
            )
        absolute = max(absolute, error)
        relative = max(relative, error / max(float(reference.abs().max()), 1e-12))
    return Parity(absolute, relative, inputs.batch_size)
