from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch.nn import functional as F

from compressor.errors import ConfigError, MissingDependencyError
from compressor.training.tasks import timm_task

NAME = "test_resnet"  # of timm's own tests: 0.5 M parameters


@pytest.mark.slow
def test_a_timm_task_is_timms_model_with_cross_entropy() -> None:
    timm = importlib.import_module("timm")
    torch.manual_seed(0)
    task = timm_task(NAME, num_classes=7, in_chans=1)
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=7, in_chans=1)
    images, labels = torch.randn(2, 1, 32, 32), torch.tensor([3, 6])
    task.eval(), model.eval()
    assert torch.equal(task((images, labels)), model(images))
    loss = task.loss(task((images, labels)), (images, labels))
    torch.testing.assert_close(loss, F.cross_entropy(model(images), labels))


@pytest.mark.slow
def test_an_unknown_name_is_an_error_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"no model 'resnet5O'. Did you mean .*'resnet50'"):
        timm_task("resnet5O")


def test_without_timm_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "compressor\[timm\]"'):
        timm_task(NAME)
