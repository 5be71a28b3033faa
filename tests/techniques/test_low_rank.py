"""What is its own in low rank; the contract of all techniques is tested in test_techniques.py."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import SurgeryError
from compressor.export.onnx import export_onnx
from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.counts import count
from compressor.result import Choice
from compressor.structure.factored import Factored, factorize
from compressor.targets import OnnxRuntimeModel
from compressor.techniques.base import TechniqueContext
from compressor.techniques.low_rank import LowRank, output_error
from compressor.testing.models import TiedModel, TinyResNet, TinyTransformer


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyResNet().eval()


def make_context(**options: object) -> TechniqueContext:
    return TechniqueContext(ModelInputs((images(4, 1, 8, 8),)), **options)


def apply(model: nn.Module, *choices: Choice, **options: object) -> nn.Module:
    edited = copy.deepcopy(model)
    LowRank().apply(edited, choices, make_context(**options))
    return edited


def test_every_choice_has_fewer_weights_and_needs_fewer_macs(model: nn.Module) -> None:
    context = make_context()
    before = count(model, context.inputs)
    choices = list(LowRank().choices(model, context))
    assert {choice.setting["form"] for choice in choices} == {"svd", "spatial", "tucker2"}
    for choice in choices:
        after = count(apply(model, choice), context.inputs)
        assert after.params < before.params
        assert after.macs < before.macs


def test_settings_of_a_layer_go_down_to_a_quarter_of_its_weights(model: nn.Module) -> None:
    context = make_context(width_multiple=1, min_width=1)
    fractions: dict[str, list[float]] = {}
    for choice in LowRank().choices(model, context):
        kept = sum(p.numel() for p in apply(model, choice).get_submodule(choice.site).parameters())
        whole = sum(p.numel() for p in model.get_submodule(choice.site).parameters())
        fractions.setdefault(choice.site, []).append(kept / whole)
    for kept in fractions.values():
        assert kept == pytest.approx([0.75, 0.5, 0.25], abs=0.13)  # a rank of these is up to 0.13


@pytest.mark.parametrize("multiple", [4, 8])
def test_ranks_lie_on_the_targets_grid(model: nn.Module, multiple: int) -> None:
    context = make_context(width_multiple=multiple, min_width=multiple)
    ranks = [rank for c in LowRank().choices(model, context) for rank in c.setting["ranks"]]
    assert ranks
    assert not any(rank % multiple for rank in ranks)


def test_narrow_layers_are_not_offered(model: nn.Module) -> None:
    sites = {c.site for c in LowRank().choices(model, make_context(min_width=12))}
    assert sites == {"layer2.0.conv2", "layer2.1.conv1", "layer2.1.conv2"}  # 32 to 32 channels


def test_of_two_forms_the_one_with_the_nearer_outputs_is_offered() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)).eval()
    with torch.no_grad():
        few_channels = [images(16, 4), images(4, 4, 3, 3, seed=1), images(4, 16, seed=2)]
        model[0].weight.copy_(torch.einsum("op,pqhw,qi->oihw", *few_channels))
        separable = [images(16, 8, 3), images(8, 16, 3, seed=1)]
        model[1].weight.copy_(torch.einsum("orw,rih->oihw", *separable))
    context = TechniqueContext(ModelInputs((images(2, 16, 8, 8),)))
    forms = {(choice.site, choice.setting["form"]) for choice in LowRank().choices(model, context)}
    assert forms == {("0", "tucker2"), ("1", "spatial")}


def test_what_saves_nothing_on_the_target_is_not_offered(model: nn.Module) -> None:
    assert not list(LowRank().choices(model, make_context(layer_saves=lambda *_: False)))
    context = make_context(layer_saves=lambda name, form, ranks: form == "tucker2")
    forms = {choice.setting["form"] for choice in LowRank().choices(model, context)}
    assert forms == {"tucker2"}


def test_the_target_may_run_the_model_to_answer(model: nn.Module) -> None:
    """It was asked from a hook of the layer, which the answer fired again, without end."""
    context = make_context()

    def layer_saves(*_: object) -> bool:
        context.inputs.call(model)
        return True

    context.layer_saves = layer_saves
    with torch.no_grad():
        assert list(LowRank().choices(model, context))


def test_factors_are_fitted_to_the_inputs_that_the_layer_gets() -> None:
    """Against the same rank without data, on inputs with few directions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32, bias=False), nn.Linear(32, 32)).eval()
    x = images(256, 6)
    choice = Choice("low_rank", "1", {"form": "svd", "ranks": [6]})
    edited = copy.deepcopy(model)
    LowRank().apply(edited, [choice], TechniqueContext(ModelInputs((x,))))
    plain = nn.Sequential(model[0], factorize(model[1], "svd", (6,)))
    assert output_error(model[1], edited[1], model[0](x)) < 0.05
    assert output_error(model[1], plain[1], model[0](x)) > 0.3


