"""The user's functions, with the defaults of the task where none was given."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.frameworks.base import Job
from compressor.interfaces.evaluation import Accuracy
from compressor.interfaces.forward_pass import TorchForwardPass
from compressor.interfaces.loss import LossFunction, make_loss
from compressor.interfaces.task import Task


class CrossEntropy(LossFunction):
    """Cross-entropy of the model's output for `batch[0]` against the classes `batch[1]`."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean over the batch."""
        inputs, classes = batch[0], batch[1]
        return F.cross_entropy(model(inputs), classes)


def make_task(job: Job) -> Task:
    """The user's forward pass, loss and evaluation; classification has defaults for all three.

    Raises:
        ConfigError: if another task lacks its loss or evaluation.
    """
    config = job.config
    is_classification = config.task_type == "classification"
    for name, value in (("loss_function_cls", job.loss_function_cls), ("eval_func", job.eval_func)):
        if value is None and not is_classification:
            raise ConfigError(
                f"{name} is missing, and task_type={config.task_type!r} has no default for it. "
                "Give your own."
            )
    loss = make_loss(
        job.loss_function_cls or CrossEntropy, job.loss_function_kwargs or {}, config.device
    )
    return Task(
        forward_pass=job.forward_pass or TorchForwardPass(model_input_pattern=(0, "_")),
        loss_function=loss,
        eval_function=job.eval_func or Accuracy(),
        eval_key=config.eval_key,
        mode=config.metric_mode,
    )
