from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ConfigError, ModelError
from compressor.structure import cutting, surgery
from compressor.structure.describe import diff, rebuild
from compressor.structure.groups import ChannelGroup
from compressor.structure.layers import layer_members
from compressor.training.algorithms.batchnorm import reestimate_batchnorm
from compressor.training.algorithms.ghost_batchnorm import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    apply_ghost_batchnorm,
)

SHAPES = {nn.BatchNorm1d: (10, 3), nn.BatchNorm2d: (10, 3, 4, 4), nn.BatchNorm3d: (10, 3, 2, 2, 2)}


def inputs(shape: tuple[int, ...] = (10, 3, 4, 4), seed: int = 0) -> Tensor:
    return 2 + 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_norm(cls: type[nn.Module] = nn.BatchNorm2d, **options: object) -> nn.Sequential:
    model = nn.Sequential(cls(3, **options))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.tensor([1.0, -2.0, 0.5]) + number)
    return model


def ghostly(model: nn.Module, size: int = 4) -> nn.Module:
    new = copy.deepcopy(model)
    apply_ghost_batchnorm(new, size)
    return new


@pytest.mark.parametrize("cls", SHAPES)
def test_each_part_is_normalised_by_itself(cls: type[nn.Module]) -> None:
    plain = make_norm(cls)
    x = inputs(SHAPES[cls])
    expected = torch.cat([copy.deepcopy(plain)(part) for part in (x[:4], x[4:7], x[7:])])
    torch.testing.assert_close(ghostly(plain)(x), expected)


def test_statistics_move_towards_the_mean_of_the_parts() -> None:
    plain, x = make_norm(momentum=0.25), inputs()
    ghost = ghostly(plain)
    ghost(x)
    parts = (x[:4], x[4:7], x[7:])
    means = torch.stack([part.mean((0, 2, 3)) for part in parts]).mean(0)
    variances = torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in parts]).mean(0)
    torch.testing.assert_close(ghost[0].running_mean, 0.25 * means)
    torch.testing.assert_close(ghost[0].running_var, 0.75 + 0.25 * variances)
    assert ghost[0].num_batches_tracked == 1


def test_a_batch_that_is_one_part_is_normalised_as_ever() -> None:
    plain = make_norm()
    ghost = ghostly(plain, 10)
    assert torch.equal(ghost(inputs()), plain(inputs()))
    assert torch.equal(ghost[0].running_var, plain[0].running_var)


def test_the_evaluated_function_stays() -> None:
    plain = make_norm()
    plain(inputs(seed=1))
    ghost = ghostly(plain)
    assert torch.equal(ghost.eval()(inputs()), plain.eval()(inputs()))


def test_gradients_are_those_of_the_parts() -> None:
    plain = make_norm()
    ghost = ghostly(plain, 5)
    x = inputs()
    ghost(x).pow(3).sum().backward()
    for part in (x[:5], x[5:]):
        plain(part).pow(3).sum().backward()
    for a, b in zip(ghost.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_without_running_statistics_or_weights_parts_are_normalised_too() -> None:
    plain = make_norm(track_running_stats=False, affine=False)
    expected = torch.cat([plain(inputs()[:5]), plain(inputs()[5:])])
    torch.testing.assert_close(ghostly(plain, 5)(inputs()), expected)


def test_statistics_are_reestimated_as_the_mean_over_batches() -> None:
    ghost = ghostly(make_norm(), 5)
    batches = [inputs(seed=seed) for seed in range(3)]
    reestimate_batchnorm(ghost, batches, lambda model, batch: model(batch))
    expected = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(ghost[0].running_mean, expected)
    assert ghost[0].momentum == 0.1


def test_parameters_and_buffers_keep_names_and_objects() -> None:
    model = make_norm()
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert apply_ghost_batchnorm(model, 4) == surgery.Edit()
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert before.keys() == after.keys()
    assert all(after[name] is value for name, value in before.items())


def test_its_channels_can_be_cut() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    apply_ghost_batchnorm(model, 5)
    index = [(channel,) for channel in range(4)]
    members = [m for n in "01" for m in layer_members(n, model[int(n)], "out", index)]
    cutting.keep_channels(model, ChannelGroup("0", 4, tuple(members)), (0, 2))
    assert model(inputs()).shape == (10, 2, 4, 4)
    assert model[1].num_features == 2


def test_done_twice_is_done_once_and_others_stay() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.SyncBatchNorm(3), nn.InstanceNorm1d(3))
    apply_ghost_batchnorm(model)
    modules = list(model)
    apply_ghost_batchnorm(model, 2)
    assert all(a is b for a, b in zip(modules, model, strict=True))
    assert [type(module) for module in model] == [
        GhostBatchNorm1d,
        nn.SyncBatchNorm,
        nn.InstanceNorm1d,
    ]


def test_the_structure_is_rebuilt_from_a_file() -> None:
    model = ghostly(make_norm())
    new = rebuild(make_norm(), diff(make_norm(), model))
    new.load_state_dict(model.state_dict())
    assert isinstance(new[0], GhostBatchNorm2d)
    assert torch.equal(new(inputs()), model(inputs()))


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ConfigError, match="ghost_batch_size=0"):
        apply_ghost_batchnorm(make_norm(), 0)
    with pytest.raises(ModelError, match=r"no nn\.BatchNorm1d"):
        apply_ghost_batchnorm(nn.Sequential(nn.GroupNorm(1, 3)))
