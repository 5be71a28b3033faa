from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ConfigError, ModelError
from compressor.structure import surgery
from compressor.structure.describe import diff, rebuild
from compressor.testing.models import TinyResNet
from compressor.training import Trainer
from compressor.training.algorithms.blurpool import (
    BlurConv2d,
    BlurMaxPool2d,
    BlurPool,
    apply_blurpool,
    blur,
)


def images(height: int = 9, width: int = 12, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, height, width, generator=generator)


def filtered(x: Tensor, rows: bool = True, columns: bool = True) -> Tensor:
    """The slow way: one convolution per channel with the filter of the paper."""
    line, dot = torch.tensor([1.0, 2.0, 1.0]) / 4, torch.tensor([0.0, 1.0, 0.0])
    kernel = torch.outer(line if rows else dot, line if columns else dot)
    weight = kernel.expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), weight, groups=x.shape[1])


def make_net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Flatten(),
            nn.Linear(256, 3),
        ).eval()


def test_the_filter_is_the_papers() -> None:
    torch.testing.assert_close(blur(images(), (2, 2)), filtered(images()))
    torch.testing.assert_close(blur(images(), (1, 2)), filtered(images(), rows=False))
    torch.testing.assert_close(blur(images(), (2, 2), (2, 3)), filtered(images())[..., ::2, ::3])


@pytest.mark.slow
def test_the_filter_is_that_of_timm() -> None:
    layers = importlib.import_module("timm.layers")
    theirs = layers.BlurPool2d(channels=3, filt_size=3, stride=2, pad_mode="replicate")
    torch.testing.assert_close(blur(images(), (2, 2), (2, 2)), theirs(images()))


def test_a_blurred_convolution_is_filter_and_convolution() -> None:
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=1, dilation=2)
    first, last = BlurConv2d.around(conv, blur_first=True), BlurConv2d.around(conv, False)
    torch.testing.assert_close(first(images()), conv(filtered(images())))
    every = F.conv2d(images(), conv.weight, conv.bias, 1, 1, 2)
    torch.testing.assert_close(last(images()), filtered(every)[..., ::2, ::2])


def test_a_blurred_pool_is_pool_and_filter() -> None:
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    every = F.max_pool2d(images(), 3, 1, 1)
    expected = filtered(every)[..., ::2, ::2]
    torch.testing.assert_close(BlurMaxPool2d.around(pool)(images()), expected)


@pytest.mark.parametrize("height", range(5, 11))
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 4, "stride": 3, "padding": 2},
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0)},
        {"kernel_size": 2, "stride": 2, "dilation": 2},
    ],
)
def test_sizes_stay_as_they_were(height: int, options: dict[str, int]) -> None:
    x = images(height, height + 1)
    conv, pool = nn.Conv2d(3, 4, **options), nn.MaxPool2d(**options)  # type: ignore[arg-type]
    assert BlurConv2d.around(conv, True)(x).shape == conv(x).shape
    assert BlurConv2d.around(conv, False)(x).shape == conv(x).shape
    if options["kernel_size"] != 1:
        assert BlurMaxPool2d.around(pool)(x).shape == pool(x).shape


def test_other_paddings_stay_as_they_were() -> None:
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=(1, 2), padding_mode="circular")
    every = F.conv2d(F.pad(images(), (2, 2, 1, 1), mode="circular"), conv.weight, conv.bias)
    expected = filtered(every)[..., ::2, ::2]
    torch.testing.assert_close(BlurConv2d.around(conv, False)(images()), expected)


def test_what_is_even_over_the_image_stays() -> None:
    x = torch.full((1, 16, 8, 8), 3.0)
    conv = nn.Conv2d(16, 4, 3, stride=2, padding=1)
    torch.testing.assert_close(BlurConv2d.around(conv, True)(x), conv(x))
    pool = nn.MaxPool2d(2)
    torch.testing.assert_close(BlurMaxPool2d.around(pool)(x), pool(x))


