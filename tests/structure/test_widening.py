"""A compressed model in the full shape of its reference, and cut again."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ModelError, SurgeryError
from compressor.interfaces.inputs import ModelInputs
from compressor.result import Choice, Plan
from compressor.structure.attention import replace_attention
from compressor.structure.channels import find_groups
from compressor.structure.cutting import keep_channels
from compressor.structure.factored import FORMS, factorize, forms_of
from compressor.structure.widening import widened
from compressor.techniques import BlockRemoval, ChannelPruning, Stage, TechniqueContext, apply_plan
from compressor.testing.models import (
    CifarResNet,
    TiedModel,
    TinyMLP,
    TinyResNet,
    TinyTransformer,
)

TOKENS = torch.arange(12).reshape(2, 6)
CASES = {
    "mlp": (TinyMLP, torch.randn(4, 64, generator=torch.Generator().manual_seed(0))),
    "resnet": (TinyResNet, torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))),
    "cifar": (
        lambda: CifarResNet(14),
        torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
    ),
    "transformer": (TinyTransformer, TOKENS),
    "tied": (TiedModel, TOKENS),
    "attention": (
        lambda: nn.Sequential(
            nn.Linear(16, 16),
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
            nn.Linear(16, 2),
        ),
        torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)),
    ),
}
SLOW = pytest.mark.slow


def prepared(name: str) -> tuple[nn.Module, Tensor]:
    make, inputs = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval(), inputs


class Plans:
    """Plans for one model: milder and harder ones of pruning and removal."""

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self.context = TechniqueContext(ModelInputs((inputs,)), importance="l1")
        self.techniques = {t.name: t for t in (ChannelPruning(), BlockRemoval())}
        self.sites: dict[tuple[str, str], list[Choice]] = {}
        for technique in self.techniques.values():
            for choice in technique.choices(model, self.context):
                self.sites.setdefault((technique.name, choice.site), []).append(choice)

    def plan(self, severity: int, removed: int) -> Plan:
        """The choices number `severity` of all groups, and so many blocks removed."""
        groups = [c for (t, _), c in self.sites.items() if t == "channel_pruning"]
        blocks = [c[0] for (t, _), c in self.sites.items() if t == "block_removal"]
        widths = [each[min(severity, len(each) - 1)] for each in groups]
        return Plan((*widths, *blocks[:removed]))

    def applying(self, plan: Plan) -> Callable[[nn.Module], None]:
        return lambda model: apply_plan(model, plan, self.techniques, self.context)


def trained(model: nn.Module) -> nn.Module:
    """`model` with other weights and statistics, as training would leave it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.3 * torch.rand(tensor.shape, generator=generator))
            else:
                tensor.add_(7)
    return model


@pytest.mark.parametrize(
    "name", ["mlp", "tied", *(pytest.param(n, marks=SLOW) for n in CASES if n not in "mlp tied")]
)
def test_the_same_plan_gives_the_trained_model_back(name: str) -> None:
    reference, inputs = prepared(name)
    before = copy.deepcopy(reference.state_dict())
    plans = Plans(reference, inputs)
    base = plans.applying(plans.plan(0, removed=1))
    model = copy.deepcopy(reference)
    base(model)
    assert sum(p.numel() for p in model.parameters()) < sum(
        p.numel() for p in reference.parameters()
    )
    trained(model)
    wide = widened(reference, base, model)
    assert {k: v.shape for k, v in wide.state_dict().items()} == {
        k: v.shape for k, v in before.items()
    }
    assert all(torch.equal(v, before[k]) for k, v in reference.state_dict().items())
    again = copy.deepcopy(wide)
    base(again)
    torch.testing.assert_close(again(inputs), model(inputs), rtol=1e-5, atol=1e-5)
    deeper = copy.deepcopy(wide)
    plans.applying(plans.plan(2, removed=2))(deeper)
    assert deeper(inputs).shape == model(inputs).shape
    assert sum(p.numel() for p in deeper.parameters()) < sum(p.numel() for p in model.parameters())


def cutting(kept: list[int], model: nn.Module) -> Callable[[nn.Module], None]:
    group = next(
        g for g in find_groups(model, ModelInputs((CASES["mlp"][1],))).groups if g.name == "fc1"
    )

    def cut(copied: nn.Module) -> None:
        keep_channels(copied, group, kept)

    return cut


def test_a_deeper_cut_has_the_trained_entries_and_the_pruned_ones_are_the_reference_s() -> None:
    reference, _ = prepared("mlp")
    kept = list(range(0, 32, 2))
    base = cutting(kept, reference)
    model = copy.deepcopy(reference)
    base(model)
    trained(model)
    wide = widened(reference, base, model)
    assert torch.equal(wide.fc1.weight[1::2], reference.fc1.weight[1::2])
    assert torch.equal(wide.fc2.weight[:, 1::2], reference.fc2.weight[:, 1::2])
    assert torch.equal(wide.fc3.weight, model.fc3.weight)
    deeper = copy.deepcopy(wide)
    cutting(kept[:8], reference)(deeper)
    assert torch.equal(deeper.fc1.weight, model.fc1.weight[:8])
    assert torch.equal(deeper.fc1.bias, model.fc1.bias[:8])
    assert torch.equal(deeper.fc2.weight, model.fc2.weight[:, :8])


