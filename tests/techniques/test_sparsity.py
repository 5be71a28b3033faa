from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ConfigError, SurgeryError
from compressor.interfaces.inputs import ModelInputs
from compressor.result import Choice, Plan
from compressor.structure.archive import WEIGHTS_FILE, load, save
from compressor.structure.trace import copy_skeleton
from compressor.techniques import Sparsity, TechniqueContext, apply_plan
from compressor.techniques.permutation import kept_score
from compressor.testing.models import TiedModel, TinyResNet
from compressor.training.algorithms import HoldMasks, magnitude_mask, nm_mask
from tests.training.helpers import make_trainer


def images(seed: int = 0) -> Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def make_context() -> TechniqueContext:
    def accumulate(model: nn.Module) -> None:
        model(images(1)).square().mean().backward()

    return TechniqueContext(
        ModelInputs((images(),)), stores_compact=True, accumulate_gradients=accumulate
    )


@pytest.fixture
def model() -> TinyResNet:
    torch.manual_seed(0)
    return TinyResNet().eval()


def applied(model: nn.Module, *choices: Choice, technique: Sparsity | None = None) -> nn.Module:
    edited = copy.deepcopy(model)
    plan = Plan(choices)
    apply_plan(edited, plan, {"sparsity": technique or Sparsity()}, make_context())
    return edited


def choices_at(model: nn.Module, site: str, technique: Sparsity | None = None) -> list[Choice]:
    found = (technique or Sparsity()).choices(model, make_context())
    return [choice for choice in found if choice.site == site]


def test_the_smallest_weights_of_a_layer_become_zero(model: TinyResNet) -> None:
    half, three_quarters, nine_tenths, _ = choices_at(model, "layer1.0.conv1")
    for choice, level in ((half, 0.5), (three_quarters, 0.75), (nine_tenths, 0.9)):
        weight = model.layer1[0].conv1.weight.detach()
        expected = weight * magnitude_mask(weight, level)
        assert applied(model, choice).layer1[0].conv1.weight.equal(expected)
        assert applied(model, choice).conv1.weight.equal(model.conv1.weight)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["magnitude", "snip", "wanda"])
def test_every_choice_takes_the_bits_on_disk_that_it_promises(
    model: TinyResNet, criterion: str, tmp_path: Path
) -> None:
    technique = Sparsity(criterion)  # type: ignore[arg-type]
    save(model, tmp_path, reference=model)
    before = (tmp_path / WEIGHTS_FILE).stat().st_size
    for choice in choices_at(model, "layer2.0.conv2", technique):
        edited = applied(model, choice, technique=technique)
        save(edited, tmp_path, reference=model)
        size = model.layer2[0].conv2.weight.numel()
        saved = size * (32 - choice.setting["stored_bits"]) / 8
        assert before - (tmp_path / WEIGHTS_FILE).stat().st_size == pytest.approx(saved, abs=64)
        assert load(tmp_path, TinyResNet())(images()).equal(edited(images()))


@pytest.mark.slow
def test_of_every_four_inputs_two_stay(model: TinyResNet) -> None:
    for site in ("layer1.0.conv1", "layer2.0.conv1", "linear"):
        choice = choices_at(model, site)[-1]
        assert choice.label == "2:4"
        edited = applied(model, choice)
        weight = edited.get_submodule(site).weight
        groups = weight.movedim(1, -1).reshape(-1, 4)
        assert (groups == 0).sum(1).eq(2).all()


@pytest.mark.slow
def test_inputs_are_put_in_the_order_in_which_2_4_keeps_more(model: TinyResNet) -> None:
    """The order is that of the layer before, and costs nothing: the model computes the same."""
    with torch.no_grad():  # what 2:4 takes most from: large inputs side by side
        for conv in (model.layer2[0].conv2, model.layer2[1].conv1):
            conv.weight[:, :8] *= 20
    choice = choices_at(model, "layer2.0.conv2")[-1]
    edited = applied(model, choice)
    weight, after = model.layer2[0].conv2.weight.detach(), edited.layer2[0].conv2.weight.detach()
    plain = weight * nm_mask(weight, 2, 4)
    assert after.abs().sum() > 1.2 * plain.abs().sum()
    assert after.abs().sum() <= weight.abs().sum()
    # The layer before tells the order.
    order = [
        next(i for i, row in enumerate(model.layer2[0].conv1.weight) if row.equal(moved))
        for moved in edited.layer2[0].conv1.weight
    ]
    assert order != sorted(order)
    rows = weight.abs().movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(after.abs().sum(), kept_score(rows[:, order]))
    # Without the zeros, the model computes what it did.
    edited.layer2[0].conv2.weight = nn.Parameter(weight[:, order])
    torch.testing.assert_close(edited(images()), model(images()), rtol=0, atol=1e-4)