def test_ranks_are_cut_to_what_a_pruned_layer_has() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 64), nn.Linear(64, 8)).eval()
    context = TechniqueContext(ModelInputs((images(4, 8),)))
    choices = [
        Choice("low_rank", "0", {"form": "svd", "ranks": [20]}),  # of 8: whole is smaller
        Choice("low_rank", "1", {"form": "svd", "ranks": [8]}),
    ]
    LowRank().apply(model, choices, context)
    assert isinstance(model[0], nn.Linear)
    assert isinstance(model[1], Factored)
    assert model[1].ranks == (8,)


def test_a_plan_of_another_model_is_refused(model: nn.Module) -> None:
    with pytest.raises(SurgeryError, match=r"no module 'no\.such'"):
        apply(model, Choice("low_rank", "no.such", {"form": "svd", "ranks": [4]}))
    with pytest.raises(SurgeryError, match="no low-rank form 'tucker2'"):
        apply(model, Choice("low_rank", "linear", {"form": "tucker2", "ranks": [4, 4]}))


class Own(nn.Linear):
    """A layer with code of its own."""


class Awkward(nn.Module):
    """Linear layers of which only `plain` can be replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.twice, self.read, self.owner = (nn.Linear(16, 16) for _ in range(4))
        self.tied, self.normed, self.own = nn.Linear(16, 16), nn.Linear(16, 16), Own(16, 16)
        self.uncalled = nn.Linear(16, 16)
        self.tied.weight = self.owner.weight
        nn.utils.parametrizations.weight_norm(self.normed)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.plain(x)))
        x = self.tied(self.owner(self.normed(self.own(x))))
        x = self.read(x) + F.linear(x, self.read.weight)
        return F.linear(x, self.uncalled.weight)


def test_what_cannot_be_replaced_is_lost_with_its_reason() -> None:
    context = TechniqueContext(ModelInputs((images(2, 16),)))
    model = Awkward().eval()
    assert {choice.site for choice in LowRank().choices(model, context)} == {"plain"}
    reasons = {item.site: item.reason for item in context.lost}
    assert reasons.keys() == set(Awkward()._modules) - {"plain"}
    assert "not called" in reasons["uncalled"]
    assert "2 times" in reasons["twice"]
    assert "more of it than its output" in reasons["read"]
    assert "those of 'tied'" in reasons["owner"]
    assert "those of 'owner'" in reasons["tied"]
    assert "parametrization" in reasons["normed"]
    assert "it is a Own" in reasons["own"]
    assert isinstance(model.plain, nn.Linear)


def test_a_layer_tied_to_an_embedding_stays() -> None:
    context = TechniqueContext(ModelInputs((torch.zeros(2, 4, dtype=torch.int64),)))
    sites = {choice.site for choice in LowRank().choices(TiedModel().eval(), context)}
    assert sites == {"hidden"}
    assert [item.site for item in context.lost] == ["head"]


def test_chains_are_not_factored_again(model: nn.Module) -> None:
    first = next(iter(LowRank().choices(model, make_context())))
    edited = apply(model, first)
    sites = {choice.site for choice in LowRank().choices(edited, make_context())}
    assert sites
    assert not any(site.startswith(first.site) for site in sites)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "text"])
def test_a_factored_model_is_the_same_in_onnx_runtime(
    kind: str, model: nn.Module, tmp_path: Path
) -> None:
    if kind == "images":
        net, inputs = copy.deepcopy(model), ModelInputs((images(4, 1, 8, 8),))
    else:
        net, inputs = TinyTransformer().eval(), ModelInputs((torch.arange(32).view(2, 16),))
    context = TechniqueContext(inputs)
    one_a_site = {choice.site: choice for choice in LowRank().choices(net, context)}
    LowRank().apply(net, list(one_a_site.values()), context)
    assert sum(isinstance(module, Factored) for module in net.modules()) == len(one_a_site)
    path = export_onnx(net, inputs, tmp_path / "model.onnx")
    with torch.no_grad():
        for size in (1, 5):
            resized = inputs.with_batch(size)
            expected = resized.call(net)
            result = resized.call(OnnxRuntimeModel(path))
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
