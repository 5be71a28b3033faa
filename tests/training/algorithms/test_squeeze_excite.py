from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import SqueezeExcitation

from compressor.errors import ConfigError, ModelError
from compressor.structure.describe import diff, rebuild
from compressor.testing.models import TinyResNet
from compressor.training import Trainer
from compressor.training.algorithms.squeeze_excite import (
    ChannelGate,
    SqueezeExcite,
    SqueezeExciteConv2d,
    apply_squeeze_excite,
)


def images(channels: int = 1, size: int = 8) -> Tensor:
    return torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(0))


def make_net() -> TinyResNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyResNet().eval()


def gates_of(model: nn.Module) -> list[ChannelGate]:
    return [module for module in model.modules() if isinstance(module, ChannelGate)]


def shake(model: nn.Module) -> None:
    """Give the gates something to say."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for gate in gates_of(model):
            for values in gate.parameters():
                values.copy_(torch.randn(values.shape, generator=random))


def test_a_gate_is_twice_that_of_torchvision() -> None:
    theirs = SqueezeExcitation(6, 3)
    ours = ChannelGate(6, 3)
    ours.load_state_dict(theirs.state_dict())
    x = images(6)
    torch.testing.assert_close(ours(x), 2 * theirs(x))


def test_the_trained_function_stays_to_the_bit() -> None:
    model, x = make_net(), images()
    before = model(x)
    apply_squeeze_excite(model, latent_channels=4, min_channels=16)
    assert len(gates_of(model)) == 7
    assert torch.equal(model(x), before)


def test_a_gate_learns_from_the_first_step_on() -> None:
    model, random = make_net(), torch.Generator().manual_seed(0)
    apply_squeeze_excite(model, latent_channels=16, min_channels=16, generator=random)
    model(images()).square().mean().backward()
    for gate in gates_of(model):
        assert gate.fc2.weight.grad is not None
        assert gate.fc2.weight.grad.abs().max() > 0


def test_a_gated_convolution_is_the_convolution_times_its_gate() -> None:
    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1, padding_mode="reflect")
    gated = SqueezeExciteConv2d.around(conv, 2, generator=None)
    shake(gated)
    x = images(3)
    made = conv(x)
    squeezed = F.relu(made.mean((2, 3)) @ gated.gate.fc1.weight.flatten(1).T + gated.gate.fc1.bias)
    factor = 2 * torch.sigmoid(squeezed @ gated.gate.fc2.weight.flatten(1).T + gated.gate.fc2.bias)
    torch.testing.assert_close(gated(x), made * factor[:, :, None, None])


def test_old_parameters_keep_names_and_objects() -> None:
    model = make_net()
    before = dict(model.named_parameters())
    edit = apply_squeeze_excite(model, latent_channels=0.25, min_channels=16)
    after = dict(model.named_parameters())
    assert all(after[name] is value for name, value in before.items())
    assert edit.added == frozenset(after) - set(before)
    assert not edit.removed
    assert {gate.fc1.out_channels for gate in gates_of(model)} == {4, 8}


def test_narrow_convolutions_stay() -> None:
    model = make_net()
    apply_squeeze_excite(model, min_channels=32)
    gated = [n for n, m in model.named_modules() if isinstance(m, SqueezeExciteConv2d)]
    assert gated == ["layer2.0.conv2", "layer2.1.conv1", "layer2.1.conv2"]


def test_done_twice_is_done_once() -> None:
    model = make_net()
    apply_squeeze_excite(model, latent_channels=16, min_channels=16)
    modules = list(model.modules())
    apply_squeeze_excite(model, latent_channels=16, min_channels=16)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))


def test_a_generator_says_how_gates_begin() -> None:
    first, second = make_net(), make_net()
    for model in (first, second):
        apply_squeeze_excite(model, 4, 16, generator=torch.Generator().manual_seed(5))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ConfigError, match="latent_channels=0"):
        apply_squeeze_excite(make_net(), latent_channels=0)
    with pytest.raises(ModelError, match="128 channels or more"):
        apply_squeeze_excite(make_net())


def test_the_structure_is_rebuilt_from_a_file() -> None:
    model, x = make_net(), images()
    apply_squeeze_excite(model, 4, 16)
    shake(model)
    new = rebuild(make_net(), diff(make_net(), model))
    new.load_state_dict(model.state_dict())
    assert torch.equal(new.eval()(x), model(x))


def test_gates_are_trained_beside_the_rest() -> None:
    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    model = make_net()
    batch = images(), torch.tensor([0, 1, 2])
    Trainer(
        model,
        step,
        train_dataloader=[batch],
        max_duration="2ep",
        algorithms=[SqueezeExcite(4, min_channels=16)],
        optimizers={"name": "SGD", "lr": 0.1},
    ).fit()
    assert all(gate.fc2.weight.abs().max() > 0 for gate in gates_of(model))
