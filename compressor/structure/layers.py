"""Where the channels of each layer class lie in its tensors, and which attribute counts them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from compressor.errors import SurgeryError
from compressor.structure.groups import Side


@dataclass(frozen=True)
class Axis:
    """One side of a layer.

    Attributes:
        size: number of entries.
        tensors: (name, dimension) of each parameter and buffer that has these entries.
        blocks: above 1, the entries fall into so many equal blocks that can only be kept whole.
    """

    size: int
    tensors: tuple[tuple[str, int], ...]
    blocks: int = 1

    def block_of(self, entry: int) -> int:
        """The block that holds `entry`."""
        return entry // (self.size // self.blocks)


def layer_axis(layer: nn.Module, side: Side) -> Axis:
    """The channels of `layer` on one side. A norm or a PReLU has the same ones on both.

    Raises:
        SurgeryError: if the class of the layer is not known.
    """
    if isinstance(layer, _ConvNd):
        return _conv_axis(layer, side)
    if isinstance(layer, nn.Linear):
        if side == "in":
            return Axis(layer.in_features, (("weight", 1),))
        return Axis(layer.out_features, (("weight", 0), ("bias", 0)))
    if isinstance(layer, _NormBase):
        tensors = ("weight", "bias", "running_mean", "running_var")
        return Axis(layer.num_features, tuple((name, 0) for name in tensors))
    if isinstance(layer, nn.LayerNorm):
        last = len(layer.normalized_shape) - 1
        return Axis(layer.normalized_shape[-1], (("weight", last), ("bias", last)))
    if isinstance(layer, nn.GroupNorm):
        return Axis(layer.num_channels, (("weight", 0), ("bias", 0)), layer.num_groups)
    if isinstance(layer, nn.PReLU) and layer.num_parameters > 1:
        return Axis(layer.num_parameters, (("weight", 0),))
    if isinstance(layer, nn.Embedding) and side == "out":
        return Axis(layer.embedding_dim, (("weight", 1),))
    raise SurgeryError(
        f"The {side} channels of a {type(layer).__name__} cannot be sliced. "
        "Exclude the layer, or build it from nn.Linear, nn.Conv, nn.BatchNorm and their like."
    )


def _conv_axis(conv: _ConvNd, side: Side) -> Axis:
    """The channels of a convolution; with `groups` > 1 its weights hold them a group at a time."""
    flat, shared = (1, 0) if isinstance(conv, _ConvTransposeNd) else (0, 1)
    size = conv.out_channels if side == "out" else conv.in_channels
    bias = (("bias", 0),) if side == "out" else ()
    if conv.groups == 1:
        return Axis(size, (("weight", flat if side == "out" else shared), *bias))
    # Dimension 0 of a weight runs over all groups, dimension 1 over the channels of one of them.
    whole: Side = "in" if isinstance(conv, _ConvTransposeNd) else "out"
    weight = (("weight", 0),) if side == whole else ()
    return Axis(size, (*weight, *bias), conv.groups)


def set_channels(layer: nn.Module, side: Side, size: int) -> None:
    """Write the new number of channels into the attributes of `layer`, in place."""
    if isinstance(layer, _ConvNd):
        per_group = (layer.out_channels if side == "out" else layer.in_channels) // layer.groups
        if side == "out":
            layer.out_channels = size
            if layer.groups > 1:  # whole groups were removed, from both sides alike
                layer.groups = size // per_group
        else:
            layer.in_channels = size
    elif isinstance(layer, nn.Linear):
        if side == "out":
            layer.out_features = size
        else:
            layer.in_features = size
    elif isinstance(layer, _NormBase):
        layer.num_features = size
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = (*layer.normalized_shape[:-1], size)
    elif isinstance(layer, nn.GroupNorm):
        if layer.num_groups > 1:  # whole groups were removed
            layer.num_groups = size * layer.num_groups // layer.num_channels
        layer.num_channels = size
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = size
    else:
        cast(nn.Embedding, layer).embedding_dim = size
