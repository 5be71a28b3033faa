"""Residual blocks are found whatever their code looks like, and only where leaving out is safe."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ModelError
from compressor.interfaces.inputs import ModelInputs, output_tensors
from compressor.structure.blocks import residual_blocks
from compressor.structure.describe import diff, rebuild
from compressor.structure.surgery import Skip, replace, undone
from compressor.testing.models import CifarResNet, TinyMLP, TinyResNet, TinyTransformer

pytestmark = pytest.mark.slow  # each one exports a graph


def names(model: nn.Module, *shape: int) -> list[str]:
    return [block.name for block in residual_blocks(model, ModelInputs((torch.randn(shape),)))]


class Block(nn.Module):
    """`join(x, branch(x))` for one linear branch."""

    def __init__(self, join: Callable[[Tensor, Tensor], Any], out: int = 4) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(4, out))
        self.join = join

    def forward(self, x: Tensor) -> Any:
        return self.join(x, self.branch(x))


def test_identity_blocks_are_found_and_strided_ones_are_not() -> None:
    model = TinyResNet()
    blocks = residual_blocks(model, ModelInputs((torch.randn(2, 1, 8, 8),)))
    assert [(block.name, block.shape) for block in blocks] == [
        ("layer1.0", (2, 16, 8, 8)),
        ("layer2.1", (2, 32, 4, 4)),
    ]
    assert blocks[0].modules[:2] == ("layer1.0", "layer1.0.conv1")


def test_cifar_blocks_with_padded_shortcuts_stay() -> None:
    expected = [f"layer{s}.{b}" for s in (1, 2, 3) for b in range(3)]
    expected.remove("layer2.0")
    expected.remove("layer3.0")
    assert names(CifarResNet(20), 2, 3, 32, 32) == expected


def test_all_blocks_may_go_at_once() -> None:
    model = CifarResNet(20)
    for name in names(model, 2, 3, 32, 32):
        replace(model, name, Skip())
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_pre_norm_transformer_blocks_are_found() -> None:
    inputs = ModelInputs((torch.arange(10).reshape(2, 5),))
    assert [b.name for b in residual_blocks(TinyTransformer(), inputs)] == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize("family", ["vit", "swin", "timm", "bert", "gpt2", "llama"])
def test_layers_and_sublayers_of_well_known_transformers_are_found(family: str) -> None:
    model, inputs, expected = known_transformer(family)
    blocks = residual_blocks(model, inputs)
    assert sorted(block.name for block in blocks) == sorted(expected)
    outputs = output_tensors(inputs.call(model))
    for block in blocks:
        assert 0 <= block.influence < 2
        if not any(block.name.startswith(f"{other.name}.") for other in blocks):
            replace(model, block.name, block.stand_in())
    assert [o.shape for o in output_tensors(inputs.call(model))] == [o.shape for o in outputs]


def known_transformer(family: str) -> tuple[nn.Module, ModelInputs, list[str]]:
    """Two layers each, and the names of what can go."""
    torch.manual_seed(0)
    image, tokens = torch.randn(2, 3, 32, 32), torch.arange(14).reshape(2, 7)

    def parts(*layers: str, inner: tuple[str, ...]) -> list[str]:
        return [name for layer in layers for name in (layer, *(f"{layer}.{i}" for i in inner))]

    if family == "vit":
        layers = [f"encoder.layers.encoder_layer_{i}" for i in (0, 1)]
        vit = tv.VisionTransformer(32, 8, 2, 2, 16, 32)
        return vit.eval(), ModelInputs((image,)), parts(*layers, inner=("self_attention", "mlp"))
    if family == "swin":
        swin = tv.SwinTransformer([4, 4], 16, [2], [2], [4, 4])
        names = parts("features.1.0", "features.1.1", inner=("attn", "mlp"))
        return swin.eval(), ModelInputs((image,)), names
    if family == "timm":
        import timm

        model = timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            window_size=4,
            depths=(2,),
            embed_dim=16,
            num_heads=(2,),
        )
        names = parts("layers.0.blocks.0", "layers.0.blocks.1", inner=("attn", "mlp"))
        return model.eval(), ModelInputs((image,)), names
    import transformers

    sizes = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "bert":
        config = transformers.BertConfig(**sizes, intermediate_size=32)
        names = parts("encoder.layer.0", "encoder.layer.1", inner=("attention",))
        model = transformers.BertModel(config, add_pooling_layer=False)
    elif family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=16,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=8,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        names = parts("h.0", "h.1", inner=("attn", "mlp"))
        model = transformers.GPT2Model(config)
    else:
        config = transformers.LlamaConfig(**sizes, intermediate_size=32, use_cache=False)
        names = parts("layers.0", "layers.1", inner=("self_attn", "mlp"))
        model = transformers.LlamaModel(config)
    return model.eval(), ModelInputs(kwargs={"input_ids": tokens}), names


@pytest.mark.parametrize(
    "join",
    [
        lambda x, y: x + y,
        lambda x, y: F.relu(y.add_(x)),
        lambda x, y: F.hardswish(F.dropout(x + y + 1)),
        lambda x, y: (F.gelu(y) + x).clone(),
    ],
)
def test_a_sum_with_the_input_is_a_block(join: Callable[[Tensor, Tensor], Any]) -> None:
    assert names(nn.Sequential(nn.Linear(4, 4), Block(join), nn.Linear(4, 2)), 2, 4) == ["1"]


@pytest.mark.parametrize(
    "join",
    [
        lambda x, y: y,  # no sum
        lambda x, y: x * y,
        lambda x, y: y + 1,
        lambda x, y: y + x.mean(),
        lambda x, y: torch.cat([x, y], 1)[:, :4],
        lambda x, y: F.relu(y) + F.softmax(x, 1),
    ],
)
def test_other_joins_are_not(join: Callable[[Tensor, Tensor], Any]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.block = Block(join)

        def forward(self, x: Tensor) -> Tensor:
            out = self.block(self.first(x))
            return (out[0] if isinstance(out, tuple) else out) * 2

    assert names(Model(), 2, 4) == []


def test_a_block_may_be_the_first_thing_that_the_input_meets() -> None:
    """The graph's input and the exported module's have different names there."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(16, 4)).eval()
    (block,) = residual_blocks(model, ModelInputs((torch.randn(2, 5, 16),)))
    assert block.name == "0"


