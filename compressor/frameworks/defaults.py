"""What a job has where the user gave nothing: functions of the task, and the techniques."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from compressor.config import Config
from compressor.errors import ConfigError
from compressor.frameworks.base import Job
from compressor.interfaces.evaluation import Accuracy
from compressor.interfaces.forward_pass import TorchForwardPass
from compressor.interfaces.loss import LossFunction, make_loss
from compressor.interfaces.task import Task
from compressor.techniques import TECHNIQUES, Stage, Technique


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


def make_techniques(config: Config) -> dict[str, Technique]:
    """One instance of each that is wanted; `quantization` wants those that change numbers alone.

    Raises:
        ConfigError: if there is no technique of a name, or none is left.
    """
    names = list(config.techniques or TECHNIQUES.names())
    classes = {name: TECHNIQUES.get(name) for name in names}
    if config.optimization == "quantization":
        classes = {name: cls for name, cls in classes.items() if cls.stage is Stage.NUMBERS}
    if not classes:
        raise ConfigError(
            f"techniques={names} has none that quantizes, and optimization='quantization'. Add "
            "'quantization', or choose another optimization."
        )
    return {name: cls() for name, cls in classes.items()}
