"""A convolution or linear layer as a chain of smaller ones, and what each form of it needs.

| form      | layers in their order                          | for                            |
|-----------|------------------------------------------------|--------------------------------|
| "svd"     | in -> r, r -> out                              | linear and 1×1 convolutions    |
| "spatial" | k×1 in -> r, 1×k r -> out                      | 2-D convolutions               |
| "tucker2" | 1×1 in -> r1, k×k r1 -> r0, 1×1 r0 -> out      | convolutions of any dimensions |
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from math import isqrt, prod
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from compressor.errors import SurgeryError, suggest
from compressor.structure import surgery
from compressor.structure.low_rank import second_moment, spatial_svd, tucker2, whitened_svd

Layer: TypeAlias = _ConvNd | nn.Linear

SVD, SPATIAL, TUCKER2 = "svd", "spatial", "tucker2"
MOST_ROWS = 8192  # of inputs that a second moment is taken over
MOST_ENTRIES = 2**24  # of them; 64 MB in float32


class Factored(nn.Sequential):
    """A layer as a chain of two or three: `first`, for Tucker-2 `core`, and `last`, with the bias.

    Attributes:
        form: "svd", "spatial" or "tucker2".
    """

    form: str

    def __init__(self, form: str, layers: Mapping[str, Layer]) -> None:
        super().__init__(OrderedDict(layers))
        self.form = form

    @property
    def layers(self) -> list[Layer]:
        """In the order in which they run."""
        return [cast(Layer, layer) for layer in self]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Channels between the layers: (r,), for Tucker-2 (before `last`, behind `first`)."""
        return tuple(widths(layer)[1] for layer in reversed(self.layers[:-1]))

    def extra_repr(self) -> str:
        """The form, which the layers do not tell."""
        return self.form


