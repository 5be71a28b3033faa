from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.interfaces.inputs import ModelInputs
from compressor.techniques import TechniqueContext
from compressor.techniques.weight_scores import (
    global_masks,
    input_norms,
    score_weights,
    snip_scores,
)
from compressor.testing.models import TinyMLP
from compressor.training.algorithms import magnitude_mask


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norms_of(layer: nn.Module, x: Tensor) -> Tensor:
    return input_norms(layer, ModelInputs((x,)), {"": layer})[""]  # type: ignore[dict-item]


def test_input_norms_of_a_linear_layer_are_those_of_its_features() -> None:
    x = random(5, 7, 6)
    norms = norms_of(nn.Linear(6, 3), x)
    expected = x.reshape(-1, 6).norm(dim=0)
    torch.testing.assert_close(norms, expected.expand(3, 6))


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 3}, {"padding": "same"}],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_input_norms_of_a_convolution_are_those_of_its_unfolded_columns(
    options: dict[str, int], groups: int
) -> None:
    layer = nn.Conv2d(4, 6, 3, groups=groups, **options)  # type: ignore[arg-type]
    x = random(2, 4, 9, 8)
    padding = options.get("padding", 0)
    columns = F.unfold(
        x,
        3,
        dilation=options.get("dilation", 1),
        padding=1 if padding == "same" else padding,
        stride=options.get("stride", 1),
    )  # (N, 4 * 9, positions)
    expected = columns.norm(dim=(0, 2)).view(groups, 4 // groups, 3, 3)
    norms = norms_of(layer, x)
    for out in range(6):
        torch.testing.assert_close(norms[out], expected[out // (6 // groups)])


def test_a_layer_that_is_called_twice_is_moved_by_both_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4, bias=False)
            self.unused = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x))  # type: ignore[no-any-return]

    model, x = Twice(), random(3, 4)
    norms = input_norms(model, ModelInputs((x,)), {"fc": model.fc, "unused": model.unused})
    both = torch.cat([x, model.fc(x)]).detach()
    assert list(norms) == ["fc"]
    torch.testing.assert_close(norms["fc"], both.norm(dim=0).expand(4, 4))
    assert model.fc.weight.grad is None


def test_wanda_keeps_what_moves_the_output_most() -> None:
    """With features of different scale, a mask by magnitude does worse, as in the paper."""
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32, bias=False), random(200, 64) * torch.logspace(-2, 2, 64)
    context = TechniqueContext(ModelInputs((x,)))
    errors = {}
    for criterion in ("magnitude", "wanda"):
        scores = score_weights(layer, {"": layer}, criterion, context)[""]  # type: ignore[arg-type]
        kept = layer.weight.detach() * magnitude_mask(scores, 0.5)
        with torch.no_grad():
            errors[criterion] = float((F.linear(x, kept) - layer(x)).norm() / layer(x).norm())
    assert errors["wanda"] < 0.2 * errors["magnitude"]


def test_snip_is_the_change_of_the_loss_to_first_order() -> None:
    torch.manual_seed(0)
    model, x = TinyMLP().double(), random(8, 64).double()

    def loss(net: nn.Module) -> Tensor:
        return F.cross_entropy(net(x), torch.arange(8) % 4)

    loss(model).backward()  # type: ignore[no-untyped-call]
    weight = model.fc2.weight
    assert weight.grad is not None
    scores = snip_scores(weight, weight.grad)
    before = loss(model).item()
    for entry in ((0, 0), (1, 5), (3, 7)):
        with torch.no_grad():
            old, step = weight[entry].item(), 1e-6
            weight[entry] = old * (1 - step)
            change = (loss(model).item() - before) / step
            weight[entry] = old
        assert abs(change) == pytest.approx(scores[entry].item(), rel=1e-3, abs=1e-8)


def test_scoring_leaves_the_model_alone_and_needs_what_it_needs() -> None:
    model = TinyMLP().train()

    def accumulate(net: nn.Module) -> None:
        net(random(4, 64)).sum().backward()

    context = TechniqueContext(ModelInputs((random(4, 64),)), accumulate_gradients=accumulate)
    layers = {"fc1": model.fc1, "fc2": model.fc2}
    for criterion in ("magnitude", "snip", "wanda"):
        scores = score_weights(model, layers, criterion, context)  # type: ignore[arg-type]
        assert all(scores[name].shape == layer.weight.shape for name, layer in layers.items())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ConfigError, match="'snip' needs gradients"):
        score_weights(model, layers, "snip", TechniqueContext(context.inputs))
    with pytest.raises(ConfigError, match="no criterion 'l2'"):
        score_weights(model, layers, "l2", context)  # type: ignore[arg-type]


def test_one_threshold_for_all_is_a_sort_of_all() -> None:
    scores = {"a": random(3, 4).abs(), "b": 10 * random(5, seed=1).abs(), "c": random(2, 2).abs()}
    masks = global_masks(scores, 0.4)
    kept = torch.cat([scores[n][mask] for n, mask in masks.items()])
    gone = torch.cat([scores[n][~mask] for n, mask in masks.items()])
    assert len(gone) == round(0.4 * 21)
    assert gone.max() <= kept.min()
    assert masks["b"].float().mean() > masks["a"].float().mean()
