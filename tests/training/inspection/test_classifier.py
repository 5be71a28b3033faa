"""One pass over a loader: right numbers, any form of batch, no trace."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import CompressorError, ConfigError, DataError, MetricError
from compressor.training.inspection import Inspection, inspect_classifier
from tests.training.inspection.helpers import CLASSES, make_loader, make_net, make_tensors


def inspect(net: nn.Module, loader: Any = None, **options: Any) -> Inspection:
    return inspect_classifier(
        lambda batch: net(batch[0]), loader or make_loader(), CLASSES, model=net, **options
    )


def test_numbers_are_those_of_the_whole_set_at_once() -> None:
    net = make_net()
    found = inspect(net)
    images, labels = make_tensors()
    with torch.no_grad():
        logits = net.eval()(images)
    assert found.samples == 20
    assert found.accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert found.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    expected = torch.zeros(3, 3, dtype=torch.int64)
    for label, prediction in zip(labels, logits.argmax(1), strict=True):
        expected[label, prediction] += 1
    assert torch.equal(found.confusion, expected)


def test_samples_have_their_images_and_the_gradients_of_their_prediction() -> None:
    net = make_net()
    found = inspect(net, samples=3)
    images, labels = make_tensors()
    net.eval()
    for sample in (*found.best, *found.worst, *found.most_confused):
        assert torch.equal(sample.image, images[sample.index])
        assert sample.label == labels[sample.index]
        image = images[sample.index : sample.index + 1].clone().requires_grad_(True)
        net(image)[0].max().backward()
        assert image.grad is not None
        expected = image.grad[0].abs().amax(0)
        torch.testing.assert_close(sample.saliency, expected / expected.max())


def test_nothing_is_left_behind() -> None:
    net = make_net().train()
    net[1].eval()
    net[6].weight.grad = torch.ones_like(net[6].weight)
    loader = make_loader(shuffle=True, generator=torch.Generator().manual_seed(5))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state(), loader.generator.get_state()
    others = random.getstate(), np.random.get_state()[1].tolist()

    def call(batch: Any) -> Tensor:
        random.random(), np.random.rand()
        return net(batch[0]) + 0 * torch.rand(1)

    inspect_classifier(call, loader, CLASSES, model=net)
    assert [module.training for module in net] == [True, False, *[True] * 5]
    assert torch.equal(net[6].weight.grad, torch.ones_like(net[6].weight))
    assert net[0].weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state[0])
    assert torch.equal(loader.generator.get_state(), state[1])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == others
    assert torch.is_grad_enabled()


def test_a_batch_may_be_a_dict_with_more_in_it() -> None:
    images, labels = make_tensors()
    net = make_net()
    shift = torch.arange(20.0).view(-1, 1)

    def call(batch: Any) -> Any:
        assert len(batch["pixels"]) == len(batch["shift"]) == len(batch["file"])
        return SimpleNamespace(logits=net(batch["pixels"]) * batch["scale"] + batch["shift"])

    loader = [
        {
            "pixels": images[a : a + 7],
            "shift": shift[a : a + 7],
            "file": [f"{i}.png" for i in range(20)][a : a + 7],
            "scale": 1.0,
            "label": labels[a : a + 7],
        }
        for a in range(0, 20, 7)
    ]
    found = inspect_classifier(
        call, loader, CLASSES, model=net, input_key="pixels", target_key="label"
    )
    assert torch.equal(found.confusion, inspect(net).confusion)
    assert found.notes == ()
    assert all(sample.saliency is not None for sample in found.worst)


def test_a_batch_may_be_an_object() -> None:
    @dataclass
    class Batch:
        pixels: Tensor
        label: Tensor

    net = make_net()
    loader = [Batch(*(part.clone() for part in make_tensors()))]
    found = inspect_classifier(
        lambda batch: net(batch.pixels),
        loader,
        CLASSES,
        model=net,
        input_key="pixels",
        target_key="label",
    )
    for kept, expected in zip(found.worst, inspect(net).worst, strict=True):
        assert kept.index == expected.index
        torch.testing.assert_close(kept.saliency, expected.saliency)
    assert torch.equal(loader[0].pixels, make_tensors()[0])


def test_targets_may_be_probabilities() -> None:
    images, labels = make_tensors()
    net = make_net()
    soft = [(images, F.one_hot(labels, 3) * 0.9 + 1 / 30)]
    assert torch.equal(inspect(net, soft).confusion, inspect(net).confusion)


def test_a_module_is_a_call_of_its_own() -> None:
    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()

        def forward(self, batch: Any) -> Tensor:
            return self.net(batch[0])

    task = Task().train()
    assert torch.equal(
        inspect_classifier(task, make_loader(), CLASSES).confusion, inspect(make_net()).confusion
    )
    assert task.net[3].training


def test_a_model_without_input_gradients_is_inspected_without_maps() -> None:
    net = make_net()
    found = inspect_classifier(lambda batch: net(batch[0]).detach(), make_loader(), CLASSES)
    assert len(found.notes) == 1
    assert "no maps of the input gradients" in found.notes[0]
    assert all(sample.saliency is None for sample in found.worst)
    assert found.notes[0] in found.to_html()


def test_json_survives_a_file_and_names_the_classes() -> None:
    found = inspect(make_net(), samples=2)
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert values["confusion"] == found.confusion.tolist()
    assert [each["name"] for each in values["classes"]] == list(CLASSES)
    assert [each["samples"] for each in values["classes"]] == make_tensors()[1].bincount().tolist()
    assert [each["index"] for each in values["worst"]] == [each.index for each in found.worst]
    assert values["worst"][0]["label"] == CLASSES[found.worst[0].label]


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ConfigError, "no names of two classes", {"classes": ["cat"]}),
        (ConfigError, "no names of two classes", {"classes": "cat"}),
        (ConfigError, "samples=0", {"samples": 0}),
        (DataError, "gave no batch", {"loader": []}),
        (DataError, "class list|are list, not images", {"loader": [([1, 2], [0, 1])]}),
        (DataError, r"shape \(2, 3\), not images", {"loader": [(torch.ones(2, 3), [0, 1])]}),
        (MetricError, r"shape \(6, 3\).*4 classes.*\(6, 4\)", {"classes": range(4)}),
        (MetricError, "class dict", {"call": lambda batch: {"boxes": 1}}),
        (MetricError, r"targets of the batch are shape \(6, 3, 4, 4\)", {"target_key": 0}),
        (MetricError, "label 7", {"loader": [(torch.ones(1, 3, 4, 4), torch.tensor([7]))]}),
    ],
)
def test_what_cannot_be_inspected_is_refused(
    error: type[CompressorError], message: str, options: dict[str, Any]
) -> None:
    net = make_net()
    call = options.pop("call", lambda batch: net(batch[0]))
    loader = options.pop("loader", make_loader())
    classes = options.pop("classes", CLASSES)
    with pytest.raises(error, match=message):
        inspect_classifier(call, loader, classes, model=net, **options)
