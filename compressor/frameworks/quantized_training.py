"""Training a variant through the rounding of its numbers, and what that has taught its quantizers.

The variant stays a float model: its weights are those that round well, and the scales that were
learned with them are kept beside it, for the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from compressor.errors import ModelError, first_line
from compressor.export.post_training import PostTraining
from compressor.files import write_bytes
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.model import QuantizedModel
from compressor.quantization.plan import Formats, QuantizationPlan
from compressor.structure.fusion import fold
from compressor.structure.trace import FORWARD_FAILURES

ATTRIBUTE = "compressor_quantization"
FILE = "quantization.json"
T = TypeVar("T")


def train_quantized(
    model: nn.Module,
    formats: Formats,
    inputs: ModelInputs,
    calibration: Iterable[ModelInputs],
    fit: Callable[[nn.Module], T],
    loss: Callable[[nn.Module], object],
) -> T:
    """Train `model` in place, its batch norms folded, with the layers of `formats` quantized.

    Args:
        model: in float; where it was trained so before, its scales go on from where they were.
        formats: by layer.
        inputs: of one call, on the device of the model.
        calibration: calls of the model.
        fit: trains a quantized model in place.
        loss: of a model on a batch, tried first.

    Returns:
        What `fit` returned.

    Raises:
        ModelError: if the user's loss needs more of a model than to call it, or the graph has
            parameters that are not the model's.
        ExportError: if the model cannot be traced.
    """
    fold(model, inputs)
    quantizer = PostTraining(model, inputs, calibration)
    if not quantizer.shares_parameters:
        raise ModelError(
            "The model cannot be trained in int8: it has batch norms of a class of its own, which "
            "are folded in its graph alone. Use torch's batch norms."
        )
    known = learned_plan(model)
    plan = known if known is not None and known.formats == dict(formats) else None
    quantized = QuantizedModel(quantizer.graph, plan or quantizer.plan(formats))
    try:
        loss(quantized)
    except FORWARD_FAILURES as error:
        raise ModelError(
            "The model cannot be trained in int8: the loss fails on its graph: "
            f"{first_line(error)} Let the loss use the outputs alone."
        ) from error
    told = fit(quantized)
    with torch.no_grad():
        trained = dict(quantizer.model.named_parameters())
        for name, parameter in model.named_parameters():
            parameter.copy_(trained[name])
    remember_plan(model, quantized.plan())
    return told


def learned_plan(model: nn.Module) -> QuantizationPlan | None:
    """What training has taught the model's quantizers; None if it was not trained so."""
    plan: QuantizationPlan | None = getattr(model, ATTRIBUTE, None)
    return plan


def remember_plan(model: nn.Module, plan: QuantizationPlan) -> None:
    """Keep `plan` with the model, and with its copies."""
    setattr(model, ATTRIBUTE, plan)


def save_plan(model: nn.Module, folder: Path) -> None:
    """Write the plan that `model` has beside its weights; nothing if it has none."""
    for name, content in plan_to_bytes(model).items():
        write_bytes(folder / name, content)


def load_plan(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with the plan that `save_plan` wrote, if it did."""
    path = folder / FILE
    return plan_from_bytes(model, {FILE: path.read_bytes()} if path.is_file() else {})


def plan_to_bytes(model: nn.Module) -> dict[str, bytes]:
    """What `save_plan` writes, by the name of the file."""
    plan = learned_plan(model)
    return {} if plan is None else {FILE: json.dumps(plan.to_json()).encode()}


def plan_from_bytes(model: nn.Module, files: Mapping[str, bytes]) -> nn.Module:
    """`model` with the plan that is among `files`, if there is one."""
    if FILE in files:
        remember_plan(model, QuantizationPlan.from_json(json.loads(files[FILE])))
    return model
