"""What is deployed of an edited model: norms folded, a chain in int8 like the layer it was."""

from __future__ import annotations

import copy
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from compressor.config import TargetConfig
from compressor.export.qdq import integer_kernels
from compressor.frameworks.deployment import Deployment
from compressor.interfaces.inputs import ModelInputs
from compressor.result import Choice, Plan
from compressor.structure.factored import factorize
from compressor.structure.surgery import replace
from compressor.testing.models import TinyResNet


def images(batch: int, channels: int = 1, size: int = 8) -> ModelInputs:
    generator = torch.Generator().manual_seed(0)
    return ModelInputs((torch.randn(batch, channels, size, size, generator=generator),))


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = TinyResNet()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net.eval()


def count_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.slow
def test_the_file_has_no_batch_norms_and_the_model_keeps_them(
    model: nn.Module, tmp_path: Path
) -> None:
    deployment = Deployment(TargetConfig(), tmp_path)
    norms = count_norms(model)
    inputs = images(4)
    deployed = deployment.deploy(model, inputs, tmp_path, Plan(), [])
    nodes = {node.op_type for node in onnx.load(deployed.files["onnx"]).graph.node}
    assert "BatchNormalization" not in nodes
    with torch.no_grad():
        result, expected = inputs.call(deployed.module), inputs.call(model)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert count_norms(model) == norms > 0


@pytest.mark.parametrize("of_export", [True, False])
def test_a_model_that_is_deployed_as_itself_keeps_its_norms(
    of_export: bool, model: nn.Module, tmp_path: Path
) -> None:
    """Folded, the few values of a clustered weight were as many as it has channels times more."""
    deployment = (
        Deployment(TargetConfig(), tmp_path).without_export()
        if of_export
        else Deployment(TargetConfig(runtime="eager"), tmp_path)
    )
    deployed = deployment.deploy(model, images(2), tmp_path, Plan(), [])
    assert count_norms(deployed.module) == count_norms(model)
    for name, tensor in deployed.module.state_dict().items():
        assert tensor.equal(model.state_dict()[name])


@pytest.mark.slow
def test_int8_of_a_layer_that_became_a_chain_is_int8_of_the_chain(
    model: nn.Module, tmp_path: Path
) -> None:
    edited = copy.deepcopy(model)
    replace(edited, "layer2.1.conv1", factorize(model.layer2[1].conv1, "tucker2", (24, 24)))
    sites = ("layer2.1.conv1", "layer2.1.conv2", "linear")
    plan = Plan(tuple(Choice("quantization", site, {"format": "static_int8"}) for site in sites))
    deployment = Deployment(TargetConfig(), tmp_path)
    inputs = images(16)
    deployed = deployment.deploy(edited, inputs, tmp_path, plan, [inputs])
    kernels = integer_kernels(deployed.files["onnx"])
    assert kernels["QLinearConv"] == 3 + 1
    assert kernels["QGemm"] == 1
    with torch.no_grad():
        expected = inputs.call(edited)
        error = (inputs.call(deployed.module) - expected).norm() / expected.norm()
    assert error < 0.05


class Frozen(nn.Module):
    """A convolution with the norm that detection models have."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision import ops

        self.conv, self.bn = nn.Conv2d(1, 16, 3, padding=1), ops.FrozenBatchNorm2d(16)
        self.last = nn.Conv2d(16, 8, 3)
        self.bn.running_var.fill_(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.bn(self.conv(x)).relu())


@pytest.mark.slow
def test_a_frozen_norm_leaves_no_arithmetic_of_its_own_in_the_file(tmp_path: Path) -> None:
    """The exporter writes it as a product and a sum, which no runtime fuses in int8."""
    model, inputs = Frozen().eval(), images(2)
    plan = Plan(
        tuple(Choice("quantization", site, {"format": "static_int8"}) for site in ("conv", "last"))
    )
    deployed = Deployment(TargetConfig(), tmp_path).deploy(model, inputs, tmp_path, plan, [inputs])
    nodes = onnx.load(deployed.files["onnx_float"]).graph.node
    assert [node.op_type for node in nodes] == ["Conv", "Relu", "Conv"]
    assert integer_kernels(deployed.files["onnx"])["QLinearConv"] == 2
