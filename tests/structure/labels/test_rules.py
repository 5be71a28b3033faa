"""Every rule: how many channels of how many kinds an operation between two layers leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from compressor.structure.channels import find_groups
from tests.structure.labels.nets import Net, assert_prunes_exactly, rows, sizes

Call = Callable[[Any, Any], Any]
Case = tuple[Call, dict[str, nn.Module], tuple[int, ...], dict[str, int]]


def between(call: Call, width: int = 8, **parts: nn.Module) -> dict[str, nn.Module]:
    """A 1×1 convolution to 8 channels, `call`, and one that reads what is left."""
    return {"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(width, 2, 1), **parts}


def image(call: Call, expected: dict[str, int], width: int = 8, **parts: nn.Module) -> Case:
    """`call` on (2, 8, 4, 4), between layers `a` and `b`."""
    layers = between(call, width, **parts)
    return (lambda m, x: m.b(call(m, m.a(x))), layers, (2, 3, 4, 4), expected)


def sequence(call: Call, expected: dict[str, int], width: int = 8, **parts: nn.Module) -> Case:
    """`call` on (2, 5, 8), between layers `a` and `b`."""
    layers = {"a": nn.Linear(6, 8), "b": nn.Linear(width, 2), **parts}
    return (lambda m, x: m.b(call(m, m.a(x))), layers, (2, 5, 6), expected)


def generator(call: Call, conv: nn.Module) -> Case:
    """A vector of 6 numbers to (2, 8, 4, 4), then `call` with the convolution `c`."""
    layers = {"a": nn.Linear(6, 8 * 16), "n": nn.BatchNorm2d(8), "c": conv, "b": nn.Conv2d(5, 2, 1)}
    return (
        lambda m, x: m.b(call(m, m.a(x).view(-1, 8, 4, 4))),
        layers,
        (2, 6),
        {"a": 8, "c": 5},
    )


def _steps(cell: Any, x: Tensor, state: Any = None) -> Any:
    """The state of a cell after all steps of (N, L, C)."""
    for k in range(x.shape[1]):
        state = cell(x[:, k], state)
    return state


def _shuffle(_: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def _heads(m: Any, x: Tensor) -> Tensor:
    q, k, v = (f(x).unflatten(2, (-1, 4)).transpose(1, 2) for f in (m.q, m.k, m.v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _shared_heads(m: Any, x: Tensor) -> Tensor:
    q, k, v = (f(x).unflatten(2, (-1, 4)).transpose(1, 2) for f in (m.q, m.k, m.v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


def _assign(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, :4] = m.c(x)
    return x


def _linears(*widths: tuple[str, int, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(before, after) for name, before, after in widths}


QKV = _linears(("q", 8, 12), ("k", 8, 12), ("v", 8, 12))
GQA = _linears(("q", 8, 16), ("k", 8, 8), ("v", 8, 8))  # four heads read two
CASES: dict[str, Case] = {
    # each channel by itself: the 8 of `a`
    "relu": image(lambda m, x: F.relu(x), {"a": 8}),
    "batch_norm": image(lambda m, x: m.n(x), {"a": 8}, n=nn.BatchNorm2d(8)),
    "instance_norm": image(lambda m, x: m.n(x), {"a": 8}, n=nn.InstanceNorm2d(8, affine=True)),
    "prelu": image(lambda m, x: m.n(x), {"a": 8}, n=nn.PReLU(8)),
    "depthwise": image(lambda m, x: m.n(x), {"a": 8}, n=nn.Conv2d(8, 8, 3, 1, 1, groups=8)),
    "max_pool": image(lambda m, x: F.max_pool2d(x, 2), {"a": 8}),
    "upsample": image(lambda m, x: F.interpolate(x, scale_factor=2.0), {"a": 8}),
    "roll_over_space": image(lambda m, x: x.roll(1, 2), {"a": 8}),
    "flip_of_channels": image(lambda m, x: x.flip(1), {"a": 8}),
    "softmax_over_space": image(
        lambda m, x: x.flatten(2).softmax(-1).unflatten(2, (4, 4)), {"a": 8}
    ),
    "mean_over_space": image(lambda m, x: x - x.mean((2, 3), keepdim=True), {"a": 8}),
    "squeeze_excite": image(
        lambda m, x: x * torch.sigmoid(m.u(F.relu(m.d(x.mean((2, 3), keepdim=True))))),
        {"a": 8, "d": 4},
        d=nn.Conv2d(8, 4, 1),
        u=nn.Conv2d(4, 8, 1),
    ),
    # channels that stand side by side
    "cat_with_itself": image(lambda m, x: torch.cat([x, x], 1), {"a": 8}, width=16),
    "cat_with_another": image(
        lambda m, x: torch.cat([m.c(x), x], 1), {"a": 8, "c": 3}, width=11, c=nn.Conv2d(8, 3, 1)
    ),
    "add": image(lambda m, x: x + m.c(x), {"a": 8}, c=nn.Conv2d(8, 8, 1)),
    "stack": image(lambda m, x: torch.stack([x, m.c(x)]).amax(0), {"a": 8}, c=nn.Conv2d(8, 8, 1)),
    # halves that multiply each other, groups of two, shuffled halves: pairs
    "glu": image(lambda m, x: F.glu(x, 1), {"a": 4}, width=4),
    "chunk": image(lambda m, x: torch.mul(*x.chunk(2, 1)), {"a": 4}, width=4),
    "shuffle": image(_shuffle, {"a": 4}),
    "pixel_shuffle": image(lambda m, x: F.pixel_shuffle(x, 2), {"a": 2}, width=2),
    "pixel_unshuffle": image(lambda m, x: F.pixel_unshuffle(x, 2), {"a": 8}, width=32),
    "group_norm": image(lambda m, x: m.n(x), {"a": 4}, n=nn.GroupNorm(4, 8)),
    "grouped": image(lambda m, x: m.n(x), {"a": 4}, n=nn.Conv2d(8, 8, 1, groups=4)),
    # layers that make channels of their own
    "conv": image(lambda m, x: m.c(x), {"a": 8, "c": 8}, c=nn.Conv2d(8, 8, 3)),
    "transposed": image(lambda m, x: m.c(x), {"a": 8, "c": 8}, c=nn.ConvTranspose2d(8, 8, 2)),
    "grouped_transposed": image(
        lambda m, x: m.c(x), {"a": 2}, width=6, c=nn.ConvTranspose2d(8, 6, 2, groups=2)
    ),
    "weight_norm": image(lambda m, x: m.c(x), {"a": 8, "c": 8}, c=weight_norm(nn.Conv2d(8, 8, 1))),
    "einsum": image(
        lambda m, x: torch.einsum("nchw,oc->nohw", x, m.c.weight),
        {"a": 8, "c": 5},
        width=5,
        c=nn.Linear(8, 5, bias=False),
    ),
    "product": sequence(
        lambda m, x: x @ m.c.weight, {"a": 8, "c": 5}, width=5, c=nn.Linear(5, 8, bias=False)
    ),
    "tied": sequence(
        lambda m, x: F.linear(F.relu(m.c(x)), m.c.weight.t()), {"a": 8, "c": 12}, c=nn.Linear(8, 12)
    ),
    "twice": sequence(lambda m, x: m.c(F.relu(m.c(x))), {"a": 8}, c=nn.Linear(8, 8)),
    "flatten": (
        lambda m, x: m.b(m.a(x).flatten(1)),
        {"a": nn.Conv2d(3, 8, 1), "b": nn.Linear(8 * 16, 2)},
        (2, 3, 4, 4),
        {"a": 8},
    ),
    # the first 4 of `c` are written over those of `a`, and its others are not read
    "assign": sequence(_assign, {"a": 4, "a[4]": 4}, c=nn.Linear(8, 4)),
    "lstm": sequence(lambda m, x: m.r(x)[0], {"a": 8, "r": 4}, 4, r=nn.LSTM(8, 4)),
    "gru_both_ways": sequence(
        lambda m, x: m.r(x)[0], {"a": 8, "r": 4}, 8, r=nn.GRU(8, 4, bidirectional=True)
    ),
    "gru_cell": sequence(lambda m, x: _steps(m.r, x), {"a": 8, "r": 4}, 4, r=nn.GRUCell(8, 4)),
    "lstm_cell": sequence(lambda m, x: _steps(m.r, x)[0], {"a": 8, "r": 4}, 4, r=nn.LSTMCell(8, 4)),
    "rnn_cell": sequence(lambda m, x: _steps(m.r, x), {"a": 8, "r": 4}, 4, r=nn.RNNCell(8, 4)),
    "relu_cell": sequence(
        lambda m, x: _steps(m.r, x),
        {"a": 8, "r": 4},
        4,
        r=nn.RNNCell(8, 4, bias=False, nonlinearity="relu"),
    ),
    # the second cell starts with the last state of the first: one kind of units
    "cells_in_a_chain": sequence(
        lambda m, x: _steps(m.s, x, _steps(m.r, x)),
        {"a": 8, "r": 4},
        4,
        r=nn.GRUCell(8, 4),
        s=nn.GRUCell(8, 4),
    ),
    # the first state is a parameter, the same for all samples
    "state_of_a_cell": sequence(
        lambda m, x: _steps(m.r, x, m.c.weight.expand(len(x), -1)),
        {"a": 8, "c": 4},
        4,
        r=nn.GRUCell(8, 4),
        c=nn.Linear(4, 1, bias=False),
    ),
    # and here one for each of 5, that all stay
    "state_of_a_layer": sequence(
        lambda m, x: m.r(x, m.c.weight[None])[0],
        {"a": 8, "c": 4},
        4,
        r=nn.GRU(8, 4),
        c=nn.Linear(4, 5, bias=False),
    ),
    # 8 images of 4 x 4 from one vector, as in a generator: an image is a channel
    "image_of_a_vector": generator(lambda m, x: m.c(F.relu(x)), nn.ConvTranspose2d(8, 5, 3)),
    "normalised_image": generator(lambda m, x: m.c(m.n(x)), nn.ConvTranspose2d(8, 5, 3)),
    "image_to_conv": generator(lambda m, x: m.c(F.relu(x)), nn.Conv2d(8, 5, 3)),
    "normalised_image_to_conv": generator(lambda m, x: m.c(m.n(x)), nn.Conv2d(8, 5, 3)),
    "image_to_1x1": generator(lambda m, x: m.c(F.relu(x)), nn.Conv2d(8, 5, 1)),
    "normalised_image_to_1x1": generator(lambda m, x: m.c(m.n(x)), nn.Conv2d(8, 5, 1)),
    # attention loses whole heads: three of q, k and v; two of k and v, each read by two of q
    "attention": sequence(_heads, {"a": 8, "q": 3}, 12, **QKV),
    "grouped_attention": sequence(_shared_heads, {"a": 8, "q": 2}, 16, **GQA),
    "weights_times_values": sequence(
        lambda m, x: torch.softmax(m.q(x) @ m.k(x).transpose(1, 2), -1) @ m.v(x),
        {"a": 8, "q": 12, "v": 12},
        12,
        **QKV,
    ),
    # nothing: the norm is over them, a number names one, or there is one kind only
    "layer_norm": sequence(lambda m, x: m.n(x), {}, n=nn.LayerNorm(8)),
    "group_norm_of_all": image(lambda m, x: m.n(x), {}, n=nn.GroupNorm(1, 8)),
    "softmax": image(lambda m, x: x.softmax(1), {}),
    "mean_over_channels": image(lambda m, x: x - x.mean(1, keepdim=True), {}),
    "cumsum": image(lambda m, x: x.cumsum(1), {}),
    "input_added": image(lambda m, x: x + torch.arange(8.0).view(8, 1, 1), {}),
    "one_picked": image(lambda m, x: x * x[:, 3:4], {}),
}


@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_a_rule_leaves_the_channels_that_it_should(name: str) -> None:
    call, parts, shape, expected = CASES[name]
    torch.manual_seed(0)
    model, inputs = Net(call, **parts), rows(*shape)
    found = find_groups(model, inputs)
    assert sizes(found) == expected
    if expected:
        assert found.quarantined == ()
        assert_prunes_exactly(model, inputs, found)