def test_a_tie_stays_a_tie() -> None:
    reference, inputs = prepared("tied")
    plans = Plans(reference, inputs)
    base = plans.applying(plans.plan(0, removed=0))
    model = copy.deepcopy(reference)
    base(model)
    wide = widened(reference, base, trained(model))
    assert wide.head.weight is wide.embedding.weight


@pytest.mark.slow
def test_attention_that_the_plan_has_replaced_goes_back_into_its_one_matrix() -> None:
    reference, inputs = prepared("attention")
    model = copy.deepcopy(reference)
    replace_attention(model)
    trained(model)
    wide = widened(reference, replace_attention, model)
    attention, ours = wide[1].self_attn, model[1].self_attn
    assert torch.equal(attention.in_proj_weight[16:32], ours.k.weight)
    with torch.no_grad():
        torch.testing.assert_close(wide(inputs), model(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_low_rank_layers_are_multiplied_out(form: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, 1 if form == "svd" else 3, padding=1)
    reference = nn.Sequential(conv, nn.Conv2d(8, 4, 1))
    assert form in forms_of(conv)
    ranks = (3, 4) if form == "tucker2" else (3,)
    model = trained(nn.Sequential(factorize(conv, form, ranks), copy.deepcopy(reference[1])))
    wide = widened(reference, lambda _: None, model)
    images = torch.randn(2, 6, 8, 8)
    assert type(wide[0]) is nn.Conv2d
    torch.testing.assert_close(wide(images), model(images), rtol=1e-4, atol=1e-5)


def test_a_low_rank_linear_layer_is_multiplied_out() -> None:
    linear = nn.Linear(6, 8)
    model = trained(nn.Sequential(factorize(linear, "svd", (2,))))
    wide = widened(nn.Sequential(linear), lambda _: None, model)
    x = torch.randn(3, 6)
    torch.testing.assert_close(wide(x), model(x), rtol=1e-4, atol=1e-5)


def test_dtype_and_flags_are_the_reference_s() -> None:
    reference = prepared("mlp")[0].bfloat16()
    reference.fc2.weight.requires_grad_(False)
    model = copy.deepcopy(reference).float().requires_grad_(True)
    wide = widened(reference, lambda _: None, trained(model))
    assert wide.fc2.weight.dtype == torch.bfloat16
    assert [p.requires_grad for p in wide.parameters()] == [
        p.requires_grad for p in reference.parameters()
    ]


def test_a_model_of_another_plan_is_refused() -> None:
    reference, _ = prepared("mlp")
    model = copy.deepcopy(reference)
    cutting([0, 1, 2], reference)(model)
    with pytest.raises(ModelError, match=r"'fc1.weight' is \(3, 64\), and the edits leave \(4, 64"):
        widened(reference, cutting([0, 1, 2, 3], reference), model)


def test_edits_that_compute_are_refused_by_name() -> None:
    reference, _ = prepared("mlp")

    def halve(model: nn.Module) -> None:
        model.fc2.weight = nn.Parameter(model.fc2.weight.detach() / 2)

    with pytest.raises(SurgeryError, match=r"'fc2.weight' is computed by the edits"):
        widened(reference, halve, copy.deepcopy(reference))


def test_edits_that_look_at_values_are_refused_by_name() -> None:
    reference, _ = prepared("mlp")

    def flip(model: nn.Module) -> None:
        if model.fc3.bias[0] < 1e6:  # true weights
            model.fc3.bias = nn.Parameter(model.fc3.bias.detach().flip(0))

    with pytest.raises(SurgeryError, match=r"other entries of 'fc3.bias'"):
        widened(reference, flip, trained(copy.deepcopy(reference)))


def test_edits_that_run_the_model_are_refused() -> None:
    reference, inputs = prepared("mlp")

    def run(model: nn.Module) -> None:
        model(inputs)

    with pytest.raises(SurgeryError, match="need to run the model"):
        widened(reference, run, copy.deepcopy(reference))


def test_of_a_new_module_nothing_is_taken_over() -> None:
    reference, _ = prepared("mlp")

    def renew(model: nn.Module) -> None:
        model.fc2 = nn.Bilinear(2, 2, 2)

    model = copy.deepcopy(reference)
    renew(model)
    wide = widened(reference, renew, trained(model))
    assert torch.equal(wide.fc2.weight, reference.fc2.weight)
    assert torch.equal(wide.fc3.weight, model.fc3.weight)


def test_the_stages_before_rank_only_cut_and_remove() -> None:
    assert {ChannelPruning.stage, BlockRemoval.stage} == {s for s in Stage if s < Stage.RANK}
