"""Every registered technique holds the contract; plans of several hold together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from compressor.errors import SurgeryError
from compressor.interfaces.inputs import ModelInputs
from compressor.result import Choice, Plan
from compressor.structure.describe import diff
from compressor.techniques import TECHNIQUES, Technique, TechniqueContext, apply_plan
from compressor.testing.models import TinyResNet
from compressor.testing.technique_contract import TechniqueContract

pytestmark = pytest.mark.slow  # groups and blocks are found in exported graphs


class TestBlockRemoval(TechniqueContract):
    technique = TECHNIQUES.get("block_removal")
    largest_loss = 0.9  # nothing of a random branch is kept: 1 / √2 of a redrawn one, on average


class TestChannelPruning(TechniqueContract):
    technique = TECHNIQUES.get("channel_pruning")

    def keep_all(self, model: nn.Module, choice: Choice) -> dict[str, Any]:
        size = model.get_submodule(choice.site).out_channels
        return {"kept": list(range(size))}


class TestClustering(TechniqueContract):
    technique = TECHNIQUES.get("clustering")


class TestLowRank(TechniqueContract):
    technique = TECHNIQUES.get("low_rank")


class TestSparsity(TechniqueContract):
    technique = TECHNIQUES.get("sparsity")


class TestQuantization(TechniqueContract):
    technique = TECHNIQUES.get("quantization")


def test_every_registered_technique_holds_the_contract() -> None:
    here = [cls for cls in TechniqueContract.__subclasses__() if cls.__module__ == __name__]
    tested = {cls.technique.name for cls in here}  # an example has one of its own
    assert tested == set(TECHNIQUES.names())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return TinyResNet().eval()


def make_context() -> TechniqueContext:
    generator = torch.Generator().manual_seed(0)
    inputs = ModelInputs((torch.randn(4, 1, 8, 8, generator=generator),))
    return TechniqueContext(
        inputs,
        importance="l2",
        stores_compact=True,
        layer_formats=lambda: dict.fromkeys(["conv1", "linear"], ("static_int8",)),
    )


def make_all() -> dict[str, Technique]:
    return {name: TECHNIQUES.get(name)() for name in TECHNIQUES.names()}


def all_choices(model: nn.Module) -> list[Choice]:
    context = make_context()
    return [c for technique in make_all().values() for c in technique.choices(model, context)]


def test_an_empty_plan_is_the_identity(model: nn.Module) -> None:
    edited = copy.deepcopy(model)
    apply_plan(edited, Plan(), make_all(), make_context())
    assert diff(model, edited) == diff(model, model)


def test_width_and_depth_may_be_chosen_together(model: nn.Module) -> None:
    """A stream that runs through a removed block is narrowed first."""
    context = make_context()
    choices = all_choices(model)
    widths = {c.site: c for c in choices if c.technique == "channel_pruning"}
    removed = [c for c in choices if c.technique == "block_removal"]
    gone = {name for c in removed for name in c.modules}
    stream = next(c for c in widths.values() if set(c.modules) & gone and set(c.modules) - gone)
    edited = copy.deepcopy(model)
    apply_plan(edited, Plan((stream, *removed)), make_all(), context)
    assert context.inputs.call(edited).shape == (4, 10)


def test_one_choice_of_every_technique_at_every_other_site_holds_together(
    model: nn.Module,
) -> None:
    context = make_context()
    choices = all_choices(model)
    gone = {m for c in choices if c.technique == "block_removal" for m in c.modules}
    taken = {
        (c.technique, c.site): c
        for c in choices
        if c.technique in ("block_removal", "channel_pruning") or c.site not in gone
    }
    assert {technique for technique, _ in taken} == set(TECHNIQUES.names())
    edited = copy.deepcopy(model)
    apply_plan(edited, Plan(tuple(taken.values())), make_all(), context)
    assert context.inputs.call(edited).shape == (4, 10)


def test_a_plan_of_another_model_is_refused(model: nn.Module) -> None:
    choice = Choice("channel_pruning", "no.such.layer", {"kept": [0]})
    with pytest.raises(SurgeryError, match=r"no\.such\.layer"):
        apply_plan(copy.deepcopy(model), Plan((choice,)), make_all(), make_context())