def test_a_level_for_all_layers_is_one_threshold(model: TinyResNet) -> None:
    technique = Sparsity(scope="global")
    weights = {
        name: module.weight.detach().abs()
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    everything = torch.cat([weight.flatten() for weight in weights.values()])
    threshold = everything.median()
    expected = {n: float((weight <= threshold).float().mean()) for n, weight in weights.items()}
    assert max(expected.values()) > 1.5 * min(expected.values())
    found: dict[str, list[float]] = {name: [] for name in weights}
    for choice in technique.choices(model, make_context()):
        if choice.label != "2:4":
            found[choice.site].append(choice.setting["sparsity"])
    offered = {name: levels for name, levels in found.items() if len(levels) == 3}
    assert len(offered) >= 6  # of the others, the first levels would save nothing
    for name, levels in offered.items():
        assert levels[0] == pytest.approx(expected[name], abs=2e-3)


def test_nothing_is_offered_where_files_hold_zeros_in_full(model: TinyResNet) -> None:
    context = TechniqueContext(ModelInputs((images(),)))
    assert not list(Sparsity().choices(model, context))
    (lost,) = context.lost
    assert (lost.technique, lost.site) == ("sparsity", "")
    assert "every weight in full" in lost.reason


def test_a_layer_that_would_not_get_smaller_is_not_offered() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 400))
    context = TechniqueContext(ModelInputs((torch.zeros(2, 4),)), stores_compact=True)
    assert {choice.site for choice in Sparsity().choices(model, context)} == {"1"}


def test_attention_that_is_remade_for_pruning_is_reported() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
    context = TechniqueContext(ModelInputs((torch.zeros(2, 3, 16),)), stores_compact=True)
    assert {c.site for c in Sparsity().choices(model, context)} == {"linear1", "linear2"}
    assert [lost.site for lost in context.lost] == ["self_attn.out_proj"]


def test_the_reference_is_not_written_into(model: TinyResNet) -> None:
    """A skeleton shares its tensors."""
    before = copy.deepcopy(model.state_dict())
    skeleton = copy_skeleton(model)
    choices = [each for each in Sparsity().choices(model, make_context()) if each.label == "2:4"]
    apply_plan(skeleton, Plan(tuple(choices)), {"sparsity": Sparsity()}, make_context())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert not skeleton.linear.weight.equal(model.linear.weight)


def test_a_tied_weight_is_sparse_under_all_its_names() -> None:
    model = TiedModel().eval()
    context = TechniqueContext(ModelInputs((torch.zeros(1, 4, dtype=torch.long),)))
    context.stores_compact = True
    choice = next(c for c in Sparsity().choices(model, context) if c.site == "head")
    Sparsity().apply(model, [choice], context)
    assert model.head.weight is model.embedding.weight
    assert (model.head.weight == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_the_weights_of_a_factored_layer_are_those_of_its_parts(model: TinyResNet) -> None:
    choice = choices_at(model, "linear")[0]
    model.linear = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 10))
    edited = applied(model, choice)
    for part in edited.linear:
        assert (part.weight == 0).float().mean().item() == 0.5


def test_a_pattern_that_pruning_broke_becomes_half_the_weights(model: TinyResNet) -> None:
    choice = choices_at(model, "linear")[-1]
    narrower = nn.ModuleDict({"linear": nn.Linear(30, 10)})
    Sparsity().apply(narrower, [choice], make_context())
    assert int((narrower["linear"].weight == 0).sum()) == 150


def test_training_holds_the_zeros_of_the_chosen_layers(model: TinyResNet) -> None:
    choices = [choices_at(model, site)[0] for site in ("conv1", "linear")]
    (algorithm,) = Sparsity().algorithms(choices)
    assert isinstance(algorithm, HoldMasks)
    assert algorithm.layers == ("conv1", "linear")
    assert not Sparsity().algorithms([])


def test_what_does_not_fit_is_refused(model: TinyResNet) -> None:
    setting = {"sparsity": 0.5, "criterion": "magnitude"}
    with pytest.raises(SurgeryError, match="fc9"):
        applied(model, Choice("sparsity", "fc9", setting))
    with pytest.raises(SurgeryError, match="'bn1' is a BatchNorm2d and holds no weight"):
        applied(model, Choice("sparsity", "bn1", setting))
    with pytest.raises(ConfigError, match="no scope 'rows'"):
        Sparsity(scope="rows")  # type: ignore[arg-type]


def test_a_model_that_is_a_layer_is_its_own_site() -> None:
    model, context = nn.Linear(64, 64), TechniqueContext(ModelInputs((torch.zeros(2, 64),)))
    context.stores_compact = True
    technique = Sparsity()
    choice = next(c for c in technique.choices(model, context) if c.label == "90% zeros")
    technique.apply(model, [choice], context)
    (holding,) = technique.algorithms([choice])
    zeros = model.weight.detach() == 0
    assert zeros.float().mean().item() == pytest.approx(0.9, abs=1e-3)
    make_trainer(
        model,
        train_dataloader=[(torch.randn(8, 64), torch.zeros(8, dtype=torch.long))],
        algorithms=[holding],
    ).fit()
    assert (model.weight == 0).equal(zeros)
