from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ConfigError, ModelError
from compressor.structure import surgery
from compressor.structure.describe import diff, rebuild
from compressor.structure.factored import Factored
from compressor.testing.models import TinyResNet
from compressor.training.algorithms.factorize import Factorize, apply_factorization, factorized


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank_linear(rank: int = 4) -> nn.Linear:
    layer = nn.Linear(32, 24)
    with torch.no_grad():
        layer.weight.copy_(draw(24, rank) @ draw(rank, 32, seed=1))
    return layer


def low_rank_conv(outer: int = 4, inner: int = 3) -> nn.Conv2d:
    """Of 4 and 3 channels in truth, within 16 and 12."""
    layer = nn.Conv2d(12, 16, 3, stride=2, padding=1)
    with torch.no_grad():
        core = draw(outer, inner, 3, 3)
        mix = "oihw,po,qi->pqhw"
        layer.weight.copy_(
            torch.einsum(mix, core, draw(16, outer, seed=1), draw(12, inner, seed=2))
        )
    return layer


def relative_error(model: nn.Module, reference: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        expected = reference(x)
        return float((model(x) - expected).norm() / expected.norm())


def test_a_linear_layer_of_low_rank_is_kept() -> None:
    """Composer's Factorize throws such a weight away: relative error 1.007."""
    layer = low_rank_linear()
    chain = factorized(layer, latent=4)
    assert chain is not None
    assert chain.ranks == (4,)
    assert relative_error(chain, layer, draw(8, 32, seed=3)) < 1e-5


def test_a_convolution_of_low_rank_is_kept() -> None:
    layer = low_rank_conv()
    chain = factorized(layer, latent=0.25)
    assert chain is not None
    assert chain.ranks == (4, 3)
    assert relative_error(chain, layer, draw(2, 12, 7, 7, seed=3)) < 1e-5


def test_the_error_is_that_of_the_nearest_matrix_of_the_rank() -> None:
    layer = nn.Linear(32, 24, bias=False)
    chain = factorized(layer, latent=0.25)
    assert chain is not None
    made = chain.layers[1].weight @ chain.layers[0].weight
    lost = torch.linalg.svdvals(layer.weight)[6:].norm()  # Eckart and Young
    torch.testing.assert_close((made - layer.weight).norm(), lost, rtol=1e-4, atol=0)


def test_factors_that_would_not_be_smaller_are_not_made() -> None:
    assert factorized(nn.Linear(16, 16), latent=8) is None
    assert factorized(nn.Linear(16, 16), latent=7) is not None
    assert factorized(nn.Conv2d(8, 8, 3, groups=2), latent=0.5) is None


def make_net() -> TinyResNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyResNet(width=32).eval()


def chains_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Factored)]


def test_wide_layers_of_a_model_are_replaced() -> None:
    model = make_net()
    before = set(dict(model.named_parameters()))
    edit = apply_factorization(model, min_channels=64, min_features=10)
    names = ["layer2.0.conv2", "layer2.1.conv1", "layer2.1.conv2", "linear"]
    assert chains_of(model) == names
    after = set(dict(model.named_parameters()))
    assert edit.added >= after - before
    assert edit.removed >= before - after
    assert model(draw(2, 1, 8, 8)).shape == (2, 10)


def test_each_kind_can_be_left_out() -> None:
    model = make_net()
    apply_factorization(model, factorize_convs=False, min_features=10)
    assert chains_of(model) == ["linear"]
    model = make_net()
    apply_factorization(model, factorize_linears=False, min_channels=64)
    assert "linear" not in chains_of(model)


def test_done_twice_is_done_once() -> None:
    model = make_net()
    apply_factorization(model, min_channels=8, min_features=8)
    modules = list(model.modules())
    assert apply_factorization(model, min_channels=8, min_features=8) == surgery.Edit()
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))


def test_weights_that_others_read_stay() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(32, 32)
            self.head = nn.Linear(32, 32, bias=False)
            self.head.weight = self.embedding.weight
            self.free = nn.Linear(32, 32)

    model = Tied()
    apply_factorization(model, min_features=32)
    assert chains_of(model) == ["free"]


@pytest.mark.parametrize("is_training", [False, True])
def test_layers_of_torchs_transformer_go_on_running(is_training: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(16, 16)).train(is_training)
    apply_factorization(model, min_features=16)
    assert chains_of(model) == ["1"]
    with torch.no_grad():
        assert model(draw(2, 5, 16)).shape == (2, 5, 16)


def test_a_shared_layer_is_replaced_everywhere() -> None:
    layer = nn.Linear(16, 16)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    apply_factorization(model, min_features=16)
    assert isinstance(model[0], Factored)
    assert model[0] is model[2]


def test_the_structure_is_rebuilt_from_a_file() -> None:
    model, x = make_net(), draw(2, 1, 8, 8)
    apply_factorization(model, min_channels=32, min_features=10)
    new = rebuild(make_net(), diff(make_net(), model))
    new.load_state_dict(model.state_dict())
    assert torch.equal(new.eval()(x), model(x))


def test_function_and_algorithm_have_the_same_defaults() -> None:
    own = vars(Factorize())
    defaults = apply_factorization.__defaults__
    assert defaults is not None
    assert list(own.values()) == list(defaults)


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ConfigError, match="Nothing is to be factorized"):
        apply_factorization(make_net(), factorize_convs=False, factorize_linears=False)
    with pytest.raises(ConfigError, match="latent_features=0"):
        apply_factorization(make_net(), latent_features=0)
    with pytest.raises(ModelError, match="256 channels or linear layer of 256 features"):
        apply_factorization(make_net())
