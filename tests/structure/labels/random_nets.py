"""Nets put together by chance from operations that move, join, gate, norm and contract channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from compressor.interfaces.inputs import ModelInputs
from tests.structure.labels.nets import Net, randomized, rows, tokens

Choice = tuple[str, str, str, int]
STARTS = ("image", "sequence", "tokens")
KINDS = ("image", "sequence", "flat")
MOST_CHANNELS = 24


class Wired(nn.Module):
    """Layers, each with the numbers of the earlier values that it reads."""

    def __init__(self, layers: Sequence[nn.Module], wires: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.wires = tuple(wires)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for layer, wires in zip(self.layers, self.wires, strict=True):
            values.append(layer(*(values[k] for k in wires)))
        return values[-1]


def build(start: str, choices: Sequence[Choice]) -> tuple[nn.Module, ModelInputs]:
    """The net of these operations; one that does not fit where it stands is left out.

    Args:
        start: of `STARTS`.
        choices: names of operations on an image, a sequence and a flat tensor, of which that is
            taken which fits; and a number that it may use.
    """
    inputs = {"image": rows(2, 3, 4, 4), "sequence": rows(2, 5, 6), "tokens": tokens()}[start]
    first = {"image": nn.Conv2d(3, 8, 1), "sequence": nn.Linear(6, 8)}
    layers: list[nn.Module] = [first.get(start, nn.Embedding(32, 8))]
    wires: list[tuple[int, ...]] = [(0,)]
    values: list[Tensor] = [inputs.args[0], layers[0](inputs.args[0])]

    def append(layer: nn.Module, *read: int) -> None:
        layers.append(layer.eval())
        wires.append(read)
        values.append(layer(*(values[k] for k in read)))

    with torch.no_grad():
        for *names, k in choices:
            x, last = values[-1], len(values) - 1
            kind = KINDS[4 - x.dim()]
            name = names[4 - x.dim()]
            if name in JOINS:
                others = [i for i in range(1, last + 1) if _is_joinable(name, values[i], x)]
                append(JOINS[name](), last, others[k % len(others)])
            else:
                layer = OPERATIONS[kind][name](x.shape[_channel(x)], k)
                if layer is not None:
                    append(layer, last)
        while values[-1].dim() > 2:
            append(Net(lambda _, x: x.mean((2, 3) if x.dim() == 4 else 1)), len(values) - 1)
        append(nn.Linear(values[-1].shape[1], 3), len(values) - 1)
    return randomized(Wired(layers, wires)), inputs.double()


def _channel(x: Tensor) -> int:
    return 1 if x.dim() in (2, 4) else 2


def _is_joinable(name: str, earlier: Tensor, x: Tensor) -> bool:
    if name != "cat" or earlier.dim() != x.dim():
        return earlier.shape == x.shape
    own = _channel(x)
    rest = [d for d in range(x.dim()) if d != own]
    fits = x.shape[own] + earlier.shape[own] <= MOST_CHANNELS
    return (fits and all(earlier.shape[d] == x.shape[d] for d in rest)) or earlier is x


JOINS: dict[str, Callable[[], nn.Module]] = {
    "add": lambda: Net(lambda _, x, y: x + y),
    "multiply": lambda: Net(lambda _, x, y: x * y),
    "cat": lambda: Net(lambda _, x, y: torch.cat([y, x], _channel(x))),
    "stack": lambda: Net(lambda _, x, y: torch.stack([x, y], -1).amax(-1)),
}


def _width(k: int) -> int:
    return (4, 6, 8, 12)[k % 4]


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


def _attention(c: int, k: int) -> nn.Module | None:
    heads = 2 + k % 2
    if c % heads:
        return None

    def call(m: Any, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, key, v = m.qkv(x).view(n, length, 3, m.heads, m.size).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, key, v).transpose(1, 2)
        out: Tensor = m.out(mixed.reshape(n, length, m.heads * m.size))
        return out

    net = Net(call, qkv=nn.Linear(c, 3 * c), out=nn.Linear(c, c))
    net.heads, net.size = heads, c // heads  # type: ignore[assignment]
    return net


def _plain_attention(c: int, k: int) -> nn.Module:
    def call(m: Any, x: Tensor) -> Tensor:
        q, key, v = m.q(x), m.k(x), m.v(x)
        out: Tensor = torch.softmax(q @ key.transpose(1, 2), -1) @ v
        return out

    return Net(call, q=nn.Linear(c, 4), k=nn.Linear(c, 4), v=nn.Linear(c, _width(k)))


def _squeeze_excite(c: int, k: int) -> nn.Module:
    def call(m: Any, x: Tensor) -> Tensor:
        return x * torch.sigmoid(m.b(F.relu(m.a(x.mean((2, 3), keepdim=True)))))

    return Net(call, a=nn.Conv2d(c, 4, 1), b=nn.Conv2d(4, c, 1))


def _shuffle(c: int, k: int) -> nn.Module | None:
    if c % 2:
        return None

    def call(_: Any, x: Tensor) -> Tensor:
        n, channels, h, w = x.shape
        return x.view(n, 2, channels // 2, h, w).transpose(1, 2).reshape(n, -1, h, w)

    return Net(call)


def _norm_last(c: int, k: int) -> nn.Module:
    return Net(lambda m, x: m.n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), n=nn.LayerNorm(c))


def _pad(c: int, k: int) -> nn.Module | None:
    if c > MOST_CHANNELS:
        return None
    return Net(lambda _, x: F.pad(x, (0, 0, 0, 0, k % 3, 1)))


def _split(c: int, k: int) -> nn.Module:
    return Net(lambda _, x: torch.cat([x[:, 2:] * 2, x[:, :2]], 1))


def _assign(c: int, k: int) -> nn.Module:
    def call(_: Any, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, : c // 2] = F.relu(x[:, : c // 2])
        return x

    return Net(call)


def _recurrent(c: int, k: int) -> nn.Module:
    kind = (nn.LSTM, nn.GRU)[k % 2]
    layer = kind(c, 4, 1 + k % 3 // 2, batch_first=True, bidirectional=k % 5 == 0)
    return Net(lambda m, x: m.r(x)[0], r=layer)


def _swiglu(c: int, k: int) -> nn.Module:
    def call(m: Any, x: Tensor) -> Tensor:
        gate, value = m.a(x).chunk(2, -1)
        out: Tensor = m.b(F.silu(gate) * value)
        return out

    return Net(call, a=nn.Linear(c, 2 * _width(k)), b=nn.Linear(_width(k), c))


def _tied(c: int, k: int) -> nn.Module:
    return Net(lambda m, x: F.linear(F.relu(m.a(x)), m.a.weight.t()), a=nn.Linear(c, _width(k)))


def _class_token(c: int, k: int) -> nn.Module:
    def call(m: Any, x: Tensor) -> Tensor:
        return torch.cat([m.token.expand(len(x), -1, -1), x], 1)

    return Net(call, token=_parameter(1, 1, c))


def _even(c: int, by: int, make: Callable[[], nn.Module]) -> nn.Module | None:
    return None if c % by or c == by else make()


ANYWHERE: dict[str, Callable[[int, int], nn.Module | None]] = {
    "relu": lambda c, k: nn.ReLU(),
    "gelu": lambda c, k: nn.GELU(),
    "clamp": lambda c, k: Net(lambda _, x: x.clamp(-1, 1) * 2 - x.abs()),
    "glu": lambda c, k: _even(c, 2, lambda: Net(lambda _, x: F.glu(x, _channel(x)))),
    "gate": lambda c, k: _even(
        c,
        2,
        lambda: Net(lambda _, x: torch.mul(*x.chunk(2, _channel(x)))),
    ),
    "flip": lambda c, k: Net(lambda _, x: x.flip(_channel(x))),
}
OPERATIONS: dict[str, dict[str, Callable[[int, int], nn.Module | None]]] = {
    "image": ANYWHERE
    | {
        "conv": lambda c, k: nn.Conv2d(c, _width(k), 1 + 2 * (k % 2), padding=k % 2),
        "grouped": lambda c, k: _even(c, 2, lambda: nn.Conv2d(c, 2 * _width(k), 1, groups=2)),
        "depthwise": lambda c, k: nn.Conv2d(c, c * (1 + (c < 10) * k % 2), 3, 1, 1, groups=c),
        "transposed": lambda c, k: nn.ConvTranspose2d(c, _width(k), 1),
        "grouped_transposed": lambda c, k: _even(
            c, 2, lambda: nn.ConvTranspose2d(c, _width(k), 1, groups=2)
        ),
        "weight_norm": lambda c, k: weight_norm(nn.Conv2d(c, _width(k), 1)),
        "batch_norm": lambda c, k: nn.BatchNorm2d(c, affine=k % 3 > 0),
        "group_norm": lambda c, k: _even(c, 2, lambda: nn.GroupNorm(2, c)),
        "instance_norm": lambda c, k: nn.InstanceNorm2d(c, affine=k % 2 > 0),
        "norm_last": _norm_last,
        "prelu": lambda c, k: nn.PReLU(c if k % 2 else 1),
        "squeeze_excite": _squeeze_excite,
        "layer_scale": lambda c, k: Net(lambda m, x: x * m.s, s=_parameter(c, 1, 1)),
        "pixel_shuffle": lambda c, k: _even(c, 4, lambda: nn.PixelShuffle(2)),
        "pixel_unshuffle": lambda c, k: nn.PixelUnshuffle(2) if c < 7 else None,
        "shuffle": _shuffle,
        "pad": _pad,
        "split": _split,
        "assign": _assign,
        "pool": lambda c, k: nn.AvgPool2d(2, 1, 1) if k % 2 else nn.MaxPool2d(2, 1),
        "upsample": lambda c, k: nn.Upsample(size=4, mode=("nearest", "bilinear")[k % 2]),
        "einsum": lambda c, k: Net(
            lambda m, x: torch.einsum("nchw,oc->nohw", x, m.w), w=_parameter(_width(k), c)
        ),
        "covariance": lambda c, k: Net(
            lambda _, x: torch.softmax(x.flatten(2) @ x.flatten(2).transpose(1, 2), -1)
        ),
        "to_sequence": lambda c, k: Net(lambda _, x: x.flatten(2).transpose(1, 2)),
        "flatten": lambda c, k: nn.Flatten() if c < 9 else None,
        "mean": lambda c, k: Net(lambda _, x: x.mean((2, 3))),
    },
    "sequence": ANYWHERE
    | {
        "linear": lambda c, k: nn.Linear(c, _width(k)),
        "layer_norm": lambda c, k: nn.LayerNorm(c),
        "attention": _attention,
        "plain_attention": _plain_attention,
        "position": lambda c, k: Net(lambda m, x: x + m.p[: x.shape[1]], p=_parameter(40, c)),
        "class_token": _class_token,
        "recurrent": _recurrent,
        "swiglu": _swiglu,
        "mixer": lambda c, k: Net(
            lambda m, x: m.a(x.transpose(1, 2)).transpose(1, 2), a=nn.Conv1d(c, 6, 1)
        ),
        "roll": lambda c, k: Net(lambda _, x: x.roll(1, 1)),
        "sum": lambda c, k: Net(lambda _, x: x.sum(1)),
        "last": lambda c, k: Net(lambda _, x: x[:, -1]),
    },
    "flat": ANYWHERE
    | {
        "linear": lambda c, k: nn.Linear(c, _width(k)),
        "batch_norm": lambda c, k: nn.BatchNorm1d(c),
        "prelu": lambda c, k: nn.PReLU(c),
        "twice": lambda c, k: Net(lambda m, x: m.a(F.relu(m.a(x))), a=nn.Linear(c, c)),
        "tied": _tied,
        "swiglu": _swiglu,
        "outer": lambda c, k: (
            Net(lambda m, x: (x.unsqueeze(2) * m.v).flatten(1), v=_parameter(3)) if c < 9 else None
        ),
        "product": lambda c, k: Net(lambda m, x: x @ m.w, w=_parameter(c, _width(k))),
    },
}
