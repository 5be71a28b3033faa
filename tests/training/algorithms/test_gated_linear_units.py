from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ModelError
from compressor.structure.describe import diff, rebuild
from compressor.training.algorithms.gated_linear_units import (
    GatedActivation,
    apply_gated_linear_units,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_bert(hidden_act: str = "gelu") -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
        hidden_act=hidden_act,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertModel(config, add_pooling_layer=False).eval()


TOKENS = torch.randint(0, 16, (2, 6), generator=torch.Generator().manual_seed(0))


def make_layer(**options: Any) -> nn.TransformerEncoderLayer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"activation": nn.GELU(), "batch_first": True, "dropout": 0.0, **options}
        return nn.TransformerEncoderLayer(8, 2, 12, **options)


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"])
def test_what_a_bert_computes_stays(hidden_act: str) -> None:
    model = make_bert(hidden_act)
    with torch.no_grad():
        before = model(TOKENS).last_hidden_state
        apply_gated_linear_units(model)
        after = model(TOKENS).last_hidden_state
    gates = [module for module in model.modules() if isinstance(module, GatedActivation)]
    assert len(gates) == 2
    torch.testing.assert_close(after, before, rtol=0, atol=2e-6)  # another blocking of the sums


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"bias": False}])
def test_what_torchs_layer_computes_stays(options: dict[str, Any], is_training: bool) -> None:
    """In evaluation the plain layer runs a fused kernel, which knows of no gate."""
    layer = make_layer(**options).train(is_training)
    x = draw(2, 5, 8)
    with torch.no_grad():
        before = layer(x)
        apply_gated_linear_units(layer)
        torch.testing.assert_close(layer(x), before, rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_torchs_encoder_takes_padding_as_before() -> None:
    encoder = nn.TransformerEncoder(make_layer(), 2).eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    x = draw(2, 5, 8)
    with torch.no_grad():
        before = encoder(x, src_key_padding_mask=padding)
        apply_gated_linear_units(encoder)
        after = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(after[~padding], before[~padding], rtol=0, atol=2e-6)


def test_a_gated_layer_is_the_formula_of_the_paper() -> None:
    layer = make_layer()
    apply_gated_linear_units(layer, act_fn=nn.SiLU())
    with torch.no_grad():
        for parameter in layer.linear1.parameters():
            parameter.copy_(draw(*parameter.shape, seed=1))
    x = draw(3, 8)
    (w, v), (b, c) = layer.linear1.weight.chunk(2), layer.linear1.bias.chunk(2)
    expected = (F.silu(x @ w.T + b) * (x @ v.T + c)) @ layer.linear2.weight.T + layer.linear2.bias
    torch.testing.assert_close(layer._ff_block(x), expected)


def test_gates_learn_from_the_first_step_on() -> None:
    layer = make_layer()
    apply_gated_linear_units(layer)
    layer(draw(2, 5, 8)).pow(3).sum().backward()
    assert layer.linear1.weight.grad is not None
    assert (layer.linear1.weight.grad[12:].abs() > 0).any(1).all()


def test_done_twice_is_done_once() -> None:
    model = make_bert()
    apply_gated_linear_units(model)
    modules = list(model.modules())
    apply_gated_linear_units(model)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))


def test_frozen_layers_stay_frozen() -> None:
    layer = make_layer().requires_grad_(False)
    apply_gated_linear_units(layer)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("make", [make_bert, make_layer])
def test_the_structure_is_rebuilt_from_a_file(make: Any) -> None:
    model = nn.Sequential(make())
    apply_gated_linear_units(model)
    new = rebuild(nn.Sequential(make()), diff(nn.Sequential(make()), model))
    new.load_state_dict(model.state_dict())
    x = TOKENS if make is make_bert else draw(2, 5, 8)
    outputs = [each.eval()(x) for each in (model, new)]
    first, second = (getattr(each, "last_hidden_state", each) for each in outputs)
    assert torch.equal(first, second)


def test_an_activation_of_ones_own_needs_one_of_torch() -> None:
    class Mine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs()

    layer = make_layer(activation=Mine())
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ModelError, match="'activation' is a Mine, which has no equal in torch"):
        apply_gated_linear_units(layer)
    assert before.keys() == layer.state_dict().keys()
    apply_gated_linear_units(layer, act_fn=nn.ReLU())
    assert layer.linear1.out_features == 24


def test_what_cannot_be_gated_says_why() -> None:
    with pytest.raises(ModelError, match=r"is a function.*activation=nn\.ReLU"):
        apply_gated_linear_units(make_layer(activation="relu"))
    with pytest.raises(ModelError, match="no feed-forward"):
        apply_gated_linear_units(nn.Sequential(nn.Linear(2, 2)))
    shared = nn.GELU()
    layers = nn.ModuleList([make_layer(activation=shared), make_layer(activation=shared)])
    with pytest.raises(ModelError, match=r"'0\.activation' is part of another layer"):
        apply_gated_linear_units(layers)
