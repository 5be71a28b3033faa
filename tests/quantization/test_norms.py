"""Batch norms that `structure.fusion` leaves, folded in the graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.export.exported_program import export_program
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.graph import QuantizationGraph


class NormAct(nn.BatchNorm2d):
    """A norm and its activation function in one class, as many packages have it."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-3)
        return x.relu()


class Net(nn.Module):
    """conv without bias, norm and ReLU; grouped conv with bias and norm; a norm that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, bias=False), NormAct(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3, groups=8), NormAct(8)
        self.alone = NormAct(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.alone(self.norm2(self.second(self.norm1(self.first(x)))))


def test_norms_behind_products_are_folded_and_the_function_is_kept() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    for norm in (model.norm1, model.norm2, model.alone):
        for tensor in (norm.running_mean, norm.weight, norm.bias):
            nn.init.normal_(tensor)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(4, 3, 9, 9)
    graph = QuantizationGraph(export_program(model, ModelInputs((x,))))
    torch.testing.assert_close(graph.module(x), model(x))
    norms = [node for node in graph.nodes if "batch_norm_legit" in str(node.target)]
    assert len(norms) == 1, "the one that follows no product"
    assert [product.bias for product in graph.products] == ["first.bias", "second.bias"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), "the model itself is as it was"
