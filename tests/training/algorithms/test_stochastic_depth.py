from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor import ClassifierTask
from compressor.errors import ConfigError, SurgeryError
from compressor.interfaces.inputs import ModelInputs
from compressor.structure import surgery
from compressor.testing.models import ResidualBlock, TinyResNet
from compressor.training import Algorithm, Event, State, Trainer, Window
from compressor.training.algorithms import StochasticDepth
from compressor.training.algorithms.residual_branches import residual_branches
from compressor.training.algorithms.stochastic_depth import (
    BranchDrop,
    apply_stochastic_depth,
    drop_rates,
)
from tests.training.algorithms.settings import BRANCHES, Residuals, make_images

NAMES = ["layer1.0.bn2", "layer2.1.bn2"]


def drops_of(model: nn.Module) -> dict[str, float]:
    """Where branches are dropped at present, and how often."""
    return {
        name: hook.p
        for name, module in model.named_modules()
        for hook in module._forward_hooks.values()
        if isinstance(hook, BranchDrop)
    }


@pytest.mark.slow
def test_a_network_trains_as_with_the_layers_of_torchvision() -> None:
    from torchvision.models.convnext import CNBlock

    def make(*rates: float) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*(CNBlock(8, 0.5, rate) for rate in rates))

    with torch.random.fork_rng():
        theirs, ours = make(0.25, 0.5), make(0, 0)
        x = torch.randn(16, 8, 5, 5)
        apply_stochastic_depth(ours, residual_branches(ours, ModelInputs((x,))), drop_rate=0.5)
        gradients = []
        for model in (theirs, ours):
            torch.manual_seed(1)
            output = model(x)
            output.square().sum().backward()
            gradients.append([output, *(parameter.grad for parameter in model.parameters())])
    for expected, given in zip(*gradients, strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)  # sums of another order
    assert not torch.allclose(theirs.eval()(x), gradients[0][0])


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_a_branch_is_dropped_before_the_sum_and_its_activation(mode: Any) -> None:
    block = ResidualBlock(4, 4)
    apply_stochastic_depth(block, ["bn2"], 0.5, mode)
    x = torch.randn(200, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    assert not block.shortcut._forward_hooks
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        plain = ResidualBlock(4, 4)
        plain.load_state_dict(block.state_dict())
        branch = plain.bn2(plain.conv2(F.relu(plain.bn1(plain.conv1(x)))))
        outputs = block(x)
    without, doubled = F.relu(x), F.relu(x + 2 * branch)
    is_dropped = torch.tensor([torch.allclose(a, b) for a, b in zip(outputs, without, strict=True)])
    is_kept = torch.tensor(
        [torch.allclose(a, b, atol=1e-5) for a, b in zip(outputs, doubled, strict=True)]
    )
    assert bool((is_dropped ^ is_kept).all())
    if mode == "batch":
        assert is_dropped.all() or is_kept.all()
    else:  # 4 standard deviations of a mean of 200 draws
        assert float(is_dropped.float().mean()) == pytest.approx(0.5, abs=0.15)


def test_in_evaluation_and_by_name_the_model_is_the_one_it_was() -> None:
    model, x = TinyResNet(width=4).eval(), torch.randn(2, 1, 8, 8)
    expected, names, parameters = model(x), list(model.state_dict()), list(model.parameters())
    drops = apply_stochastic_depth(model, NAMES, drop_rate=0.9)
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for drop in drops.values():
        drop.remove()
        drop.remove()
    assert not drops_of(model)


def test_done_twice_is_done_once() -> None:
    model = TinyResNet(width=4)
    assert list(apply_stochastic_depth(model, NAMES, 0.4)) == NAMES
    assert apply_stochastic_depth(model, NAMES, 0.2) == {}
    assert drops_of(model) == dict(zip(NAMES, (0.2, 0.4), strict=True))


def test_the_mode_of_the_model_counts_and_not_that_of_a_batch_norm() -> None:
    """Its statistics may be frozen, or estimated anew while all else is in evaluation mode."""
    model, x = TinyResNet(width=4), torch.randn(2, 1, 8, 8)
    drops = apply_stochastic_depth(model, NAMES, drop_rate=0.999, distribution="uniform")
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.eval()
    dropped = model(x)
    model.eval().layer1[0].bn2.train()
    kept = model(x)
    for drop in drops.values():
        drop.remove()
    assert torch.equal(model(x), kept)
    assert not torch.equal(dropped, kept)


def test_rates_grow_with_the_depth_or_are_alike() -> None:
    assert drop_rates(5, 0.5) == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert drop_rates(3, 0.5, "uniform") == [0.5, 0.5, 0.5]


def test_a_first_output_of_several_is_dropped() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    model = nn.Sequential(Attention())
    apply_stochastic_depth(model, ["0"], drop_rate=0.999)
    dropped, kept = model(torch.ones(3, 2))
    assert not dropped.any()
    assert kept.all()


class Noting(Algorithm):
    """Writes down the rates of each step."""

    events = frozenset({Event.AFTER_STEP})

    def __init__(self) -> None:
        self.rates: list[dict[str, float]] = []

    def on(self, event: Event, state: State) -> None:
        self.rates.append(drops_of(state.model))


def make_trainer(algorithms: Sequence[Algorithm], **options: Any) -> Trainer:
    return Trainer(
        options.pop("task", None) or Residuals(),
        algorithms=algorithms,
        train_dataloader=make_images(),
        optimizers={"name": "SGD", "lr": 0.01},
        **{"max_duration": "2ep", **options},
    )


def test_rates_warm_up_and_end_with_the_fit() -> None:
    noting = Noting()
    depth = StochasticDepth(0.4, warmup="0.5dur", branches=BRANCHES)
    trainer = make_trainer([depth, noting])
    assert not drops_of(trainer.model)
    trainer.fit()
    assert not drops_of(trainer.model)
    last = [rates[BRANCHES[1]] for rates in noting.rates]
    assert last == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4])
    assert [rates[BRANCHES[0]] for rates in noting.rates] == pytest.approx([p / 2 for p in last])
    trainer.fit("1ep")
    assert len(noting.rates) == 12
    assert noting.rates[-1] == pytest.approx({BRANCHES[0]: 0.2, BRANCHES[1]: 0.4})


