from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import compressor
from compressor.errors import ConfigError
from compressor.export.post_training import PostTraining
from compressor.export.qdq import export_quantized, integer_kernels
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.affine import fake_quantize, parameters_of_range
from compressor.quantization.aware import MOST_GRADIENT, MOST_GROWTH, QuantizationAwareTraining
from compressor.quantization.model import BiasQuantizer, QuantizedModel, Quantizer
from compressor.quantization.plan import DYNAMIC_INT8, STATIC_INT8, LayerFormat, TensorPlan
from compressor.quantization.scheme import ACTIVATION, WEIGHT, Scheme
from compressor.training import Algorithm, Event, State, Trainer
from compressor.training.algorithms import EMA, Distillation, GradientClipping, HoldMasks
from tests.training.algorithms import test_every_algorithm as contract
from tests.training.algorithms.settings import Case, Images, make_images
from tests.training.helpers import are_equal, weights_of

W4 = LayerFormat(WEIGHT.with_bits(4))
IMAGES = torch.cat([batch[0] for batch in make_images()])


@cache
def calibrated() -> PostTraining:
    """The net of `Images`, with a ReLU6."""
    net = Images().model
    net[5] = nn.ReLU6()
    return PostTraining(net, ModelInputs((IMAGES[:2],)), [ModelInputs((IMAGES,))])


@cache
def simulated(form: LayerFormat) -> QuantizedModel:
    return calibrated().simulate(dict.fromkeys(calibrated().layers, form))


def make_model(form: LayerFormat = W4) -> QuantizedModel:
    return copy.deepcopy(simulated(form))


def make_task() -> Images:
    task = Images()
    task.model = make_model()
    return task


