"""The technique of the example holds the contract, merges exactly what is alike, and is used."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from compressor.interfaces.inputs import ModelInputs
from compressor.result import Choice
from compressor.techniques import TECHNIQUES, TechniqueContext
from compressor.testing.technique_contract import TechniqueContract
from tests.examples import scripts


def load() -> ModuleType:
    """The example, registered nowhere: other tests ask for all techniques that there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TECHNIQUES, "_classes", dict(TECHNIQUES._classes))
        return scripts.load("custom_technique", patch)


example = load()


class TestNeuronMerging(TechniqueContract):
    technique = example.NeuronMerging

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return example.make_mlp(32).eval()  # type: ignore[no-any-return]

    def keep_all(self, model: nn.Module, choice: Choice) -> dict[str, Any]:
        layer = model.get_submodule(choice.site)
        return {**choice.setting, "width": layer.out_features}


def make_context() -> TechniqueContext:
    return TechniqueContext(ModelInputs((torch.zeros(2, 4),)))


def test_neurons_of_one_direction_are_merged_without_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    first = model[0]
    with torch.no_grad():
        for row in range(4):
            first.weight[row + 4] = (row + 1) * first.weight[row]
            first.bias[row + 4] = (row + 1) * first.bias[row]
    x = torch.randn(64, 4)
    expected = model(x)
    choice = Choice("neuron_merging", "0", {"width": 4, "reader": "2"})
    example.NeuronMerging().apply(model, [choice], make_context())
    assert (model[0].out_features, model[2].in_features) == (4, 4)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_widths_are_those_of_the_target_and_each_is_offered_once() -> None:
    context = make_context()
    context.width_multiple = context.min_width = 8
    model = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 3))
    choices = example.NeuronMerging().choices(model, context)
    assert [choice.setting["width"] for choice in choices] == [16, 8]


def test_a_layer_that_hangs_in_two_places_is_reported() -> None:
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(16, 16))
    context = make_context()
    assert not list(example.NeuronMerging().choices(model, context))
    assert [lost.site for lost in context.lost] == ["0", "2"]


@pytest.mark.slow
def test_the_engine_uses_it_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TECHNIQUES._classes, "neuron_merging", example.NeuronMerging)
    result = scripts.run(example, "--delta", 10, "--run-dir", tmp_path)
    merged = result.plan.of("neuron_merging")
    assert len(merged)
    for choice in merged:
        layer = result.model.get_submodule(choice.site)
        assert layer.out_features == choice.setting["width"]
    assert result.certificate.within_delta
    assert result.certificate.macs_ratio > 1