def test_after_an_error_nothing_is_dropped_any_more() -> None:
    class Failing(Algorithm):
        events = frozenset({Event.AFTER_STEP})

        def on(self, event: Event, state: State) -> None:
            assert drops_of(state.model)
            raise KeyboardInterrupt

    trainer = make_trainer([StochasticDepth(branches=BRANCHES), Failing()])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert not drops_of(trainer.model)


def test_the_branches_of_a_task_are_found_by_its_first_batch() -> None:
    noting = Noting()
    trainer = make_trainer([StochasticDepth(distribution="uniform"), noting], max_duration="1ba")
    counted = trainer.model.get_buffer("model.bn1.num_batches_tracked")
    assert int(counted) == 0  # looked at in evaluation mode
    trainer.fit()
    assert noting.rates == [{name: 0.2 for name in BRANCHES}]


def test_the_branches_of_a_model_with_a_loss_function_are_found() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"])

    def make(*algorithms: Algorithm) -> Trainer:
        batch = {"x": torch.rand(4, 1, 8, 8), "y": torch.tensor([0, 1, 2, 3])}
        return Trainer(
            TinyResNet(width=4),
            step,
            train_dataloader=[batch],
            algorithms=algorithms,
            max_duration="1ep",
        )

    noting = Noting()
    make(StochasticDepth(), noting).fit()
    assert noting.rates == [dict(zip(NAMES, (0.1, 0.2), strict=True))]
    inputs = ModelInputs((torch.zeros(1, 1, 8, 8),))
    make(StochasticDepth(inputs=inputs), noting).fit()
    assert noting.rates[1] == noting.rates[0]


def test_inputs_are_those_of_the_network_in_a_task() -> None:
    noting, inputs = Noting(), ModelInputs((torch.zeros(1, 3, 8, 8),))
    task = ClassifierTask(TinyResNet(num_classes=4, width=4, in_channels=3))
    make_trainer([StochasticDepth(inputs=inputs), noting], task=task, max_duration="1ba").fit()
    assert list(noting.rates[0]) == list(BRANCHES)


def test_what_takes_the_place_of_a_branch_is_dropped_as_well() -> None:
    class Replacing(Algorithm):
        events = frozenset({Event.BATCH_END})

        def on(self, event: Event, state: State) -> None:
            if state.clock.batch == 2:
                new = nn.BatchNorm2d(4)
                state.edit(lambda model: surgery.replace(model, BRANCHES[0], new))

    noting = Noting()
    make_trainer([StochasticDepth(branches=BRANCHES), Replacing(), noting]).fit()
    assert noting.rates == [dict(zip(BRANCHES, (0.1, 0.2), strict=True))] * 8


def test_a_window_is_refused() -> None:
    depth = StochasticDepth(branches=BRANCHES)
    depth.window = Window.parse("0dur", "0.5dur")
    with pytest.raises(ConfigError, match=r"has a window.*set `drop_rate` and `warmup`"):
        make_trainer([depth])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"drop_rate": 1.0}, "drop_rate=1.0"),
        ({"mode": "rows"}, "mode 'rows'.*row"),
        ({"distribution": "line"}, "distribution 'line'.*linear"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        StochasticDepth(**options)
    with pytest.raises(ConfigError, match=named):
        apply_stochastic_depth(TinyResNet(width=4), NAMES, **options)


def test_an_unknown_branch_is_named_before_anything_is_done() -> None:
    model = TinyResNet(width=4)
    with pytest.raises(SurgeryError, match="layer9"):
        apply_stochastic_depth(model, [*NAMES, "layer9"])
    assert not drops_of(model)
    with pytest.raises(SurgeryError, match="no module"):
        make_trainer([StochasticDepth(branches=["model.layer9"])])
