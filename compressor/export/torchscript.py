"""A model as TorchScript, by tracing: deprecated, for runtimes that read nothing newer."""

from __future__ import annotations

import inspect
import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.jit._trace import TracerWarning

from compressor.errors import ExportError, first_line
from compressor.files import write_bytes
from compressor.interfaces.inputs import ModelInputs, device_of
from compressor.structure.trace import FORWARD_FAILURES, eval_mode


def save_torchscript(model: nn.Module, inputs: ModelInputs, path: Path | str) -> Path:
    """Write the trace of `model` in evaluation mode; `torch.jit.load` reads it.

    A trace follows the path that these inputs take: control flow on values is lost, and a size that
    Python code reads from the batch is fixed.

    Args:
        model: not changed; its mode is restored.
        inputs: one call's arguments.
        path: of the file.

    Raises:
        ExportError: if the model cannot be traced.
        OSError: if the file cannot be written; none, or the one before, is left.
    """
    example = inputs.to(device_of(model))
    given: dict[str, Any] = {"example_inputs": example.args}
    if example.kwargs:
        given = {"example_kwarg_inputs": _by_keyword(model, example)}
    with eval_mode(model), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit\.\w+` is deprecated")
        warnings.filterwarnings("ignore", category=TracerWarning)
        try:
            # not strict: outputs may be dicts; not checked: `parity` compares what was written
            traced = torch.jit.trace(  # type: ignore[no-untyped-call]
                model, **given, strict=False, check_trace=False
            )
        except FORWARD_FAILURES as error:
            raise ExportError(
                f"The model cannot be traced to TorchScript: {first_line(error)} "
                "Leave 'torchscript' out of the export formats."
            ) from error
        content = io.BytesIO()
        torch.jit.save(traced, content)
    write_bytes(Path(path), content.getbuffer())
    return Path(path)


def _by_keyword(model: nn.Module, inputs: ModelInputs) -> dict[str, Any]:
    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    return dict(bound.arguments)
