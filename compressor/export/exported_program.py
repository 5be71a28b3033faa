"""A model as a `torch.export` program with a dynamic batch: made, saved, loaded."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, ShapesCollection

from compressor.errors import ExportError, first_line
from compressor.export.detection_ops import traceable_detectors
from compressor.files import write_bytes
from compressor.interfaces.inputs import ModelInputs, device_of
from compressor.structure.trace import FORWARD_FAILURES, eval_mode, quiet_lstm


def export_program(
    model: nn.Module,
    inputs: ModelInputs,
    *,
    blamed: nn.Module | None = None,
    any_batch: bool = True,
) -> ExportedProgram:
    """`model` in evaluation mode as a graph that takes any batch size.

    A list of images has no such dimension: their number and sizes are fixed.

    Args:
        model: not changed; its mode is restored.
        inputs: one call's arguments. Dimension 0 of each tensor that is as long as the batch
            becomes dynamic; all else is fixed.
        blamed: the part of `model` whose module names an error speaks of; all of it by default.
        any_batch: whether there is a dimension for the batch; if not, all is fixed.

    Raises:
        ExportError: if the model cannot be traced; the message names the module.
    """
    example = inputs.to(device_of(model))
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    if any_batch and not is_image_list(inputs):
        # torch.export takes a batch of 0 or 1 for a constant
        example = example.with_batch(max(2, inputs.batch_size))
        for tensor in example.tensors():
            if tensor.dim() and len(tensor) == example.batch_size:
                shapes[tensor] = {0: Dim("batch")}
    kwargs = dict(example.kwargs)
    blamed = blamed or model
    with (
        eval_mode(model),
        traceable_detectors(model),
        _running_modules(blamed) as running,
        torch.no_grad(),
        quiet_lstm(),
    ):
        try:
            return torch.export.export(
                model,
                example.args,
                kwargs,
                dynamic_shapes=shapes.dynamic_shapes(  # type: ignore[no-untyped-call]
                    model, example.args, kwargs
                ),
                strict=False,
            )
        except ExportError:
            raise
        except FORWARD_FAILURES as error:
            raise ExportError(_reason(blamed, running, error)) from error


def is_image_list(inputs: ModelInputs) -> bool:
    """Whether the batch is a list of images, so that one more of them is one more tensor."""
    more = inputs.with_batch(inputs.batch_size + 1)
    return len(more.tensors()) != len(inputs.tensors())


def save_exported_program(model: nn.Module, inputs: ModelInputs, path: Path | str) -> Path:
    """Write `model` as a `.pt2` file that takes any batch size.

    Raises:
        ExportError: if the model cannot be traced.
        OSError: if the file cannot be written; none, or the one before, is left.
    """
    content = io.BytesIO()
    torch.export.save(export_program(model, inputs), content)
    write_bytes(Path(path), content.getbuffer())
    return Path(path)


def load_exported_program(path: Path | str) -> nn.Module:
    """The module that `save_exported_program` wrote; called like the model."""
    return torch.export.load(path).module()


@contextmanager
def _running_modules(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules whose call has begun and not ended: the last one is at fault."""
    running: list[str] = []
    handles = []
    for name, module in model.named_modules():

        def enter(*_: object, name: str = name) -> None:
            running.append(name)

        def leave(*_: object) -> None:
            running.pop()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def _reason(model: nn.Module, running: list[str], error: Exception) -> str:
    name = running[-1] if running else ""
    where = f"module {name!r} ({type(model.get_submodule(name)).__name__})"
    return (
        f"The model cannot be traced with a dynamic batch: {where} raised "
        f"{first_line(error)} Write its forward without control flow on tensor values and "
        "without a fixed batch size (`x.flatten(1)`, not `x.view(32, -1)`)."
    )
