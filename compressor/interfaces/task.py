"""What is to be kept: how the model is called, trained and judged, as one value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.interfaces.device import Device
from compressor.interfaces.evaluation import Evaluation, evaluate, evaluating, model_device
from compressor.interfaces.forward_pass import ForwardPass
from compressor.interfaces.inputs import ModelInputs, record_inputs
from compressor.interfaces.loss import Loss, call_loss


@dataclass(frozen=True)
class Task:
    """The user's forward pass, loss and evaluation.

    Attributes:
        forward_pass: the only place that knows a batch's form.
        loss_function: of (model, batch).
        eval_function: of (model, loader) or (model, loader, device).
        eval_key: the value of its dict that counts; None: the only one there is, or mAP, or mIoU.
        mode: "max" if more is better.
    """

    forward_pass: ForwardPass
    loss_function: Loss
    eval_function: Evaluation
    eval_key: str | None
    mode: Literal["max", "min"] = "max"

    def inputs(self, model: nn.Module, batch: Any) -> ModelInputs:
        """What `model` is called with for `batch`, on the CPU. Runs it once, in eval mode.

        Raises:
            ModelError: if the forward pass does not call the model.
        """
        device = model_device(model)
        with evaluating(model):
            inputs = record_inputs(
                model, lambda running: self.forward_pass.perform(running, batch, device)
            )
        return inputs.map(lambda tensor: tensor.detach().cpu())

    def outputs(self, model: nn.Module, batch: Any, device: Device | torch.device) -> Any:
        """What `model` on `device` returns for `batch`; mode and grad are the caller's."""
        return self.forward_pass.perform(model, batch, device)

    def loss(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Named terms, each of shape (); their sum is the loss.

        Raises:
            LossError: if a term is not a tensor with one element.
        """
        return call_loss(self.loss_function, model, batch)

    def evaluate(self, model: nn.Module, loader: Iterable[Any], device: Device) -> dict[str, float]:
        """The user's metrics, all finite; `eval_key` is among them.

        Raises:
            MetricError: if it is not, or is no finite number.
        """
        return evaluate(self.eval_function, model, loader, device, self.eval_key)
