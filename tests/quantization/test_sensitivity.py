"""Damages against models that are made with one quantizer, and run whole."""

from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.errors import DataError, MetricError, ModelError
from compressor.export.post_training import PostTraining
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.model import DynamicQuantizer, QuantizedModel, Quantizer
from compressor.quantization.plan import DYNAMIC_INT8, STATIC_INT8, WEIGHT_INT8, LayerFormat
from compressor.quantization.sensitivity import (
    CACHE,
    Key,
    layers_by_damage,
    metric_sensitivity,
    only,
    quantizer_sensitivity,
)

IMAGES = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FACTOR = torch.tensor([[0.5]])


class Net(nn.Module):
    """Two readers of one value, a sum, what moves values, a keyword and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 1)
        self.body = nn.Linear(8, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor, factor: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.left(x) + self.right(x)).relu()
        x = nn.functional.max_pool2d(x, 2).mean((2, 3)) * factor
        return self.head(self.body(x).relu())


def calls(size: int = 4) -> list[ModelInputs]:
    return [ModelInputs((part,), {"factor": FACTOR}) for part in IMAGES.split(size)]


def quantize(net: nn.Module, formats: dict[str, LayerFormat]) -> QuantizedModel:
    quantizer = PostTraining(net, calls()[0], calls())
    names = quantizer.layers
    return quantizer.simulate({name: formats.get(name, STATIC_INT8) for name in names}).eval()


@pytest.fixture(scope="module")
def model() -> QuantizedModel:
    torch.manual_seed(0)
    return quantize(Net(), {"body": DYNAMIC_INT8, "head": WEIGHT_INT8})


def with_one(model: QuantizedModel, key: Key | None) -> nn.Module:
    """A copy in which all other quantizers give back what they are given."""
    copied = copy.deepcopy(model)
    for node in copied.graph.graph.nodes:
        if node.op == "call_module":
            module = copied.graph.get_submodule(node.target)
            mine = module.key if isinstance(module, Quantizer) else None
            if isinstance(module, DynamicQuantizer):
                mine = ("a", node.args[0].name)
            if key is None or mine != key:
                module.forward = lambda x: x
    return copied


def relative_square(model: nn.Module, reference: nn.Module) -> float:
    total = 0.0
    for call in calls():
        ours, theirs = call.call(model).double(), call.call(reference).double()
        total += call.batch_size * float((ours - theirs).square().mean() / theirs.square().mean())
    return total / len(IMAGES)


class CountCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))

    @property
    def convolutions(self) -> int:
        return self.counts[torch.ops.aten.convolution.default]


@torch.no_grad()
def test_a_damage_is_that_of_the_model_with_one_quantizer(model: QuantizedModel) -> None:
    found = quantizer_sensitivity(model, calls())
    kinds = Counter(kind for kind, _ in found)
    assert kinds["w"] == 5
    assert kinds["a"] >= 5, "image, stem, both branches or their sum, and what the body reads"
    reference = with_one(model, None)
    for key, damage in found.items():
        assert damage == pytest.approx(relative_square(with_one(model, key), reference), rel=1e-6)
        assert damage > 0
    values = [name for kind, name in found if kind == "a"]
    assert any(name.startswith("mul") for name in values), "the body has a range in each call"


def test_keys_come_in_the_order_in_which_they_run(model: QuantizedModel) -> None:
    weights = [name for kind, name in quantizer_sensitivity(model, calls()) if kind == "w"]
    assert weights == [f"{name}.weight" for name in ("stem", "left", "right", "body", "head")]


def test_logits_are_compared_by_their_divergence(model: QuantizedModel) -> None:
    key = ("w", "head.weight")
    with torch.no_grad():
        reference = torch.cat([call.call(with_one(model, None)).double() for call in calls()])
        ours = torch.cat([call.call(with_one(model, key)).double() for call in calls()])
    expected = nn.functional.kl_div(
        ours.log_softmax(1), reference.log_softmax(1), log_target=True, reduction="batchmean"
    )
    found = quantizer_sensitivity(model, calls(), is_classifier=True)[key]
    assert found == pytest.approx(expected.item(), rel=1e-6)


def test_what_lies_before_a_quantizer_is_not_computed_again() -> None:
    """Of n layers in a row: the reference and the trunk n each, and the branches n (n + 1) / 2."""
    depth = 8
    chain = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(depth)))
    calls = [ModelInputs((IMAGES,))]
    quantizer = PostTraining(chain, calls[0], calls)
    model = quantizer.simulate(dict.fromkeys(quantizer.layers, WEIGHT_INT8)).eval()
    with CountCalls() as counted:
        quantizer_sensitivity(model, calls)
    assert counted.convolutions <= 2 * depth + depth * (depth + 1) // 2
    assert len(quantizer_sensitivity(model, calls)) == depth


def test_the_model_is_as_it_was(model: QuantizedModel) -> None:
    (call,) = calls(10)
    before = call.call(model)
    quantizer_sensitivity(model, calls())
    metric_sensitivity(model, lambda module: -float(call.call(module).abs().sum()))
    with only(model, [("w", "stem.weight")]):
        assert not torch.equal(call.call(model), before)
    assert torch.equal(call.call(model), before)
    assert {type(module) for module in model.quantizers().values()} == {Quantizer}


@torch.no_grad()
def test_a_metric_drops_by_what_it_is_worse_with_one_quantizer(model: QuantizedModel) -> None:
    reference = with_one(model, None)

    def evaluate(module: nn.Module) -> float:
        return -relative_square(module, reference)

    drops = metric_sensitivity(model, evaluate)
    assert drops == pytest.approx(quantizer_sensitivity(model, calls()), rel=1e-6)


def test_damages_are_kept_until_model_formats_or_inputs_change(
    model: QuantizedModel, tmp_path: Path
) -> None:
    def convolutions(model: QuantizedModel, inputs: list[ModelInputs], **options: Any) -> int:
        with CountCalls() as counted:
            damages = quantizer_sensitivity(model, inputs, folder=tmp_path, **options)
        assert damages == quantizer_sensitivity(model, inputs, **options)
        return counted.convolutions

    assert convolutions(model, calls())
    assert not convolutions(model, calls())
    assert convolutions(model, calls()[:1])
    assert convolutions(model, calls(), is_classifier=True)
    trained = copy.deepcopy(model)
    with torch.no_grad():
        next(trained.parameters()).mul_(1.1)
    assert convolutions(trained, calls())
    wider = copy.deepcopy(model)
    wider.quantizers()["a", "x"].step.mul_(2)
    assert convolutions(wider, calls())
    assert not convolutions(model, calls())
    assert list(tmp_path.iterdir()) == [tmp_path / CACHE]


def test_outputs_that_are_not_finite_are_infinite_damage() -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1, 1, bias=False)
            nn.init.ones_(self.linear.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).log()

    batches = [ModelInputs((torch.tensor([[1e-3], [1.0]]),))]
    quantizer = PostTraining(Log(), batches[0], batches)
    model = quantizer.simulate({"linear": STATIC_INT8}).eval()
    found = quantizer_sensitivity(model, batches)
    assert found["a", "x"] == math.inf, "the small one is rounded to zero"
    assert found["w", "linear.weight"] < 1e-3


class Shared(nn.Module):
    """Three layers read one value, a channel of which is huge and read by none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(6, 6)
        self.stem = nn.Linear(6, 6)
        self.readers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.after = nn.Linear(6, 6)
        with torch.no_grad():
            self.stem.bias[0] = 300.0
            for reader in self.readers:
                reader.weight[:, 0] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(self.before(x))
        return self.after(sum(reader(x) for reader in self.readers))


