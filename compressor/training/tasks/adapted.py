"""A task made of what the engine takes: forward pass, loss function, evaluation function."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.interfaces.device import Device
from compressor.interfaces.evaluation import Evaluation, evaluate, model_device
from compressor.interfaces.forward_pass import ForwardPass
from compressor.interfaces.loss import Loss, call_loss
from compressor.training.step import replaying
from compressor.training.tasks.base import TaskModel


class AdaptedTask(TaskModel):
    """Calls, trains and judges `model` as the user of an engine wrote it.

    The loss function calls the model itself. Here the model gives back what
    `forward` returned, so that it runs once, and algorithms have a say in its outputs. It
    may call it once, on the inputs of the forward pass.

    Args:
        model: the network.
        forward_pass: how a batch becomes a call of it.
        loss_function: of (model, batch).
        eval_function: of (model, loader) or (model, loader, device); None: not to be evaluated.
        eval_key: the value of its dict that counts; None: the only one there is.

    >>> import torch
    >>> from compressor.interfaces import TorchForwardPass
    >>> def loss(model, batch):
    ...     return nn.functional.mse_loss(model(batch[0]), batch[1])
    >>> task = AdaptedTask(nn.Linear(2, 1), TorchForwardPass((0, "_")), loss)
    >>> batch = (torch.ones(4, 2), torch.zeros(4, 1))
    >>> task.loss(task(batch), batch)["loss"] == loss(task.model, batch)
    tensor(True)
    """

    def __init__(
        self,
        model: nn.Module,
        forward_pass: ForwardPass,
        loss_function: Loss,
        eval_function: Evaluation | None = None,
        eval_key: str | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.forward_pass = forward_pass
        self.loss_function = loss_function
        self.eval_function = eval_function
        self.eval_key = eval_key
        self._loss_device: Device | None = None

    def forward(self, batch: Any) -> Any:
        """What the forward pass returns."""
        return self.forward_pass.perform(self.model, batch, model_device(self.model))

    def loss(self, outputs: Any, batch: Any) -> dict[str, Tensor]:
        """The named terms of the loss function.

        Raises:
            LossError: if one is not a tensor with one element.
        """
        self._tell_device()
        with replaying(self.model, [outputs]) as model:
            return call_loss(self.loss_function, model, batch)

    def evaluate(self, loader: Iterable[Any]) -> dict[str, float]:
        """The metrics of the evaluation function, all finite.

        Raises:
            ConfigError: if there is no evaluation function.
            MetricError: if it does not give `eval_key`.
        """
        if self.eval_function is None:
            raise ConfigError(
                "This task has no evaluation. Give AdaptedTask an eval_function(model, loader)."
            )
        device = model_device(self.model)
        return evaluate(self.eval_function, self.model, loader, device, self.eval_key)

    def _tell_device(self) -> None:
        """Let a loss that moves batches itself move them to where the model is."""
        device = model_device(self.model)
        to_device = getattr(self.loss_function, "to_device", None)
        if device is not self._loss_device and callable(to_device):
            to_device(device)
        self._loss_device = device
