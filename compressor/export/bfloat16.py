"""A model in bfloat16, stored and computed, as an ONNX file for runtimes that have such kernels.

ONNX Runtime's CPU kernels are not among them (1.31.1): it refuses the file at its first layer.
"""

from __future__ import annotations

from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compressor.errors import ExportError, first_line
from compressor.interfaces.inputs import ModelInputs
from compressor.structure.fusion import fold
from compressor.structure.trace import copy_model, in_eval

BFLOAT16_OPSET = 22  # the first whose convolutions and pools take it


def in_bfloat16(model: nn.Module, inputs: ModelInputs) -> nn.Module:
    """A copy that computes in bfloat16, its batch norms folded before; called with float32.

    Raises:
        ExportError: if it does not run so.
        ModelError: if it cannot be copied.
    """
    copy = in_eval(copy_model(model))
    fold(copy, inputs)
    copy.to(torch.bfloat16)
    copy.register_forward_pre_hook(
        lambda _, args, kwargs: _cast((args, kwargs), torch.bfloat16), with_kwargs=True
    )
    copy.register_forward_hook(lambda *results: _cast(results[-1], torch.float32))
    try:
        with torch.no_grad():
            inputs.call(copy)
    except RuntimeError as error:
        raise ExportError(
            f"The model does not compute in bfloat16: {first_line(error)} "
            "Write precision='fp32', or 'fp16'."
        ) from error
    return copy


def check_types(proto: onnx.ModelProto) -> None:
    """Refuse a file with an operation that ONNX has not in bfloat16.

    Raises:
        ExportError: with the operation.
    """
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"ONNX does not have the whole model in bfloat16: {first_line(error)} "
            "Write precision='fp32', or 'fp16'."
        ) from error


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """All floating-point tensors of `values`."""

    def one(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(one, values)