@pytest.fixture(scope="module")
def shared() -> tuple[PostTraining, list[ModelInputs]]:
    torch.manual_seed(0)
    calls = [ModelInputs((torch.randn(32, 6),))]
    return PostTraining(Shared(), calls[0], calls), calls


def test_the_readers_of_a_bad_activation_lie_side_by_side_and_first(
    shared: tuple[PostTraining, list[ModelInputs]],
) -> None:
    quantizer, calls = shared
    formats = dict.fromkeys(quantizer.layers, STATIC_INT8)
    damages = quantizer_sensitivity(quantizer.simulate(formats), calls)
    assert max(damages, key=lambda key: damages[key])[0] == "a"
    needs = {}
    for name in formats:
        plan = quantizer.plan({name: STATIC_INT8})
        needs[name] = [("w", w) for w in plan.weights] + [("a", a) for a in plan.activations]
    order = layers_by_damage(needs, damages)
    assert set(order[:3]) == {"readers.0", "readers.1", "readers.2"}


@torch.no_grad()
def test_the_damage_of_one_layer_has_that_of_what_it_reads(
    shared: tuple[PostTraining, list[ModelInputs]],
) -> None:
    """So the search, which leaves layers out by this order, begins with the same three."""
    quantizer, calls = shared

    def damage(name: str) -> float:
        outputs = calls[0].call(quantizer.simulate({name: STATIC_INT8}))
        return float((outputs - calls[0].call(quantizer.model)).square().mean())

    order = sorted(quantizer.layers, key=damage, reverse=True)
    assert set(order[:3]) == {"readers.0", "readers.1", "readers.2"}


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "high"])
def test_a_metric_that_is_no_finite_number_is_refused(model: QuantizedModel, value: Any) -> None:
    with pytest.raises(MetricError, match="not a finite number"):
        metric_sensitivity(model, lambda _: value)


def test_without_samples_there_is_no_damage(model: QuantizedModel) -> None:
    with pytest.raises(DataError, match="sample"):
        quantizer_sensitivity(model, [])


def test_a_model_in_float_has_no_quantizers_to_ask_about() -> None:
    model: Any = Net().eval()
    for ask in (quantizer_sensitivity, metric_sensitivity):
        with pytest.raises(ModelError, match=r"of type Net.*`module`"):
            ask(model, calls())
