"""Our attention equals torch's and torchvision's, wherever it stands, and can lose heads."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)
from torchvision.models.vision_transformer import VisionTransformer

from compressor.errors import ModelError
from compressor.export.onnx import export_onnx
from compressor.interfaces.inputs import ModelInputs
from compressor.structure import surgery
from compressor.structure.attention import is_replaceable, make_prunable, replace_attention
from compressor.structure.describe import diff, rebuild

EMBED, HEADS, QUERIES, KEYS, BATCH = 12, 3, 4, 5, 2
EXACT = {"rtol": 1e-11, "atol": 1e-11}  # float64, sums of some hundred terms


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(module: nn.Module) -> nn.Module:
    """In float64, every parameter random: torch starts biases and torchvision heads at zero."""
    module.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return module


def multihead(**options: Any) -> nn.MultiheadAttention:
    return filled(nn.MultiheadAttention(EMBED, HEADS, **options))  # type: ignore[return-value]


def assert_same_function(old: nn.Module, new: nn.Module, *args: Tensor, **kwargs: Any) -> None:
    """Outputs, and gradients of what goes in and of all parameters, the latter in sum."""
    results = []
    for module in (old, new):
        module.zero_grad()
        leaves = [arg.clone().requires_grad_() for arg in args]
        torch.manual_seed(0)
        outputs = module(*leaves, **kwargs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found = [output for output in outputs if output is not None]
        sum((output * random(*output.shape, seed=9)).sum() for output in found).backward()
        used = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        squares = sum(grad.square().sum() for grad in used)
        results.append((*outputs, *(leaf.grad for leaf in leaves), squares))
    torch.testing.assert_close(results[1], results[0], **EXACT)


CAUSAL = torch.ones(QUERIES, KEYS).triu(1).bool()
PADDING = torch.tensor([[False] * KEYS, [False] * (KEYS - 2) + [True] * 2])
CALLS: dict[str, dict[str, Any]] = {
    "weights": {},
    "weights of each head": {"average_attn_weights": False},
    "no weights": {"need_weights": False},
    "padding": {"key_padding_mask": PADDING, "need_weights": False},
    "padding and weights": {"key_padding_mask": PADDING},
    "float padding": {"key_padding_mask": random(BATCH, KEYS, seed=5), "need_weights": False},
    "mask": {"attn_mask": CAUSAL, "need_weights": False},
    "mask and weights": {"attn_mask": CAUSAL},
    "float mask": {"attn_mask": random(QUERIES, KEYS, seed=6), "need_weights": False},
    "mask of each head": {"attn_mask": random(BATCH * HEADS, QUERIES, KEYS, seed=7) > 1},
    "float mask of each head": {
        "attn_mask": random(BATCH * HEADS, QUERIES, KEYS, seed=8),
        "need_weights": False,
    },
    "both masks": {"attn_mask": CAUSAL, "key_padding_mask": PADDING, "need_weights": False},
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "causal and weights": {"attn_mask": CAUSAL, "is_causal": True},
    "causal and padding": {
        "attn_mask": CAUSAL,
        "is_causal": True,
        "key_padding_mask": PADDING,
        "need_weights": False,
    },
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "other widths": {"kdim": 7, "vdim": 9},
    "other widths, no bias": {"kdim": EMBED, "vdim": 9, "bias": False, "batch_first": True},
    "learned key": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True, "batch_first": True},
    "both keys": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_weights_and_gradients_are_torchs(kind: str, call: str) -> None:
    options = KINDS[kind]
    old = multihead(**options)
    widths = (EMBED, options.get("kdim", EMBED), options.get("vdim", EMBED))
    args = [random(BATCH, n, w, seed=w) for n, w in zip((QUERIES, KEYS, KEYS), widths, strict=True)]
    if not options.get("batch_first"):
        args = [arg.transpose(0, 1) for arg in args]
    assert_same_function(old, make_prunable(old), *args, **CALLS[call])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_one_sequence_needs_no_batch(batch_first: bool, need_weights: bool) -> None:
    old = multihead(batch_first=batch_first)
    query, key = random(QUERIES, EMBED), random(KEYS, EMBED, seed=1)
    masks = {"key_padding_mask": PADDING[1], "attn_mask": CAUSAL}
    assert_same_function(
        old, make_prunable(old), query, key, key, need_weights=need_weights, **masks
    )


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_takes_the_weights_that_torchs_takes(need_weights: bool) -> None:
    old = multihead(dropout=0.5)
    query, key = random(QUERIES, BATCH, EMBED), random(KEYS, BATCH, EMBED, seed=1)
    new = make_prunable(old)
    assert_same_function(old, new, query, key, key, need_weights=need_weights)
    torch.manual_seed(0)
    first, second = new(query, key, key)[0], new(query, key, key)[0]
    assert not torch.equal(first, second)
    new.eval()
    torch.testing.assert_close(new(query, key, key), old.eval()(query, key, key), **EXACT)


def test_a_promise_of_no_mask_is_refused() -> None:
    x = random(KEYS, BATCH, EMBED)
    with pytest.raises(ModelError, match="generate_square_subsequent_mask"):
        make_prunable(multihead())(x, x, x, is_causal=True)


def keep_heads(module: nn.Module, kept: list[int]) -> None:
    """Cut the others out by hand: rows of q, k, v and columns of out."""
    width: int = module.head_dim  # type: ignore[assignment]
    entries = [head * width + i for head in kept for i in range(width)]
    for layer in (module.q, module.k, module.v):
        layer.weight = nn.Parameter(layer.weight[entries])
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias[entries])
        layer.out_features = len(entries)
    module.out.weight = nn.Parameter(module.out.weight[:, entries])
    module.out.in_features = len(entries)
    for name in ("bias_k", "bias_v"):
        if getattr(module, name, None) is not None:
            setattr(module, name, nn.Parameter(getattr(module, name)[:, :, entries]))
    assert module.num_heads == len(kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["no weights", "both masks", "padding and weights"])
def test_without_heads_it_is_torchs_with_their_outputs_zeroed(kind: str, call: str) -> None:
    options = KINDS[kind]
    old = multihead(**options)
    new = make_prunable(old)
    keep_heads(new, [0, 2])
    with torch.no_grad():
        old.out_proj.weight[:, 4:8] = 0
    widths = (EMBED, options.get("kdim", EMBED), options.get("vdim", EMBED))
    args = [random(BATCH, n, w, seed=w) for n, w in zip((QUERIES, KEYS, KEYS), widths, strict=True)]
    if not options.get("batch_first"):
        args = [arg.transpose(0, 1) for arg in args]
    expected, actual = old(*args, **CALLS[call])[0], new(*args, **CALLS[call])[0]
    torch.testing.assert_close(actual, expected, **EXACT)


def test_a_mask_of_each_head_follows_the_heads() -> None:
    old = multihead()
    new = make_prunable(old)
    keep_heads(new, [0, 2])
    with torch.no_grad():
        old.out_proj.weight[:, 4:8] = 0
    x = random(KEYS, BATCH, EMBED)
    mask = random(BATCH, HEADS, KEYS, KEYS, seed=3)
    expected = old(x, x, x, attn_mask=mask.flatten(0, 1))[0]
    actual = new(x, x, x, attn_mask=mask[:, [0, 2]].flatten(0, 1))[0]
    torch.testing.assert_close(actual, expected, **EXACT)
    with pytest.raises(RuntimeError):  # never silently another head's
        new(x[:, :1], x[:, :1], x[:, :1], attn_mask=random(4, KEYS, KEYS))


# In torch's transformer layers


def encoder(layers: int = 2, **options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(EMBED, 2, 16, dropout=0.0, batch_first=True, **options)
    nested = not options.get("norm_first") and options.get("bias", True)
    return filled(nn.TransformerEncoder(layer, layers, enable_nested_tensor=nested))  # type: ignore[return-value]


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_computes_the_same_with_gradients(
    options: dict[str, Any], training: bool
) -> None:
    old = encoder(**options).train(training)
    new = copy.deepcopy(old)
    assert replace_attention(new) == ("layers.0.self_attn", "layers.1.self_attn")
    x = random(BATCH, KEYS, EMBED)
    causal = nn.Transformer.generate_square_subsequent_mask(KEYS, dtype=torch.float64)
    for masks in ({}, {"mask": causal}, {"mask": causal, "is_causal": True}):
        assert_same_function(old, new, x, **masks)
    padding = torch.zeros(BATCH, KEYS, dtype=torch.float64).masked_fill(PADDING, float("-inf"))
    assert_same_function(old, new, x, src_key_padding_mask=padding)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("replaced", [(0, 1), (0,), (1,)], ids=str)
def test_an_encoder_computes_what_its_fast_path_does(replaced: tuple[int, ...]) -> None:
    """In inference, torch packs padded sequences into a nested tensor and pads the rest with 0."""
    old = encoder().eval()
    new = copy.deepcopy(old)
    for layer in replaced:
        name = f"layers.{layer}.self_attn"
        surgery.replace(new, name, make_prunable(surgery.get(new, name)))
    x = random(BATCH, KEYS, EMBED)
    causal = torch.ones(KEYS, KEYS).triu(1).bool()
    with torch.no_grad():
        expected = old(x, src_key_padding_mask=PADDING)
        torch.testing.assert_close(new(x, src_key_padding_mask=PADDING), expected)
        assert not expected[PADDING].any()
        torch.testing.assert_close(new(x), old(x))
        torch.testing.assert_close(new(x, mask=causal), old(x, mask=causal))
    # The same encoder with gradients, where torch takes neither path.
    torch.testing.assert_close(new(x, src_key_padding_mask=PADDING)[~PADDING], expected[~PADDING])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_sequences_attend_each_to_itself() -> None:
    new = make_prunable(multihead(batch_first=True)).eval()
    sequences = [random(3, EMBED), random(5, EMBED, seed=1)]
    nested = torch.nested.nested_tensor(sequences)
    with torch.no_grad():
        outputs, weights = new(nested, nested, nested)
        for sequence, output in zip(sequences, outputs.unbind(), strict=True):
            torch.testing.assert_close(output, new(sequence, sequence, sequence)[0])
        assert weights.shape == (2, 5, 5)
        with pytest.raises(ModelError, match="padded"):
            new(nested, nested, nested, attn_mask=torch.zeros(5, 5))


@pytest.mark.parametrize("training", [True, False])
def test_encoder_and_decoder_compute_the_same(training: bool) -> None:
    plain = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(EMBED, HEADS, 16, 0.0), 1, enable_nested_tensor=False
    )
    old = nn.Transformer(EMBED, HEADS, 1, 1, 16, dropout=0.0, custom_encoder=plain)
    filled(old).train(training)
    new = copy.deepcopy(old)
    assert replace_attention(new) == (
        "encoder.layers.0.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
    )
    source, target = random(KEYS, BATCH, EMBED), random(QUERIES, BATCH, EMBED, seed=1)
    causal = nn.Transformer.generate_square_subsequent_mask(QUERIES, dtype=torch.float64)
    assert_same_function(old, new, source, target, tgt_mask=causal, tgt_is_causal=True)
    with torch.no_grad():
        torch.testing.assert_close(new(source, target), old(source, target))


# torchvision's windows


def window_attention(kind: type[nn.Module], **options: Any) -> nn.Module:
    options = {"window_size": [3, 2], "shift_size": [1, 1], "num_heads": HEADS, **options}
    return filled(kind(EMBED, **options))


WINDOWS: dict[str, dict[str, Any]] = {
    "shifted": {},
    "still": {"shift_size": [0, 0]},
    "shifted in one direction": {"shift_size": [0, 1]},
    "no bias": {"qkv_bias": False, "proj_bias": False},
    "wider than the image": {"window_size": [8, 3]},
    "dropout": {"attention_dropout": 0.4, "dropout": 0.3},
}


@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2])
@pytest.mark.parametrize("case", WINDOWS)
@pytest.mark.parametrize("size", [(6, 4), (7, 5)], ids=["whole windows", "padded"])
def test_windows_give_torchvisions_outputs_and_gradients(
    kind: type[nn.Module], case: str, size: tuple[int, int]
) -> None:
    old = window_attention(kind, **WINDOWS[case])
    x = random(BATCH, *size, EMBED)
    assert_same_function(old, make_prunable(old), x)
    assert_same_function(old.eval(), make_prunable(old), x)


@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2])
def test_windows_without_heads_are_torchvisions_with_their_outputs_zeroed(
    kind: type[nn.Module],
) -> None:
    old = window_attention(kind)
    new = make_prunable(old)
    keep_heads(new, [0, 2])
    with torch.no_grad():
        old.proj.weight[:, 4:8] = 0
    if kind is ShiftedWindowAttention:
        table = new.relative_position_bias_table
        new.relative_position_bias_table = nn.Parameter(table[:, [0, 2]])
    else:
        new.logit_scale = nn.Parameter(new.logit_scale[[0, 2]])
        new.cpb_mlp[2].weight = nn.Parameter(new.cpb_mlp[2].weight[[0, 2]])
    x = random(BATCH, 7, 5, EMBED)
    torch.testing.assert_close(new(x), old(x), **EXACT)


# Whole models


def vit() -> nn.Module:
    return VisionTransformer(8, 4, 2, 3, 12, 16, num_classes=5)


def swin(**options: Any) -> nn.Module:
    shape = {"patch_size": [2, 2], "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4]}
    window = {"window_size": [3, 3], "num_classes": 5, "stochastic_depth_prob": 0.0}
    return SwinTransformer(**shape, **window, **options)


def swin_v2() -> nn.Module:
    return swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)


def maxvit() -> nn.Module:
    return MaxVit((16, 16), 4, 2, [8], [1], head_dim=4, stochastic_depth_prob=0.0, num_classes=5)


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "vit": (vit, random(BATCH, 3, 8, 8), 2),
    "swin": (swin, random(BATCH, 3, 14, 14), 3),
    "swin_v2": (swin_v2, random(BATCH, 3, 14, 14), 3),
    "maxvit": (maxvit, random(BATCH, 3, 16, 16), 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_torchvision_compute_the_same(name: str) -> None:
    make, x, count = MODELS[name]
    old = filled(make())
    new = copy.deepcopy(old)
    assert len(replace_attention(new)) == count
    assert not any(is_replaceable(module) for module in new.modules())
    assert_same_function(old.eval(), new.eval(), x)
    with torch.no_grad():
        torch.testing.assert_close(new(x), old(x))


@pytest.mark.parametrize("name", [*MODELS, "encoder"])
def test_a_model_with_fewer_heads_comes_back_from_json(name: str) -> None:
    make, x, _ = MODELS.get(name, (encoder, random(BATCH, KEYS, EMBED), 2))
    old = filled(make()).eval()
    new = copy.deepcopy(old)
    first = surgery.get(new, replace_attention(new)[0])
    if name in ("vit", "encoder"):
        keep_heads(first, [1])
    text = json.dumps(diff(old, new))
    rebuilt = rebuild(old, json.loads(text)).eval()
    rebuilt.load_state_dict(new.state_dict(), strict=True)
    torch.testing.assert_close(rebuilt(x), new(x), rtol=0, atol=0)
    assert repr(rebuilt) == repr(new)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, "encoder"])
def test_the_file_computes_what_the_model_does(name: str, tmp_path: Path) -> None:
    make, x, _ = MODELS.get(name, (encoder, random(BATCH, KEYS, EMBED), 2))
    old = filled(make()).float().eval()
    new = copy.deepcopy(old)
    replace_attention(new)
    x = x.float()
    path = export_onnx(new, ModelInputs((x,)), tmp_path / "model.onnx")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (x, torch.cat((x, x.flip(1)))[:3], x[:1]):
        (output,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        with torch.no_grad():
            expected = old(batch)
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-4)


# What is kept, and what is refused


def test_weights_keep_dtype_mode_and_flags_and_are_copies() -> None:
    old = nn.MultiheadAttention(EMBED, HEADS, dtype=torch.bfloat16).eval()
    old.in_proj_weight.requires_grad_(False)
    state = torch.get_rng_state()
    with torch.no_grad():
        new = make_prunable(old)
    assert torch.equal(torch.get_rng_state(), state)
    assert not new.training
    assert not new.out.training
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert [new.q.weight.requires_grad, new.v.weight.requires_grad] == [False, False]
    assert [new.q.bias.requires_grad, new.out.weight.requires_grad] == [True, True]
    storages = {p.untyped_storage().data_ptr() for p in (*old.parameters(), *new.parameters())}
    assert len(storages) == 4 + 8


def test_a_tensor_of_v2_that_it_never_reads_is_gone() -> None:
    assert make_prunable(window_attention(ShiftedWindowAttentionV2)).k.bias is None


class Counting(nn.MultiheadAttention):
    """A class of its own may do anything."""


def spoilt(how: str) -> nn.Module:
    module = nn.MultiheadAttention(EMBED, HEADS)
    if how == "subclass":
        return Counting(EMBED, HEADS)
    if how == "hook":
        module.out_proj.register_forward_hook(lambda *_: None)
    elif how == "parametrization":
        nn.utils.parametrizations.weight_norm(module.out_proj)
    elif how == "another layer":
        module.out_proj = nn.Sequential(nn.Linear(EMBED, EMBED), nn.Tanh())  # type: ignore[assignment]
    else:
        module.forward = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    return module


@pytest.mark.parametrize(
    "how", ["subclass", "hook", "parametrization", "another layer", "own forward"]
)
def test_what_was_changed_is_left_alone(how: str) -> None:
    model = nn.ModuleDict({"attention": spoilt(how), "linear": nn.Linear(2, 2)})
    assert not is_replaceable(model["attention"])
    assert replace_attention(model) == ()
    with pytest.raises(ModelError, match="is_replaceable"):
        make_prunable(model["attention"])
    assert is_replaceable(nn.MultiheadAttention(EMBED, HEADS))


def test_a_shared_module_is_replaced_everywhere() -> None:
    attention = nn.MultiheadAttention(EMBED, HEADS)
    model = nn.ModuleList([attention, nn.ModuleList([attention])])
    assert replace_attention(model) == ("0",)
    assert model[0] is model[1][0]
    assert not is_replaceable(model[0])


def test_tied_weights_stay_tied() -> None:
    first, second, free = (nn.MultiheadAttention(EMBED, HEADS) for _ in range(3))
    second.in_proj_weight = first.in_proj_weight
    model = nn.ModuleList([first, second, free])
    assert replace_attention(model) == ("2",)
    assert model[0].in_proj_weight is model[1].in_proj_weight
    lent = nn.MultiheadAttention(EMBED, HEADS)
    assert replace_attention(nn.ModuleList([lent, lent.out_proj])) == ()
