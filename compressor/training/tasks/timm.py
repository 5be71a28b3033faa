"""Classifiers of the timm library (Wightman, 2019) as tasks."""

from __future__ import annotations

import difflib
from typing import Any

from compressor.errors import ConfigError
from compressor.optional import require
from compressor.training.tasks.classifier import ClassifierTask


def timm_task(
    model_name: str, pretrained: bool = False, num_classes: int = 1000, **kwargs: Any
) -> ClassifierTask:
    """A classifier of timm by its name there, with cross entropy and accuracy.

    Args:
        model_name: 'resnet50', also with the tag of its weights: 'resnet50.a1_in1k'.
        pretrained: whether to fetch its trained weights.
        num_classes: of the head, which is a new one if the weights are for another number.
        kwargs: for `timm.create_model`, such as `drop_path_rate=0.1` or `in_chans=1`.

    Raises:
        MissingDependencyError: without timm.
        ConfigError: if timm has no such model.
    """
    timm = require("timm", extra="timm")
    is_elsewhere = ":" in model_name  # 'hf-hub:...', 'local-dir:...'
    if not is_elsewhere and not timm.is_model(model_name):
        near = difflib.get_close_matches(model_name.partition(".")[0], timm.list_models(), n=3)
        question = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ConfigError(
            f"timm {timm.__version__} has no model {model_name!r}. "
            f"{question}`timm.list_models('*resnet*')` lists them."
        )
    net = timm.create_model(model_name, pretrained=pretrained, num_classes=num_classes, **kwargs)
    return ClassifierTask(net, num_classes=num_classes)
