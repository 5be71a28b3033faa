from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import DataError
from compressor.export.post_training import PostTraining
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.affine import fake_quantize
from compressor.quantization.corrections import learned
from compressor.quantization.corrections.biases import correct_biases
from compressor.quantization.corrections.learned import Method, RoundingReport, round_weights
from compressor.quantization.corrections.walking import Walk, forward_of
from compressor.quantization.model import QuantizedModel
from compressor.quantization.plan import LayerFormat, TensorPlan
from compressor.quantization.scheme import Scheme

IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0)).abs()
PARTS = [ModelInputs((part,)) for part in IMAGES.split(10)]
LOW = LayerFormat(Scheme(3, signed=True, symmetric=True, axis=0))
BLOCKS = LayerFormat(Scheme(3, signed=True, symmetric=True, axis=0, block=4), "float")
BOTH: tuple[Method, ...] = ("gptq", "adaround")


class Net(nn.Module):
    """Dense, depthwise and linear layers; the last has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depth(self.stem(x).relu()).relu()
        return self.head(self.point(x).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def quantizer_of(model: nn.Module) -> PostTraining:
    return PostTraining(model, ModelInputs((IMAGES[:2],)), PARTS)


def rounded(
    quantizer: PostTraining,
    methods: Collection[Method],
    form: LayerFormat | dict[str, LayerFormat] = LOW,
    parts: list[ModelInputs] = PARTS,
    **options: Any,
) -> RoundingReport:
    return round_weights(
        quantizer.graph,
        quantizer.plan(form if isinstance(form, dict) else dict.fromkeys(quantizer.layers, form)),
        copy.deepcopy(quantizer.graph.module),
        parts,
        methods,
        generator=torch.Generator().manual_seed(0),
        iterations=50,
        **options,
    )


def output_error(model: nn.Module, expected: Tensor) -> float:
    with torch.no_grad():
        return float((model(IMAGES) - expected).square().mean())


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        (BOTH, {"stem": "gptq", "depth": "adaround", "point": "gptq", "head": "gptq"}),
        (("gptq",), {"stem": "gptq", "point": "gptq", "head": "gptq"}),
        (("adaround",), dict.fromkeys(["stem", "depth", "point", "head"], "adaround")),
    ],
)
def test_rounded_weights_are_better_than_nearest_and_lie_on_the_grid(
    net: nn.Module, methods: Collection[Method], expected: dict[str, str]
) -> None:
    nearest = quantizer_of(net)
    formats = dict.fromkeys(nearest.layers, LOW)
    before = output_error(nearest.simulate(formats), net(IMAGES).detach())
    quantizer = quantizer_of(net)
    report = rounded(quantizer, methods)
    assert report.methods == expected
    assert report.left == ()
    for path, tensor in report.plan.weights.items():
        if path.partition(".")[0] in expected:
            weight = quantizer.graph.tensor(path).detach()
            again = fake_quantize(weight, tensor.scale, tensor.zero_point, tensor.scheme)
            torch.testing.assert_close(again, weight, rtol=1e-6, atol=0)
    quantizer.weights.update(report.plan.weights)
    after = output_error(quantizer.simulate(formats), net(IMAGES).detach())
    assert after < before


@pytest.mark.parametrize("method", BOTH)
def test_no_layer_is_farther_from_its_outputs_than_to_nearest(
    net: nn.Module, method: Method
) -> None:
    quantizer = quantizer_of(net)
    reference = copy.deepcopy(quantizer.graph.module)
    plan = rounded(quantizer, [method]).plan
    walks = Walk(reference, PARTS), Walk(QuantizedModel(quantizer.graph, plan).graph, PARTS)
    for product in quantizer.graph.products:
        tensor = plan.weights[product.weight]
        float_weight = reference.get_parameter(product.weight).detach()
        bias = None if product.bias is None else reference.get_parameter(product.bias).detach()
        nearest = fake_quantize(float_weight, tensor.scale, tensor.zero_point, tensor.scheme)
        forward = forward_of(product, tail=method == "adaround")
        errors = [0.0, 0.0]
        for expected, actual in zip(
            walks[0].inputs(product), walks[1].inputs(product), strict=True
        ):
            source = actual if method == "gptq" else expected
            wanted = forward(source, float_weight, bias)
            for place, weight in enumerate((quantizer.graph.tensor(product.weight), nearest)):
                difference = forward(actual, weight.detach(), bias) - wanted
                errors[place] += float(difference.square().sum())
        assert errors[0] <= errors[1] * (1 + 1e-6)


def test_gptq_chooses_the_scales_of_blocks_and_the_plan_has_them(net: nn.Module) -> None:
    quantizer = quantizer_of(net)
    formats = {"stem": LOW, "head": BLOCKS}
    before = quantizer.plan(formats).weights["head.weight"]
    after = rounded(quantizer, ["gptq"], formats).plan.weights["head.weight"]
    assert not torch.equal(before.scale, after.scale)
    weight = quantizer.graph.tensor("head.weight").detach()
    again = fake_quantize(weight, after.scale, after.zero_point, after.scheme)
    torch.testing.assert_close(again, weight, rtol=1e-6, atol=0)


def test_what_the_time_is_not_enough_for_is_left_as_it_was(net: nn.Module) -> None:
    quantizer = quantizer_of(net)
    before = quantizer.graph.tensor("head.weight").detach().clone()
    ticks: Iterator[int] = count()
    report = rounded(quantizer, BOTH, seconds=8, clock=lambda: float(next(ticks)))
    assert "stem" in report.methods
    assert report.left
    assert "head" in report.left
    assert torch.equal(quantizer.graph.tensor("head.weight"), before)


def test_the_same_seed_rounds_the_same(net: nn.Module) -> None:
    quantizers = quantizer_of(net), quantizer_of(net)
    for quantizer in quantizers:
        rounded(quantizer, ["adaround"])
    for first, second in zip(
        quantizers[0].model.parameters(), quantizers[1].model.parameters(), strict=True
    ):
        assert torch.equal(first, second)


def test_little_memory_means_fewer_samples(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "LAYER_BYTES", 1)
    monkeypatch.setattr(learned, "PATCH_BYTES", 1)
    monkeypatch.setattr(learned, "LEAST_ROWS", 30)
    quantizer = quantizer_of(net)
    nearest = output_error(
        quantizer.simulate(dict.fromkeys(quantizer.layers, LOW)), net(IMAGES).detach()
    )
    quantizer.weights.update(rounded(quantizer, BOTH).plan.weights)
    after = quantizer.simulate(dict.fromkeys(quantizer.layers, LOW))
    assert output_error(after, net(IMAGES).detach()) < nearest


def test_patches_are_what_a_convolution_multiplies() -> None:
    quantizer = quantizer_of(Net())
    stem = quantizer.graph.products[0]
    weight = quantizer.graph.tensor("stem.weight").detach()
    patches = learned._patches(stem, IMAGES, weight)
    expected = nn.functional.unfold(IMAGES, 3, padding=1, stride=2)
    torch.testing.assert_close(patches.flatten(2), expected)


def test_values_that_are_not_finite_are_an_error_that_names_the_layer(net: nn.Module) -> None:
    bad = [ModelInputs((IMAGES * float("nan"),))]
    quantizer = quantizer_of(net)
    for methods in (["gptq"], ["adaround"]):
        with pytest.raises(DataError, match="'stem'"):
            rounded(quantizer, methods, parts=bad)  # type: ignore[arg-type]
    plan = quantizer.plan(dict.fromkeys(quantizer.layers, LOW))
    with pytest.raises(DataError, match="'stem'"):
        correct_biases(quantizer.graph, plan, copy.deepcopy(quantizer.graph.module), bad)


def test_corrected_biases_leave_no_mean_error_in_any_channel(net: nn.Module) -> None:
    quantizer = quantizer_of(net)
    reference = copy.deepcopy(quantizer.graph.module)
    plan = quantizer.plan(dict.fromkeys(quantizer.layers, LOW))
    names = ["stem", "depth", "point"]
    assert correct_biases(quantizer.graph, plan, reference, PARTS) == names, "head has no bias"
    model = QuantizedModel(quantizer.graph, plan)
    for name in names:
        means = []
        for module in (reference, model.graph):
            node = next(node for node in module.graph.nodes if node.name == _node(quantizer, name))
            part = copy.deepcopy(module)
            copied = next(item for item in part.graph.nodes if item.name == node.name)
            seen: list[Tensor] = []
            tap = _Tap(seen)
            part.add_module("tap", tap)
            with part.graph.inserting_after(copied):
                part.graph.call_module("tap", (copied,))
            part.recompile()
            with torch.no_grad():
                part(IMAGES)
            means.append(seen[0].mean((0, 2, 3)))
        # the bias is in whole steps of the products
        torch.testing.assert_close(means[0], means[1], rtol=0, atol=2e-3)


class _Tap(nn.Module):
    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x


def _node(quantizer: PostTraining, layer: str) -> str:
    return next(p.node.name for p in quantizer.graph.products if p.layer == layer)


def test_a_fixed_scale_is_for_its_scheme_only(net: nn.Module) -> None:
    quantizer = quantizer_of(net)
    plan = quantizer.plan({"head": LOW}).weights["head.weight"]
    quantizer.weights["head.weight"] = TensorPlan(plan.scheme, plan.scale * 2, plan.zero_point)
    same = quantizer.plan({"head": LOW}).weights["head.weight"]
    other = quantizer.plan({"head": LayerFormat()}).weights["head.weight"]
    assert torch.equal(same.scale, plan.scale * 2)
    assert torch.allclose(other.scale, plan.scale * 3 / 127)