def widths(layer: Layer) -> tuple[int, int]:
    """Channels or features that a layer takes, and that it makes."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def forms_of(layer: nn.Module) -> tuple[str, ...]:
    """The forms that a layer can take; none for grouped and transposed convolutions."""
    if type(layer) is nn.Linear:
        return (SVD,)
    if type(layer) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return ()
    conv = cast(_ConvNd, layer)
    if conv.groups != 1:
        return ()
    if prod(conv.kernel_size) == 1:
        return (SVD,)
    is_spatial = len(conv.kernel_size) == 2 and min(conv.kernel_size) > 1
    return (TUCKER2, SPATIAL) if is_spatial else (TUCKER2,)


def check_form(layer: nn.Module, form: str) -> None:
    """Raise a SurgeryError if a layer does not have a form."""
    if form not in forms_of(layer):
        raise SurgeryError(
            f"{layer} has no low-rank form {form!r}. "
            f"Its forms: {', '.join(forms_of(layer)) or 'none'}."
        )


def full_ranks(form: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The ranks at which a form gives back any weight of this shape."""
    if form == SVD:
        return (min(shape[:2]),)
    if form == SPATIAL:
        return (min(shape[0] * shape[3], shape[1] * shape[2]),)
    if form == TUCKER2:
        return (min(shape[0], prod(shape[1:])), min(shape[1], prod(shape) // shape[1]))
    raise SurgeryError(f"There is no low-rank form {form!r}. {suggest(form, FORMS)}")


FORMS = (SVD, SPATIAL, TUCKER2)


def weight_entries(form: str, ranks: Sequence[int], shape: Sequence[int]) -> int:
    """Entries of the factors of a weight of this shape, the bias not counted."""
    outputs, inputs = shape[:2]
    if form == SVD:
        return ranks[0] * (inputs + outputs)
    if form == SPATIAL:
        return ranks[0] * (inputs * shape[2] + outputs * shape[3])
    return outputs * ranks[0] + prod(ranks) * prod(shape[2:]) + ranks[1] * inputs


def ranks_for(form: str, shape: Sequence[int], kept_fraction: float) -> tuple[int, ...]:
    """The largest ranks whose factors have at most this fraction of the weight's entries.

    The two ranks of Tucker-2 are the same share of their sides. 0 where not even rank 1 fits.

    >>> ranks_for("svd", (64, 64), kept_fraction=0.5)
    (16,)
    """
    most = int(kept_fraction * prod(shape))
    full = full_ranks(form, shape)
    if form != TUCKER2:
        return (min(most // weight_entries(form, (1,), shape), *full),)
    # share² · out · in · k + share · (out² + in²) = most
    square, linear = prod(shape), shape[0] ** 2 + shape[1] ** 2
    share = 2 * most / (linear + isqrt(linear**2 + 4 * square * most))
    return tuple(min(int(share * side), limit) for side, limit in zip(shape[:2], full, strict=True))


def settled_ranks(form: str, ranks: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """`ranks` cut to what a weight of this shape has; () if the factors would not be smaller.

    A layer that lost channels after its ranks were chosen may be better off whole.
    """
    settled = tuple(
        min(rank, most) for rank, most in zip(ranks, full_ranks(form, shape), strict=True)
    )
    is_smaller = weight_entries(form, settled, shape) < prod(shape)
    return settled if is_smaller and min(settled) > 0 else ()


def blank(layer: Layer, form: str, ranks: Sequence[int]) -> Factored:
    """A chain in place of `layer`, on the current default device, with random weights."""
    if isinstance(layer, nn.Linear):
        first = nn.Linear(layer.in_features, ranks[0], bias=False)
        last = nn.Linear(ranks[0], layer.out_features, bias=layer.bias is not None)
        return Factored(form, {"first": first, "last": last})
    taken, made = widths(layer)
    has_bias = layer.bias is not None
    if form == SVD:
        parts = {
            "first": _conv(layer, taken, ranks[0], range(len(layer.kernel_size))),
            "last": _conv(layer, ranks[0], made, (), bias=has_bias),
        }
    elif form == SPATIAL:
        parts = {
            "first": _conv(layer, taken, ranks[0], (0,)),
            "last": _conv(layer, ranks[0], made, (1,), bias=has_bias),
        }
    else:
        parts = {
            "first": _conv(layer, taken, ranks[1], ()),
            "core": _conv(layer, ranks[1], ranks[0], range(len(layer.kernel_size))),
            "last": _conv(layer, ranks[0], made, (), bias=has_bias),
        }
    return Factored(form, parts)


def factorize(
    layer: Layer, form: str, ranks: Sequence[int], moment: Tensor | None = None
) -> Factored:
    """A chain that computes what `layer` does, as nearly as `ranks` let it. `layer` is not changed.

    Args:
        layer: one that has this form, of `forms_of`.
        form: "svd", "spatial" or "tucker2".
        ranks: one; for Tucker-2 those of the outputs and of the inputs.
        moment: of `input_moment(layer, form, …)`; None takes the inputs as white.

    Raises:
        SurgeryError: if the layer does not have the form, or a rank is out of range.
    """
    check_form(layer, form)
    weight = layer.weight.detach()
    with torch.device("meta"):
        made = blank(layer, form, ranks)
    for part, values in zip(made.layers, _factors(weight, form, ranks, moment), strict=True):
        values = values.reshape(part.weight.shape).contiguous()  # as it will be when loaded
        part.weight = nn.Parameter(values, requires_grad=layer.weight.requires_grad)
    last = made.layers[-1]
    if layer.bias is not None:
        last.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
    return made.train(layer.training)


def input_moment(layer: Layer, form: str, inputs: Tensor) -> Tensor:
    """The second moment of what a layer reads, as its form wants it: (d, d) in float64.

    Args:
        layer: that reads `inputs`.
        form: "svd" and "tucker2" want the channels, d = in; "spatial" the vertical patches,
            d = in * height of the kernel.
        inputs: of one call, or of some samples of it.
    """
    if isinstance(layer, nn.Linear):
        rows = inputs.detach().reshape(-1, layer.in_features)
        return second_moment(_evenly(rows))
    height = layer.kernel_size[0] if form == SPATIAL else 1
    samples = inputs.detach() if inputs.dim() == layer.weight.dim() else inputs.detach()[None]
    samples = samples[: max(MOST_ENTRIES // (samples[0].numel() * height), 1)]
    if form == SPATIAL:
        samples = F.unfold(
            samples,
            (height, 1),
            dilation=(layer.dilation[0], 1),
            padding=(_padding(layer), 0),
            stride=(layer.stride[0], 1),
        )
    return second_moment(_evenly(samples.flatten(2).transpose(1, 2).flatten(0, 1)))


def chain_macs(layers: Sequence[Layer], input_shape: Sequence[int]) -> int:
    """MACs of one call of layers that run one after another, none of them transposed.

    Args:
        layers: as they are called.
        input_shape: of the first.

    >>> chain_macs([nn.Conv2d(16, 32, 3, padding=1)], (1, 16, 8, 8))
    294912
    """
    outputs = chain_shapes(layers, input_shape)[1:]
    made = zip(layers, outputs, strict=True)
    return sum(prod(shape) * prod(layer.weight.shape[1:]) for layer, shape in made)


def chain_shapes(layers: Sequence[Layer], input_shape: Sequence[int]) -> list[tuple[int, ...]]:
    """The shape that each layer of a chain takes, and at the end what the last one makes."""
    shapes = [tuple(input_shape)]
    for layer in layers:
        shapes.append(_output_shape(layer, shapes[-1]))
    return shapes


def factor_names(model: nn.Module, name: str) -> tuple[str, ...]:
    """The layers that stand for the layer `name` in `model`: itself, or its factors.

    Raises:
        SurgeryError: if there is no such module.
    """
    module = surgery.get(model, name)
    if not isinstance(module, Factored):
        return (name,)
    return tuple(f"{name}.{key}" for key, _ in module.named_children())


def _factors(
    weight: Tensor, form: str, ranks: Sequence[int], moment: Tensor | None
) -> tuple[Tensor, ...]:
    """In the order in which they run."""
    if form == TUCKER2:
        return tuple(reversed(tucker2(weight, ranks, moment)))
    if form == SPATIAL:
        return tuple(reversed(spatial_svd(weight, ranks[0], moment)))
    return tuple(reversed(whitened_svd(weight.flatten(1), ranks[0], moment)))


def _conv(
    layer: _ConvNd, inputs: int, outputs: int, dims: Sequence[int], *, bias: bool = False
) -> _ConvNd:
    """A convolution that is `layer` along the dimensions `dims` of its kernel, and 1 wide else."""
    every = range(len(layer.kernel_size))

    def along(sizes: tuple[int, ...], other: int) -> tuple[int, ...]:
        return tuple(sizes[dim] if dim in dims else other for dim in every)

    if not dims:
        padding: str | tuple[int, ...] = along((0,) * len(every), 0)
    else:
        padding = layer.padding if isinstance(layer.padding, str) else along(layer.padding, 0)
    cls: Any = type(layer)
    made: _ConvNd = cls(
        inputs,
        outputs,
        along(layer.kernel_size, 1),
        stride=along(layer.stride, 1),
        padding=padding,
        dilation=along(layer.dilation, 1),
        bias=bias,
        padding_mode=layer.padding_mode if dims else "zeros",
    )
    return made


def _output_shape(layer: Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return (*shape[:-1], layer.out_features)
    dims = len(layer.kernel_size)
    if layer.padding == "same":
        return (*shape[: -dims - 1], layer.out_channels, *shape[-dims:])
    padding = (0,) * dims if isinstance(layer.padding, str) else layer.padding
    sizes = (
        (size + 2 * padding[i] - layer.dilation[i] * (layer.kernel_size[i] - 1) - 1)
        // layer.stride[i]
        + 1
        for i, size in enumerate(shape[-dims:])
    )
    return (*shape[: -dims - 1], layer.out_channels, *sizes)


def _padding(layer: _ConvNd) -> int:
    """Zeros above a vertical patch; of an uneven 'same' padding the smaller half."""
    if layer.padding == "same":
        return int(layer.dilation[0] * (layer.kernel_size[0] - 1) // 2)
    return 0 if isinstance(layer.padding, str) else int(layer.padding[0])


def _evenly(rows: Tensor) -> Tensor:
    return rows[:: -(-len(rows) // MOST_ROWS)]