def test_parameters_keep_names_and_objects() -> None:
    model = make_net()
    before, keys = dict(model.named_parameters()), list(model.state_dict())
    edit = apply_blurpool(model)
    assert edit == surgery.Edit()
    assert list(model.state_dict()) == keys
    assert all(value is before[name] for name, value in model.named_parameters())
    assert not any(module.training for module in model.modules())


def test_the_first_convolution_and_layers_without_stride_stay() -> None:
    model = TinyResNet(width=16, in_channels=3)
    apply_blurpool(model)
    blurred = [name for name, module in model.named_modules() if isinstance(module, BlurConv2d)]
    assert blurred == ["layer2.0.conv1", "layer2.0.shortcut.0"]


def test_each_kind_can_be_left_out() -> None:
    kinds = []
    for options in ({"replace_convs": False}, {"replace_maxpools": False}, {"min_channels": 3}):
        model = make_net()
        apply_blurpool(model, **options)  # type: ignore[arg-type]
        kinds.append([type(model[index]).__name__ for index in (0, 2, 4)])
    assert kinds == [
        ["Conv2d", "Conv2d", "BlurMaxPool2d"],
        ["Conv2d", "BlurConv2d", "MaxPool2d"],
        ["BlurConv2d", "BlurConv2d", "BlurMaxPool2d"],
    ]


def test_done_twice_is_done_once() -> None:
    model = make_net()
    x = images(32, 32)
    original = model(x)
    apply_blurpool(model)
    once, modules = model(x), list(model.modules())
    apply_blurpool(model)
    assert torch.equal(model(x), once)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert not torch.allclose(once, original)


def test_a_shared_layer_is_replaced_everywhere() -> None:
    conv = nn.Conv2d(16, 16, 3, stride=2)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    apply_blurpool(model)
    assert isinstance(model[0], BlurConv2d)
    assert model[0] is model[2]


def test_pools_that_cannot_be_blurred_stay() -> None:
    model = nn.Sequential(
        nn.MaxPool2d(2), nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(2, return_indices=True)
    )
    apply_blurpool(model)
    kinds = [type(module).__name__ for module in model]
    assert kinds == ["BlurMaxPool2d", "MaxPool2d", "MaxPool2d"]


def test_nothing_to_blur_is_an_error() -> None:
    with pytest.raises(ModelError, match="no strided"):
        apply_blurpool(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8, 2)))
    with pytest.raises(ConfigError, match="Nothing is to be replaced"):
        apply_blurpool(make_net(), replace_convs=False, replace_maxpools=False)


def test_the_structure_is_rebuilt_from_a_file() -> None:
    model = make_net()
    apply_blurpool(model, blur_first=False)
    new = rebuild(make_net(), diff(make_net(), model))
    new.load_state_dict(model.state_dict())
    assert torch.equal(new.eval()(images(32, 32)), model(images(32, 32)))


def test_a_trainer_trains_the_blurred_model() -> None:
    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    model = make_net()
    weight = model[2].weight
    before = weight.detach().clone()
    batch = images(32, 32), torch.tensor([0, 1])
    Trainer(
        model, step, train_dataloader=[batch], max_duration="2ep", algorithms=[BlurPool()]
    ).fit()
    assert isinstance(model[2], BlurConv2d)
    assert model[2].weight is weight
    assert not torch.equal(weight, before)


@pytest.mark.slow
@pytest.mark.parametrize("blur_first", [True, False])
def test_the_exported_model_equals_the_eager_one(tmp_path: Path, blur_first: bool) -> None:
    import onnxruntime

    from compressor.export.onnx import export_onnx
    from compressor.interfaces.inputs import ModelInputs

    model, x = make_net(), images(32, 32)
    apply_blurpool(model, blur_first=blur_first)
    path = tmp_path / "model.onnx"
    export_onnx(model, ModelInputs((x,)), path)
    session = onnxruntime.InferenceSession(path)
    outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(outputs[0]), model(x), rtol=1e-4, atol=1e-5)