def make_aware(**options: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining("0.3dur", "0.7dur", **options)


CASE = Case(make_aware, make_task, is_surgery=True)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def make_trainer(*algorithms: Algorithm, model: nn.Module | None = None, **options: Any) -> Trainer:
    options = {
        "train_dataloader": make_images(),
        "optimizers": {"name": "SGD", "lr": 0.05, "momentum": 0.9},
        "max_duration": "2ep",
        **options,
    }
    return Trainer(
        model or make_model(), cross_entropy, algorithms=algorithms or [make_aware()], **options
    )


def quantizers_of(trainer: Trainer, kind: str) -> list[Quantizer]:
    found = trainer.model.quantizers()
    return [quantizer for (own, _), quantizer in found.items() if own == kind]


def make_rows(*layers: nn.Module) -> tuple[PostTraining, list[tuple[Tensor, Tensor]]]:
    """Layers that read 8 features, and what they are trained on."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 8, generator=generator)
    for layer in layers:
        for parameter in layer.parameters():
            parameter.data = torch.rand(parameter.shape, generator=generator) - 0.5
    quantizer = PostTraining(nn.Sequential(*layers), ModelInputs((x[:2],)), [ModelInputs((x,))])
    return quantizer, [(x, x[:, :4].argmax(1))] * 4


class Watch(Algorithm):
    """Notes what a function gives after each batch."""

    events = frozenset({Event.BATCH_END})

    def __init__(self, note: Any) -> None:
        self.note = note
        self.noted: list[Any] = []

    def on(self, event: Event, state: State) -> None:
        self.noted.append(self.note(state))


def test_it_is_an_algorithm_as_others_are() -> None:
    contract.test_it_has_a_card_and_a_function(CASE)
    contract.test_it_trains_and_then_trains_on(CASE)
    contract.test_its_order_holds_at_every_event_that_it_uses(CASE)
    contract.test_surgery_twice_is_surgery_once(CASE)


def test_epochs_and_the_same_number_of_batches_are_the_same() -> None:
    contract.test_epochs_and_the_same_number_of_batches_are_the_same(CASE)


def test_an_interrupted_fit_ends_bit_equal_in_every_stretch(tmp_path: Path) -> None:
    contract.test_an_interrupted_fit_ends_bit_equal(CASE, tmp_path)


@pytest.mark.parametrize("kind", ["w", "a"])
def test_a_step_of_sgd_is_that_of_the_paper(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, direction = torch.randn(2, 6, 5, generator=generator)
    scheme = Scheme(4, signed=True, symmetric=True, axis=0 if kind == "w" else None)
    scale = torch.linspace(0.1, 0.3, 6) if kind == "w" else torch.tensor(0.2)
    quantizer = Quantizer(TensorPlan(scheme, scale, torch.zeros_like(scale).int()), (kind, ""))
    quantizer.learn_scale()
    optimizer = torch.optim.SGD([quantizer.growth], lr=1e-4)
    (quantizer(x) * direction).sum().backward()
    optimizer.step()

    steps = x / (scale[:, None] if kind == "w" else scale)
    inner = steps.round() - steps  # equation 3, then section 2.2
    gradient = direction * torch.where(steps.abs() < 7, inner, steps.sign() * 7)
    gradient = gradient.sum(1) if kind == "w" else gradient.sum()
    expected = scale - 1e-4 * gradient / (5 * 7) ** 0.5
    # the exponential has a second order
    torch.testing.assert_close(quantizer.scale - scale, expected - scale, rtol=0.01, atol=1e-8)


def test_a_scale_that_is_not_trained_yet_is_the_plans_bit_for_bit() -> None:
    model, trained = make_model(), make_model()
    for quantizer in trained.quantizers().values():
        quantizer.learn_scale()
    assert torch.equal(model(IMAGES), trained(IMAGES))


def test_a_channel_of_almost_nothing_does_not_outweigh_the_others() -> None:
    weight = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    weight[0] *= 1e-30
    scale = weight.abs().amax(1) / 7
    scheme = Scheme(4, signed=True, symmetric=True, axis=0)
    quantizer = Quantizer(TensorPlan(scheme, scale, torch.zeros(2).int()), ("w", ""))
    quantizer.learn_scale()
    (quantizer(weight) * weight.sign()).sum().backward()
    assert quantizer.growth.grad[0].abs() < quantizer.growth.grad[1].abs() / 1000


def test_micro_batches_are_the_same_as_whole_ones() -> None:
    contract.test_micro_batches_are_the_same_as_whole_ones(CASE)


def test_ranges_follow_the_data_until_the_end_of_observation() -> None:
    torch.manual_seed(0)
    loader = list(make_images())

    def numbers(state: State) -> tuple[float, int]:
        quantizer = state.model.quantizers()["a", "input_1"]
        return quantizer.scale.item(), quantizer.zero_point.item()

    watch = Watch(numbers)
    aware = QuantizationAwareTraining("3ba", momentum=1.0)
    make_trainer(aware, watch, train_dataloader=loader, max_duration="8ba").fit()
    for batch, noted in zip(loader[:3], watch.noted, strict=False):
        low, high = torch.aminmax(batch[0])
        scale, zero_point = parameters_of_range(low, high, ACTIVATION)
        assert noted == (scale.item(), zero_point.item())
    assert {zero_point for _, zero_point in watch.noted[2:]} == {watch.noted[2][1]}
    assert watch.noted[7][0] != watch.noted[2][0], "it is trained from then on"


def test_without_observation_ranges_begin_as_calibrated() -> None:
    trainer = make_trainer(QuantizationAwareTraining("0dur"))
    before = [each.step.clone() for each in quantizers_of(trainer, "a")]
    trainer.fit()
    after = quantizers_of(trainer, "a")
    assert all(torch.equal(a, b.step) for a, b in zip(before, after, strict=True))
    assert any(not torch.equal(each.scale, each.step) for each in after)


def test_evaluation_is_not_observed() -> None:
    far = [(100 * IMAGES, torch.zeros(len(IMAGES), dtype=torch.long))]
    plain = make_trainer(make_aware())
    with_evaluation = make_trainer(
        make_aware(),
        eval_dataloader=compressor.training.Evaluator(
            function=lambda model: {"loss": cross_entropy(model, far[0]).item()}
        ),
        eval_interval="1ba",
    )
    plain.fit()
    with_evaluation.fit()
    assert are_equal(weights_of(plain.model), weights_of(with_evaluation.model))


def test_scales_of_weights_are_trained_first_and_all_rest_at_the_end() -> None:
    def scales(kind: str) -> Watch:
        watch = Watch(
            lambda state: torch.cat(
                [q.growth.detach().flatten().clone() for q in of_kind(state.model, kind)]
            )
        )
        watch.key = kind
        return watch

    def of_kind(model: QuantizedModel, kind: str) -> Iterator[Quantizer]:
        return (q for (own, _), q in model.quantizers().items() if own == kind)

    weights, values = scales("w"), scales("a")
    conv = Watch(lambda state: state.model.graph.get_parameter("4.weight").detach().clone())
    conv.key = "conv"
    trainer = make_trainer(QuantizationAwareTraining("3ba", "6ba"), weights, values, conv)
    trainer.fit()
    assert weights.noted[0].any()
    assert not values.noted[2].any()
    assert values.noted[3].any()
    for watch in (weights, values):
        assert not torch.equal(watch.noted[4], watch.noted[5])
        assert torch.equal(watch.noted[5], watch.noted[7])
    assert not torch.equal(conv.noted[6], conv.noted[7])
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_batch_norms_beside_the_graph_rest_with_the_scales() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.quantized = nn.BatchNorm2d(3), make_model()

        def forward(self, x: Tensor) -> Tensor:
            return self.quantized(self.norm(x))

    watch = Watch(lambda state: state.model.norm.running_mean.clone())
    trainer = make_trainer(QuantizationAwareTraining("0dur", "3ba"), watch, model=Normed())
    trainer.fit()
    assert not torch.equal(watch.noted[1], watch.noted[2])
    assert torch.equal(watch.noted[2], watch.noted[7])
    assert trainer.model.norm.training


def test_scales_stay_in_bounds_whatever_the_learning_rate() -> None:
    trainer = make_trainer(
        QuantizationAwareTraining("0dur"), optimizers={"name": "Adam", "lr": 1.0}
    )
    trainer.fit()
    growths = torch.cat([q.growth.flatten() for q in trainer.model.quantizers().values()])
    assert growths.abs().max() == torch.tensor(MOST_GROWTH)


def test_integers_go_on_ending_within_a_relu6() -> None:
    class Outward(Algorithm):
        """Every scale would grow."""

        events = frozenset({Event.BEFORE_STEP})

        def on(self, event: Event, state: State) -> None:
            for quantizer in state.model.quantizers().values():
                quantizer.growth.grad = -torch.ones_like(quantizer.growth)

    trainer = make_trainer(QuantizationAwareTraining("0dur", "1dur"), Outward())
    clipped = trainer.model.quantizers()["a", "hardtanh"]
    trainer.fit()
    assert clipped.scale * 255 <= 6
    assert torch.equal(clipped.scale, clipped.step)
    others = [q for q in quantizers_of(trainer, "a") if q is not clipped]
    assert all(quantizer.scale > quantizer.step for quantizer in others)


def test_a_bias_is_in_steps_of_both_scales_as_they_are_now() -> None:
    source = Quantizer(TensorPlan(ACTIVATION, torch.tensor(0.5), torch.tensor(3).int()))
    weight = Quantizer(
        TensorPlan(WEIGHT, torch.tensor([0.1, 0.2]), torch.zeros(2).int()), ("w", "")
    )
    bias = BiasQuantizer(source, weight)
    assert not list(bias.parameters())
    weight.learn_scale()
    weight.growth.data = torch.tensor([2.0, 4.0]).log()
    torch.testing.assert_close(bias.scale, torch.tensor([0.1, 0.4]))
    values = torch.tensor([0.26, -0.7], requires_grad=True)
    assert bias.integers(values).tolist() == [3, -2]
    rounded = bias(values)
    torch.testing.assert_close(rounded, torch.tensor([0.3, -0.8]))
    rounded.sum().backward()
    assert values.grad.tolist() == [1.0, 1.0]
    assert bias.integers(torch.tensor([1e12, -1e12])).tolist() == [2**31 - 1, -(2**31)]


def test_a_copy_has_bias_steps_of_its_own_scales() -> None:
    model = make_model()
    copied = copy.deepcopy(model)
    expected = copied(IMAGES)
    for quantizer in model.quantizers().values():
        quantizer.step *= 2
    assert torch.equal(copied(IMAGES), expected)


def test_what_is_trained_are_the_parameters_of_the_float_model() -> None:
    quantizer, data = make_rows(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    model = quantizer.simulate(dict.fromkeys(quantizer.layers, STATIC_INT8))
    before = quantizer.model(data[0][0]).detach()
    make_trainer(model=model, train_dataloader=data).fit()
    own = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in own for parameter in quantizer.model.parameters())
    assert not torch.allclose(quantizer.model(data[0][0]), before)


def test_the_plan_after_training_is_what_was_trained() -> None:
    quantizer, data = make_rows(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    model = quantizer.simulate(dict.fromkeys(quantizer.layers, STATIC_INT8))
    make_trainer(model=model, train_dataloader=data).fit()
    plan = model.plan()
    again = QuantizedModel(quantizer.graph, plan)
    assert torch.equal(again(data[0][0]), model(data[0][0]))
    growth = model.quantizers()["w", "0.weight"].growth
    assert growth.any()
    kept = plan.weights["0.weight"].scale.clone()
    growth.data += 1
    assert torch.equal(plan.weights["0.weight"].scale, kept), "a plan is no view"


def test_it_learns_from_the_float_reference_without_labels() -> None:
    reference = copy.deepcopy(calibrated().model)

    def distance(model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            return (model(IMAGES) - reference(IMAGES)).square().mean().item()

    trainer = make_trainer(
        QuantizationAwareTraining(),
        Distillation(reference, weight=1.0, task_weight=0.0),
        max_duration="20ep",
        optimizers={"name": "Adam", "lr": 0.002},
    )
    before = distance(trainer.model)
    trainer.fit()
    assert distance(trainer.model) < before / 2
    assert "train/distillation" in trainer.state.train_metrics


@pytest.mark.slow
def test_a_pruned_model_is_trained_as_it_is() -> None:
    pruned = compressor.prune(Images().model.eval(), IMAGES[:2], kept_fraction=0.5).model
    quantizer = PostTraining(pruned, ModelInputs((IMAGES[:2],)), [ModelInputs((IMAGES,))])
    model = quantizer.simulate(dict.fromkeys(quantizer.layers, W4))
    before = weights_of(quantizer.model)
    make_trainer(model=model).fit()
    after = weights_of(quantizer.model)
    assert before["4.weight"].shape == (8, 4, 3, 3)
    assert {name: value.shape for name, value in before.items()} == {
        name: value.shape for name, value in after.items()
    }
    assert not are_equal(before, after)


def test_a_factorised_layer_is_trained_as_two() -> None:
    layers = nn.Linear(8, 2, bias=False), nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4)
    quantizer, data = make_rows(*layers)
    model = quantizer.simulate(dict.fromkeys(quantizer.layers, STATIC_INT8))
    trainer = make_trainer(model=model, train_dataloader=data)
    trainer.fit()
    assert len(quantizers_of(trainer, "w")) == 3
    assert all(quantizer.growth.any() for quantizer in quantizers_of(trainer, "w"))


def test_zeros_that_are_held_stay_zeros() -> None:
    model = make_model()
    weight = model.graph.get_parameter("4.weight")
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    weight.data *= mask
    make_trainer(make_aware(), HoldMasks(masks={"graph.4": mask}), model=model).fit()
    assert torch.equal(weight != 0, mask)
    rounded = model.quantizers()["w", "4.weight"](weight)
    assert not rounded[~mask].any()


def test_only_the_weight_is_trained_of_a_dynamic_layer() -> None:
    kinds = calibrated().graph.kinds
    linear = [name for name, kind in kinds.items() if kind == "linear"]
    model = calibrated().simulate(dict.fromkeys(linear, DYNAMIC_INT8))
    trainer = make_trainer(make_aware(), model=copy.deepcopy(model))
    trainer.fit()
    assert not quantizers_of(trainer, "a")
    assert all(quantizer.growth.any() for quantizer in quantizers_of(trainer, "w"))


def test_rounding_is_in_float32_within_autocast() -> None:
    quantizer = make_model(STATIC_INT8).quantizers()["a", "input_1"]
    quantizer.learn_scale()
    half = IMAGES.bfloat16()
    expected = fake_quantize(half.float(), quantizer.scale, quantizer.zero_point, ACTIVATION)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(half), expected.bfloat16())


def test_bf16_trains_to_about_the_same() -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        trainer = make_trainer(make_aware(), precision=precision, max_duration="6ep")
        trainer.fit()
        losses[precision] = trainer.state.train_metrics["train/loss"]
        assert all(value.isfinite().all() for value in weights_of(trainer.model).values())
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.2)


def test_a_step_that_overflowed_is_not_observed() -> None:
    quantizer = make_model().quantizers()["a", "input_1"]
    quantizer.follow_range()
    before = quantizer.plan()
    for extremes, momentum in (([-1.0, float("inf")], 0.5), ([-50.0, 50.0], 0.0)):
        quantizer.extremes.copy_(torch.tensor(extremes))
        quantizer.take_range(momentum)
        assert not quantizer.extremes.any()
        assert torch.equal(quantizer.scale, before.scale)


def test_an_average_has_the_average_of_the_scales() -> None:
    growth = Watch(lambda state: state.model.quantizers()["w", "4.weight"].growth.detach().clone())
    trainer = make_trainer(QuantizationAwareTraining("0dur"), EMA(0.5, period=1e-9), growth)
    trainer.fit()
    expected = torch.zeros_like(growth.noted[0])
    for noted in growth.noted:
        expected = 0.5 * expected + 0.5 * noted
    kept = trainer.model.quantizers()["w", "4.weight"].growth
    torch.testing.assert_close(kept.detach(), expected)
    assert trainer.model(IMAGES).isfinite().all()


def test_gradients_of_scales_are_bounded_and_then_clipped_with_all() -> None:
    class Norms(Algorithm):
        events = frozenset({Event.BEFORE_STEP})

        def __init__(self, key: str, after: str) -> None:
            self.key, self.after = key, (after,)
            self.noted: list[tuple[float, float]] = []

        def on(self, event: Event, state: State) -> None:
            growths = [q.growth.grad for q in state.model.quantizers().values()]
            gradients = [p.grad.flatten() for p in state.model.parameters() if p.grad is not None]
            largest = max(g.abs().max().item() for g in growths if g is not None)
            self.noted.append((largest, torch.cat(gradients).norm().item()))

    bounded = Norms("bounded", "QuantizationAwareTraining")
    bounded.before = ("GradientClipping",)
    clipped = Norms("clipped", "GradientClipping")
    aware = QuantizationAwareTraining("0dur", "1dur")
    make_trainer(aware, GradientClipping(0.01), bounded, clipped).fit()
    assert max(largest for largest, _ in bounded.noted) == pytest.approx(MOST_GRADIENT)
    assert all(norm == pytest.approx(0.01, rel=1e-3) for _, norm in clipped.noted)


def test_an_optimizer_of_the_users_own_steps_the_scales_too() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer = make_trainer(make_aware(), model=model, optimizers=optimizer)
    trainer.fit()
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert stepped == {id(parameter) for parameter in model.parameters()}
    assert all(quantizer.growth.any() for quantizer in quantizers_of(trainer, "w"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantizationAwareTraining(momentum=0.0), "momentum=0.0 is no part"),
        (lambda: QuantizationAwareTraining("0.9dur", "0.1dur"), "never opens. Swap"),
        (lambda: make_trainer(model=Images()), "no quantizers to train"),
    ],
)
def test_what_cannot_be_meant_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_window_is_refused() -> None:
    aware = make_aware()
    aware.window = compressor.training.Window.parse("0.1dur", "0.5dur")
    with pytest.raises(ConfigError, match="`observe_until` and `freeze_from`"):
        make_trainer(aware)


@pytest.mark.slow
def test_the_file_computes_what_was_trained(tmp_path: Path) -> None:
    trainer = make_trainer(model=make_model(STATIC_INT8), max_duration="4ep")
    trainer.fit()
    model = trainer.model.eval()
    path = export_quantized(model, ModelInputs((IMAGES[:2],)), tmp_path / "q.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    actual = session.run(None, {"input": IMAGES.numpy()})[0]
    with torch.no_grad():
        expected = model(IMAGES).numpy()
    assert any(q.growth.any() for q in model.quantizers().values())
    # rounding of a tie may differ by one step of one value in float sums of another order
    np.testing.assert_allclose(actual, expected, atol=0.01 * np.abs(expected).max())
    kernels = integer_kernels(path)
    assert kernels["QLinearConv"] == 2
    assert not kernels.keys() & {"Conv", "Clip", "Relu"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer", [{"name": "Adam", "lr": 0.002}, {"name": "SGD", "lr": 0.003, "momentum": 0.9}]
)
def test_it_regains_what_rounding_to_four_bits_lost(optimizer: dict[str, Any]) -> None:
    model, train, test = trained_digits()
    quantizer = PostTraining(
        model, ModelInputs((train.tensors[0][:2],)), [ModelInputs((train.tensors[0][:256],))]
    )
    form = LayerFormat(Scheme(4, signed=True, symmetric=True))  # one scale for all channels
    rounded = quantizer.simulate(dict.fromkeys(quantizer.layers, form))
    reached, lost = accuracy(model, test), accuracy(rounded, test)
    assert lost < reached - 0.3
    loader = DataLoader(train, batch_size=48, shuffle=True)
    aware = QuantizationAwareTraining()
    make_trainer(
        aware, model=rounded, train_dataloader=loader, optimizers=optimizer, max_duration="6ep"
    ).fit()
    assert accuracy(rounded, test) > reached - (reached - lost) / 4


@cache
def trained_digits() -> tuple[nn.Module, TensorDataset, TensorDataset]:
    """A separable net at 0.96 on scans of digits, and these, halves apart by writers."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    train, test = TensorDataset(x[:1200], y[:1200]), TensorDataset(x[1200:], y[1200:])

    def convolution(read: int, written: int, size: int, groups: int = 1) -> nn.Sequential:
        layer = nn.Conv2d(read, written, size, padding=size // 2, groups=groups, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(written), nn.ReLU6())

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            convolution(1, 8, 3),
            convolution(8, 8, 3, groups=8),
            convolution(8, 16, 1),
            nn.MaxPool2d(2),
            convolution(16, 16, 3, groups=16),
            convolution(16, 16, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 10),
        )
    Trainer(
        net,
        cross_entropy,
        train_dataloader=DataLoader(train, batch_size=48, shuffle=True),
        optimizers={"name": "Adam", "lr": 0.01},
        max_duration="20ep",
    ).fit()
    return net.eval(), train, test


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    x, y = data.tensors
    model.eval()
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()
