"""Copies and graphs, and errors that name the part which is in the way."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.interfaces.inputs import ModelInputs
from compressor.structure.surgery import Skip, replace, slice_parameter
from compressor.structure.trace import (
    copy_model,
    copy_skeleton,
    eval_mode,
    export_graph,
    input_shapes,
)
from compressor.testing.models import CifarResNet, DictModel, TinyMLP, TinyResNet


class Branching(nn.Module):
    """Asks a tensor for its value, as `if x.sum() > 0` does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x


def test_a_copy_shares_nothing() -> None:
    model = CifarResNet(8)
    copied = copy_model(model)
    shared = {id(p) for p in model.parameters()} & {id(p) for p in copied.parameters()}
    assert not shared


def test_a_skeleton_shares_tensors_and_not_modules() -> None:
    model = CifarResNet(8)
    skeleton = copy_skeleton(model)
    assert skeleton.conv1.weight is model.conv1.weight
    assert skeleton.bn1.running_mean is model.bn1.running_mean
    replace(skeleton, "layer1.0", Skip())
    slice_parameter(skeleton, "conv1.weight", 0, [0])
    assert not isinstance(model.layer1[0], Skip)
    assert len(model.conv1.weight) == 16


def test_an_attribute_that_cannot_be_copied_is_named() -> None:
    model = TinyResNet()
    model.layer1[0].conv1.guard = threading.Lock()
    with pytest.raises(ModelError, match=r"'layer1\.0\.conv1\.guard'.*lock"):
        copy_model(model)


def test_a_computed_tensor_that_cannot_be_copied_is_named() -> None:
    model = TinyMLP()
    model.fc2.cached = model.fc2.weight * 2
    with pytest.raises(ModelError, match=r"'fc2\.cached'"):
        copy_model(model)


def test_modes_come_back_module_by_module() -> None:
    model = TinyResNet().train()
    model.bn1.eval()
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert not model.bn1.training
    assert model.layer1[0].bn1.training


def test_input_shapes_are_those_of_the_first_call() -> None:
    inputs = ModelInputs((torch.randn(2, 1, 8, 8),))
    shapes = input_shapes(TinyResNet(), inputs)
    assert shapes[""] == (2, 1, 8, 8)
    assert shapes["layer2.0.conv2"] == (2, 32, 4, 4)
    assert shapes["linear"] == (2, 32)


def test_input_shapes_leave_no_hook_behind() -> None:
    model = TinyMLP()
    input_shapes(model, ModelInputs((torch.randn(2, 64),)))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_that_does_not_run_says_on_which_shapes() -> None:
    with pytest.raises(ModelError, match=r"shapes \(2, 3\): RuntimeError"):
        input_shapes(TinyMLP(), ModelInputs((torch.randn(2, 3),)))


@pytest.mark.slow
def test_the_graph_computes_what_the_model_does_in_eval_mode() -> None:
    model = DictModel().train()
    inputs = ModelInputs(({"image": torch.randn(2, 1, 8, 8), "scale": torch.rand(2)},))
    program = export_graph(model, inputs)
    assert model.training
    with eval_mode(model):
        expected = inputs.call(model)
    outputs = inputs.call(program.module())
    torch.testing.assert_close(outputs["logits"], expected["logits"])


@pytest.mark.slow
def test_the_module_that_cannot_be_traced_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Branching()), nn.Linear(4, 2))
    with pytest.raises(ModelError, match=r"because of its module '1\.1'.*torch\.where"):
        export_graph(model, ModelInputs((torch.randn(2, 4),)))


@pytest.mark.slow
def test_a_model_whose_own_forward_cannot_be_traced_says_so() -> None:
    with pytest.raises(ModelError, match="its own `forward`"):
        export_graph(Branching(), ModelInputs((torch.randn(2, 4),)))


def test_exporting_on_wrong_inputs_is_said_to_be_that() -> None:
    with pytest.raises(ModelError, match="does not run on inputs of shapes"):
        export_graph(TinyMLP(), ModelInputs((torch.randn(2, 3),)))