def test_what_is_added_outside_is_a_branch() -> None:
    """The block returns two tensors, so it cannot go; what it adds to its input can."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.block = Block(lambda x, y: (x + 0.5 * F.gelu(y), None))

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.first(x))[0] * 2

    model, inputs = Model(), ModelInputs((torch.randn(2, 4),))
    model.block.extra = nn.Linear(4, 4)  # so that block and branch are not the same
    (block,) = residual_blocks(model, inputs)
    assert (block.name, block.is_zero, block.outputs) == ("block", False, 2)
    replace(model, "block", block.stand_in())
    assert inputs.call(model).equal(model.first(inputs.args[0]) * 2)


class Halves(nn.Module):
    """The branch is two modules, of which the second gives what it gets the shape of."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


def test_the_second_half_of_a_branch_is_none() -> None:
    """Zeros of its input's width broke models whose stream alone, or inside alone, was pruned."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1), Halves())
    assert names(model, 2, 1, 8, 8) == ["1"], "the whole block, whose input is the stream"
    assert names(Halves(), 2, 4, 8, 8) == []


class PreNorm(nn.Module):
    """Attention and MLP, each added to the stream; attention called by keyword, with a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.mixer = Mixer()
        self.scale = nn.Parameter(torch.randn(4))
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(
            self.mixer(hidden=self.norm(x), mask=None)[0] * self.scale, training=self.training
        )
        return x + self.mlp(self.norm(x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, None, None]:
        return self.linear(hidden), None, None


def test_attention_and_mlp_of_a_transformer_layer_can_go_one_by_one() -> None:
    model, x = (
        nn.Sequential(nn.Linear(4, 4), PreNorm(), nn.Linear(4, 2)).eval(),
        torch.randn(2, 3, 4),
    )
    blocks = {block.name: block for block in residual_blocks(model, ModelInputs((x,)))}
    assert set(blocks) == {"1", "1.mixer", "1.mlp"}
    mixer, mlp = blocks["1.mixer"], blocks["1.mlp"]
    assert (mixer.is_zero, mixer.argument, mixer.outputs) == (True, "hidden", 3)
    assert (mlp.is_zero, mlp.argument, mlp.outputs) == (True, "", 0)
    layer, stream = copy.deepcopy(model[1]), model[0](x)
    with undone(model):
        replace(model, "1.mlp", mlp.stand_in())
        mixed = stream + layer.mixer(layer.norm(stream), None)[0] * layer.scale
        torch.testing.assert_close(model[1](stream), mixed)
    replace(model, "1.mixer", mixer.stand_in())
    torch.testing.assert_close(model[1](stream), stream + layer.mlp(layer.norm(stream)))


class PostNorm(nn.Module):
    """As in the first transformer: the norm comes after the sum, in a module of two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.output = Output()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.inner(x), x)


class Output(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, hidden: Tensor, stream: Tensor) -> Tensor:
        return self.norm(self.dense(hidden) + stream)


def test_a_sum_with_another_argument_than_the_first_is_no_residual() -> None:
    """Its stand-in would give back the first."""
    model = nn.Sequential(nn.Linear(4, 4), PostNorm(), nn.Linear(4, 2))
    assert names(model, 2, 3, 4) == ["1"]


def test_influence_is_one_minus_the_cosine() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), Scaled(), nn.Conv2d(4, 2, 1)).eval()
    x = torch.randn(3, 1, 5, 5)
    (block,) = residual_blocks(model, ModelInputs((x,)))
    before = model[0](x).permute(0, 2, 3, 1).flatten(0, 2)
    after = model[1](model[0](x)).permute(0, 2, 3, 1).flatten(0, 2)
    cosines = [(a @ b / a.norm() / b.norm()).item() for a, b in zip(before, after, strict=True)]
    assert block.influence == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-5)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def test_a_stand_in_survives_json() -> None:
    model = nn.Sequential(nn.Linear(4, 4), PreNorm(), nn.Linear(4, 2)).eval()
    x = torch.randn(2, 3, 4)
    for block in residual_blocks(model, ModelInputs((x,))):
        edited = copy.deepcopy(model)
        replace(edited, block.name, block.stand_in())
        rebuilt = rebuild(model, json.loads(json.dumps(diff(model, edited))))
        rebuilt.load_state_dict(edited.state_dict(), strict=True)
        assert rebuilt.eval()(x).equal(edited.eval()(x))


def test_a_block_that_is_called_twice_is_not_offered() -> None:
    block = Block(lambda x, y: x + y)
    assert names(nn.Sequential(nn.Linear(4, 4), block, block, nn.Linear(4, 2)), 2, 4) == []


def test_a_sum_with_a_parameter_of_the_same_shape_is_no_residual() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.shift = nn.Parameter(torch.randn(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.shift

    assert names(nn.Sequential(nn.Linear(4, 4), Shift(), nn.Linear(4, 2)), 2, 4) == []


def test_only_the_innermost_block_is_offered() -> None:
    inner = Block(lambda x, y: x + y)
    outer = Block(lambda x, y: x + y)
    outer.branch = nn.Sequential(inner)
    assert names(nn.Sequential(nn.Linear(4, 4), outer, nn.Linear(4, 2)), 2, 4) == ["1.branch.0"]


def test_finding_leaves_model_and_mode_alone() -> None:
    model = TinyResNet().train()
    before = dict(model.named_modules())
    names(model, 2, 1, 8, 8)
    assert model.training
    assert dict(model.named_modules()) == before


def test_a_plain_network_has_none() -> None:
    assert names(TinyMLP(), 2, 64) == []


def test_a_model_that_does_not_run_is_an_error() -> None:
    with pytest.raises(ModelError, match="does not run"):
        names(TinyMLP(), 2, 3)


@pytest.mark.parametrize(("make", "count"), [(tv.resnet18, 5), (tv.mobilenet_v2, 10)])
def test_torchvision_models_have_their_identity_blocks(
    make: Callable[[], nn.Module], count: int
) -> None:
    assert len(names(make(), 2, 3, 32, 32)) == count
