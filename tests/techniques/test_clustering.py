from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from compressor.interfaces.inputs import ModelInputs
from compressor.result import Choice, Plan
from compressor.structure.archive import WEIGHTS_FILE, load, save
from compressor.structure.packing import stored_bits
from compressor.structure.trace import copy_skeleton
from compressor.techniques import Clustering, Sparsity, TechniqueContext, apply_plan
from compressor.testing.models import TinyResNet
from compressor.training.algorithms import WeightClustering


def make_context(*, stores_compact: bool = True) -> TechniqueContext:
    return TechniqueContext(ModelInputs((torch.zeros(4, 1, 8, 8),)), stores_compact=stores_compact)


@pytest.fixture
def model() -> TinyResNet:
    torch.manual_seed(0)
    return TinyResNet().eval()


def choices_at(model: nn.Module, site: str) -> list[Choice]:
    return [c for c in Clustering().choices(model, make_context()) if c.site == site]


def applied(model: nn.Module, *choices: Choice) -> nn.Module:
    edited = copy.deepcopy(model)
    techniques = {"sparsity": Sparsity(), "clustering": Clustering()}
    apply_plan(edited, Plan(choices), techniques, make_context())
    return edited


def test_every_choice_takes_the_bits_on_disk_that_it_promises(
    model: TinyResNet, tmp_path: Path
) -> None:
    save(model, tmp_path, reference=model)
    before = (tmp_path / WEIGHTS_FILE).stat().st_size
    weight = model.layer2[0].conv2.weight
    choices = choices_at(model, "layer2.0.conv2")
    assert [choice.setting["index_bits"] for choice in choices] == [8, 6, 4, 3, 2]
    for choice in choices:
        edited = applied(model, choice)
        clustered = edited.layer2[0].conv2.weight
        assert len(clustered.unique()) == 2 ** choice.setting["index_bits"]
        save(edited, tmp_path, reference=model)
        saved = weight.numel() * (32 - choice.setting["stored_bits"]) / 8
        assert before - (tmp_path / WEIGHTS_FILE).stat().st_size == pytest.approx(saved, abs=100)
        x = torch.randn(2, 1, 8, 8)
        assert load(tmp_path, TinyResNet())(x).equal(edited(x))


def test_more_bits_are_nearer(model: TinyResNet) -> None:
    weight = model.layer2[0].conv2.weight.detach()
    errors = [
        float((applied(model, choice).layer2[0].conv2.weight.detach() - weight).norm())
        / float(weight.norm())
        for choice in choices_at(model, "layer2.0.conv2")
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.01
    assert errors[-1] < 0.5


def test_zeros_of_sparsity_stay_and_both_are_packed(model: TinyResNet, tmp_path: Path) -> None:
    sparse = next(
        c
        for c in Sparsity().choices(model, make_context())
        if c.site == "layer2.0.conv2" and c.setting["sparsity"] == 0.75
    )
    clustered = choices_at(model, "layer2.0.conv2")[2]
    edited = applied(model, sparse, clustered)
    weight = edited.layer2[0].conv2.weight
    assert (weight == 0).float().mean().item() == 0.75
    assert len(weight.unique()) == 16
    sizes = []
    for each in (model, edited):
        save(each, tmp_path, reference=model)
        sizes.append((tmp_path / WEIGHTS_FILE).stat().st_size)
    size = weight.numel()
    bits = stored_bits(size, 32, nonzero=size // 4, distinct=15)
    assert bits == pytest.approx(1 + 4 / 4, abs=0.3)  # a mask, and four bits for every fourth
    assert sizes[0] - sizes[1] == pytest.approx(size * (32 - bits) / 8, abs=150)


def test_nothing_is_offered_where_files_hold_every_value_in_full(model: TinyResNet) -> None:
    context = make_context(stores_compact=False)
    assert not list(Clustering().choices(model, context))
    assert [lost.technique for lost in context.lost] == ["clustering"]


def test_a_palette_that_would_not_be_smaller_is_not_offered(model: TinyResNet) -> None:
    """The first convolution has 144 weights: 256 values would be more than there are."""
    assert [choice.setting["index_bits"] for choice in choices_at(model, "conv1")] == [6, 4, 3, 2]


def test_the_reference_is_not_written_into(model: TinyResNet) -> None:
    before = copy.deepcopy(model.state_dict())
    skeleton = copy_skeleton(model)
    choices = choices_at(model, "linear")
    apply_plan(skeleton, Plan(tuple(choices[-1:])), {"clustering": Clustering()}, make_context())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert len(skeleton.linear.weight.unique()) == 4


def test_training_keeps_the_palettes_of_the_chosen_layers(model: TinyResNet) -> None:
    choices = [choices_at(model, "conv1")[-1], choices_at(model, "linear")[0]]
    (algorithm,) = Clustering().algorithms(choices)
    assert isinstance(algorithm, WeightClustering)
    assert algorithm.bits == {"conv1": 2, "linear": choices[1].setting["index_bits"]}
    assert not Clustering().algorithms([])
