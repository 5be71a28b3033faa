"""Layers behind an edit make up for it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.interfaces.inputs import ModelInputs
from compressor.structure.blocks import StandIn
from compressor.structure.factored import Factored
from compressor.structure.repair.changes import changed_modules, kept_outputs
from compressor.structure.repair.linear_maps import (
    draw_positions,
    fit_linear_map,
    inputs_at,
    outputs_at,
)
from compressor.structure.repair.moments import record_moments
from compressor.structure.repair.repair import repair
from compressor.structure.repair.targets import record_targets
from compressor.structure.run_record import record_run
from compressor.testing.models import CifarResNet, TinyMLP, TinyResNet, TinyTransformer


def repaired(reference: nn.Module, edited: nn.Module, x: Tensor, **kept: list[int]) -> Tensor:
    """Outputs of `edited` after it was repaired towards `reference` on `x`."""
    record = record_run(reference, ModelInputs((x[:2],)))
    targets = record_targets(reference, record, ModelInputs((x,)))
    rows = kept_outputs(reference, lambda _: None)
    rows |= {name.replace("__", "."): torch.tensor(kept[name]) for name in kept}
    outputs: Tensor = repair(edited, targets, record, lambda model: model(x), kept=rows)
    return outputs


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean() / b.square().mean())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (1, 3), stride=2, dilation=(1, 2), groups=2),
        nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular", groups=4),
        nn.Conv1d(4, 6, 5, padding=2, stride=3),
        nn.Linear(4, 6),
    ],
    ids=str,
)
def test_a_layer_is_a_linear_map_of_its_inputs_at_a_position(layer: nn.Module) -> None:
    x = torch.randn(3, 7, 4) if isinstance(layer, nn.Linear) else torch.randn(3, 4, 8, 9)
    x = x[..., 0] if isinstance(layer, nn.Conv1d) else x
    output = layer(x)
    shape = output.shape[:-1] if isinstance(layer, nn.Linear) else output.movedim(1, -1).shape[:-1]
    positions = draw_positions(tuple(shape), 20, torch.Generator().manual_seed(0))
    inputs = inputs_at(layer, x, positions)  # type: ignore[arg-type]
    weight = layer.weight.flatten(1).view(len(inputs), -1, inputs.shape[2])  # type: ignore[union-attr, operator]
    found = (inputs @ weight.mT).movedim(0, 1).flatten(1) + layer.bias
    torch.testing.assert_close(found, outputs_at(layer, output, positions))  # type: ignore[arg-type]


def test_the_fit_is_that_of_numpy() -> None:
    """Where a map gives the targets exactly, pulling to the old weights does not matter."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)
    true = torch.randn(4, 3, 3, 3, generator=generator, dtype=torch.float64)
    targets = F.conv2d(image, true, torch.arange(4.0, dtype=torch.float64))
    columns = F.unfold(image, 3).movedim(1, 2).flatten(0, 1)
    wanted = targets.flatten(2).movedim(1, 2).flatten(0, 1)
    is_held = torch.arange(len(columns)) % 8 == 0
    fit = fit_linear_map(
        columns[None], wanted, torch.zeros(1, 4, 27).double(), is_held, has_bias=True, ridge=1e-12
    )
    assert fit is not None
    design = np.hstack([columns.numpy(), np.ones((len(columns), 1))])
    expected = np.linalg.lstsq(design, wanted.numpy(), rcond=None)[0]
    np.testing.assert_allclose(fit.weight[0].T.numpy(), expected[:-1], atol=1e-6)
    np.testing.assert_allclose(fit.bias.numpy(), expected[-1], atol=1e-6)
    assert fit.gain == pytest.approx(1.0)


def test_the_ridge_is_that_of_the_normal_equations() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    old = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(5, 2, generator=generator, dtype=torch.float64)
    is_held = torch.arange(200) >= 160
    fit = fit_linear_map(x[None], y, old[None], is_held, has_bias=False, ridge=0.1)
    assert fit is not None
    made = x[:160].numpy()
    gram = made.T @ made
    pull = 0.1 * np.trace(gram) / 5 * np.eye(5)
    solved = np.linalg.solve(gram + pull, made.T @ y[:160].numpy() + pull @ old.T.numpy())
    np.testing.assert_allclose(fit.weight[0].T.numpy(), solved, atol=1e-9)


