from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.errors import CheckpointError, ConfigError
from compressor.training import Trainer
from tests.training.helpers import are_equal, make_model, make_trainer, weights_of


def make_registered(folder: Path, teacher: Any, values: Any, note: Any) -> Trainer:
    trainer = make_trainer(save_dir=folder)
    trainer.register("teacher", teacher)
    trainer.register("moments", values)
    trainer.register("note", note)
    return trainer


def test_models_tensors_and_plain_values_are_saved_and_restored(tmp_path: Path) -> None:
    make_registered(tmp_path, make_model(3), torch.arange(3.0), {"run": [1, "a"]}).fit()
    teacher, values = make_model(4), torch.zeros(3)
    trainer = make_registered(tmp_path, teacher, values, None)
    assert trainer.resume()
    assert are_equal(weights_of(teacher), weights_of(make_model(3)))
    assert trainer.registered["teacher"] is teacher
    assert torch.equal(values, torch.arange(3.0))
    assert trainer.registered["note"] == {"run": [1, "a"]}


def test_other_names_than_then_are_refused(tmp_path: Path) -> None:
    make_registered(tmp_path, make_model(3), torch.zeros(1), 1).fit()
    with pytest.raises(CheckpointError, match="'moments' is registered only in the checkpoint"):
        make_trainer(save_dir=tmp_path).resume()


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    make_registered(tmp_path, make_model(3), torch.zeros(1), 1).fit()
    with pytest.raises(CheckpointError, match=r"'moments' has shape \(1,\)"):
        make_registered(tmp_path, make_model(3), torch.zeros(2), 1).resume()


@pytest.mark.parametrize("name", ["a b", "_hidden", ""])
def test_a_name_that_could_be_no_attribute_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no name to register"):
        make_trainer().register(name, 1)