def test_weights_that_are_worse_on_held_out_samples_are_not_taken() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 8, generator=generator)
    weight = torch.randn(1, 2, 8, generator=generator)
    is_held = torch.arange(80) < 40
    y = x @ weight[0].T
    y[~is_held] += torch.randn(40, 2, generator=generator)  # noise, which there is nothing to learn
    assert fit_linear_map(x[None], y, weight, is_held, has_bias=False) is None


def test_removed_channels_that_the_kept_ones_can_make_are_made_up_for() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 5, 3)
    with torch.no_grad():
        first.weight[2:] = torch.einsum("ij,jklm->iklm", torch.randn(2, 2), first.weight[:2])
    reference = nn.Sequential(first, second).eval()
    edited = nn.Sequential(nn.Conv2d(3, 2, 3, bias=False), nn.Conv2d(2, 5, 3)).eval()
    edited[0].weight = nn.Parameter(first.weight[:2].detach().clone())
    edited[1].weight = nn.Parameter(second.weight[:, :2].detach().clone())
    edited[1].bias = nn.Parameter(second.bias.detach().clone())
    x = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        expected, before = reference(x), edited(x)
    after = repaired(reference, edited, x, **{"0": [0, 1]})
    assert relative_error(before, expected) > 0.1
    assert relative_error(after, expected) < 1e-5  # what the ridge leaves


class Added(nn.Module):
    """Its input plus a linear layer of it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.fc(x)
        return added


def test_a_block_makes_up_for_the_one_before_it_through_the_sum() -> None:
    """What it gives in the reference would be wrong: the sum has to be right."""
    torch.manual_seed(0)
    reference = nn.Sequential(Added(), Added(), nn.LayerNorm(4)).eval()
    x = torch.randn(128, 6, 4)
    edited = copy.deepcopy(reference)
    edited[0] = StandIn()
    with torch.no_grad():
        expected, before = reference(x), edited(x)
    after = repaired(reference, edited, x)
    assert relative_error(before, expected) > 0.05
    assert relative_error(after, expected) < 1e-5


def test_sums_are_found_in_the_usual_residual_blocks() -> None:
    image = ModelInputs((torch.randn(2, 1, 8, 8),))
    tiny = record_run(TinyResNet(), image)
    assert ("layer1.0", "input") in tiny.sums["layer1.0.conv2"].others
    assert tiny.sums["layer2.0.shortcut.0"].others == (("layer2.0.bn2", "output"),)
    cifar = record_run(CifarResNet(8), ModelInputs((torch.randn(2, 3, 32, 32),)))
    assert cifar.sums["layer2.0.conv2"].through == "layer2.0.shortcut"
    text = record_run(TinyTransformer(), ModelInputs((torch.randint(0, 32, (2, 16)),)))
    assert {f"blocks.{i}.{name}" for i in (0, 1) for name in ("proj", "fc2")} <= set(text.sums)
    assert text.norms == {}
    assert tiny.norms["conv1"] == "bn1"


def test_batch_norms_behind_layers_that_stay_get_the_statistics_of_a_training_pass() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(16, 1, 8, 8) * 3
    expected = copy.deepcopy(model).train()
    expected[1].momentum = 1.0
    expected(x)
    record = record_run(model, ModelInputs((x[:2],)))
    repair(model, {}, record, lambda each: each(x), kept={})
    torch.testing.assert_close(model[1].running_mean, expected[1].running_mean)
    torch.testing.assert_close(model[1].running_var, expected[1].running_var)


def test_nothing_before_the_first_change_is_touched() -> None:
    torch.manual_seed(0)
    reference = TinyResNet().eval()
    edited = copy.deepcopy(reference)
    edited.layer2[1] = StandIn()
    record = record_run(reference, ModelInputs((torch.randn(2, 1, 8, 8),)))
    x = torch.randn(32, 1, 8, 8) + 1  # other statistics than those of the norms
    targets = record_targets(reference, record, ModelInputs((x,)))
    rows = kept_outputs(reference, lambda _: None)
    since = record.start_of("layer2.1")
    repair(edited, targets, record, lambda model: model(x), kept=rows, since=since)
    changed = changed_modules(reference, edited)
    assert changed - {name for name in changed if name.startswith("layer2.1")} <= {"linear"}


def test_what_an_edit_keeps_is_told_by_the_weights() -> None:
    model = TinyMLP(in_features=6, hidden=5)

    def edit(copied: nn.Module) -> None:
        layer = copied.get_submodule("fc1")
        layer.weight = nn.Parameter(layer.weight[[0, 3]])  # type: ignore[index]

    found = kept_outputs(model, edit)
    assert found["fc1"].tolist() == [0, 3]
    assert found["fc2"].tolist() == [0, 1, 2, 3, 4]
    assert model.fc1.weight.shape == (5, 6)


def test_changed_modules_are_those_that_compute_something_else() -> None:
    before = TinyResNet()
    after = copy.deepcopy(before)
    assert changed_modules(before, after) == set()
    after.layer1[0].conv1.weight.data[0] = 0.0
    after.relu.extra = nn.ReLU()
    after.layer2[0].conv2.dilation = (2, 2)
    assert changed_modules(before, after) == {"layer1.0.conv1", "relu", "layer2.0.conv2"}


def test_the_last_layer_of_a_low_rank_form_makes_up_for_the_rank() -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(6, 5)).eval()
    first, last = nn.Linear(6, 2, bias=False), nn.Linear(2, 5)
    edited = nn.Sequential(Factored("svd", {"first": first, "last": last})).eval()
    x = torch.randn(512, 6)
    with torch.no_grad():
        expected, hidden = reference(x), first(x)
    after = repaired(reference, edited, x)
    design = torch.cat([hidden, torch.ones(len(x), 1)], 1).numpy()
    solved = design @ np.linalg.lstsq(design, expected.numpy(), rcond=None)[0]
    best = relative_error(torch.from_numpy(solved), expected)
    assert relative_error(after, expected) == pytest.approx(best, rel=0.02)


class ByKeyword(nn.Module):
    """Calls its norms by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(input=self.first(input=self.conv(x)))
        return out


def with_statistics(model: nn.Module) -> nn.Module:
    """`model` in eval mode; its norms have seen other data than the tests' samples."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1.0, 1.0)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def repair_norms(reference: nn.Module, edited: nn.Module, x: Tensor) -> None:
    """Repair the norms of `edited` in place, and nothing else."""
    record = record_run(reference, ModelInputs((x[:1],)))
    moments = record_moments(reference, ModelInputs((x,)))
    kept = kept_outputs(reference, lambda _: None)
    repair(edited, {}, record, lambda each: each(x), kept=kept, moments=moments)


def test_the_moments_are_those_of_numpy_however_the_norm_is_called() -> None:
    torch.manual_seed(0)
    model, x = with_statistics(ByKeyword()), torch.randn(2, 1, 8, 8)
    found = record_moments(model, ModelInputs((x,)))
    given = model.conv(x).movedim(1, -1).flatten(0, -2).detach().numpy()
    np.testing.assert_allclose(found["first"].mean, given.mean(0), atol=1e-6)
    np.testing.assert_allclose(found["first"].variance, given.var(0, ddof=1), rtol=1e-5)
    assert list(found) == ["first", "bn"]


def test_a_norm_that_is_given_what_it_was_keeps_its_statistics() -> None:
    """However small the sample is, and though one of its channels is constant there."""
    torch.manual_seed(0)
    reference, x = with_statistics(ByKeyword()), torch.randn(1, 1, 4, 4)
    with torch.no_grad():
        reference.conv.weight[0] = 0.0
    edited = copy.deepcopy(reference)
    repair_norms(reference, edited, x)
    for name, before in reference.state_dict().items():
        torch.testing.assert_close(edited.state_dict()[name], before, rtol=1e-6, atol=1e-6)


def test_statistics_scale_as_what_the_norm_is_given() -> None:
    """The norm gives then what it gave, though the sample is not like the statistics."""
    torch.manual_seed(0)
    reference, x = with_statistics(ByKeyword()), torch.randn(1, 1, 4, 4)
    edited = copy.deepcopy(reference)
    with torch.no_grad():
        edited.conv.weight *= 2
        edited.conv.bias *= 2
        expected = reference(x)
    repair_norms(reference, edited, x)
    torch.testing.assert_close(edited.first.running_mean, 2 * reference.first.running_mean)
    torch.testing.assert_close(edited.first.running_var, 4 * reference.first.running_var)
    with torch.no_grad():
        torch.testing.assert_close(edited(x), expected, rtol=1e-3, atol=1e-3)  # eps is not scaled
