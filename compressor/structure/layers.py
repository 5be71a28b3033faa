"""Which tensors of torch's layers hold their channels, and which of their integers count them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from compressor.errors import SurgeryError
from compressor.structure.groups import Member, Side

COUNTED = (  # whose integers `count_channels` sets
    _ConvNd,
    nn.Linear,
    _NormBase,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.PReLU,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
)


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
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
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


def layer_members(
    name: str, layer: nn.Module, side: Side, index: Sequence[Sequence[int]]
) -> tuple[Member, ...]:
    """The members of a group on one side of the layer `name`.

    Args:
        name: of the layer.
        layer: one that `layer_axis` knows.
        side: of it.
        index: for each channel of the group, the entries of that side.
    """
    axis = layer_axis(layer, side)
    owned = tuple(tuple(entries) for entries in index)
    return tuple(
        Member(f"{name}.{key}" if name else key, dim, side, owned, axis.size)
        for key, dim in axis.tensors
        if getattr(layer, key, None) is not None
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


def block_size(layer: nn.Module, key: str, dim: int) -> int:
    """How many neighbouring entries of a tensor of `layer` can only be kept or removed together."""
    if isinstance(layer, _ConvNd) and layer.groups > 1 and dim == 0:
        is_in = isinstance(layer, _ConvTransposeNd) and key == "weight"
        return (layer.in_channels if is_in else layer.out_channels) // layer.groups
    if isinstance(layer, nn.GroupNorm) and layer.num_groups > 1:
        return layer.num_channels // layer.num_groups
    return 1


def count_channels(layer: nn.Module) -> None:
    """Set the integers of one of torch's layers by the shapes of its tensors, in place.

    Raises:
        SurgeryError: if the shapes do not fit each other.
    """
    if isinstance(layer, _ConvNd):
        _count_conv(layer)
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
        _check_equal(layer, layer.out_features, "bias")
    elif isinstance(layer, _NormBase):
        for key in ("weight", "running_mean"):
            if getattr(layer, key, None) is not None:
                layer.num_features = len(getattr(layer, key))
        _check_equal(layer, layer.num_features, "weight", "bias", "running_mean", "running_var")
    elif isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) and layer.weight is not None:
        layer.normalized_shape = tuple(layer.weight.shape)
        _check_equal(layer, layer.normalized_shape[0], "bias")
    elif isinstance(layer, nn.GroupNorm) and layer.weight is not None:
        whole = layer.num_channels // layer.num_groups
        layer.num_channels = len(layer.weight)
        if layer.num_groups > 1:
            layer.num_groups = layer.num_channels // whole
        _check_equal(layer, layer.num_channels, "bias")
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(layer.weight)
    elif isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        layer.num_embeddings, layer.embedding_dim = layer.weight.shape
    elif isinstance(layer, nn.RNNBase):
        layer.hidden_size = _columns(layer, "weight_hh_l0")
        layer.input_size = _columns(layer, "weight_ih_l0")
    elif isinstance(layer, nn.RNNCellBase):
        layer.hidden_size = _columns(layer, "weight_hh")
        layer.input_size = _columns(layer, "weight_ih")


def _columns(layer: nn.Module, key: str) -> int:
    return int(getattr(layer, key).shape[1])


def _count_conv(conv: _ConvNd) -> None:
    is_transposed = isinstance(conv, _ConvTransposeNd)
    whole, part = conv.weight.shape[:2]  # dimension 0 runs over all groups, dimension 1 over one's
    before = conv.in_channels if is_transposed else conv.out_channels
    if conv.groups > 1:  # whole groups were removed
        conv.groups = conv.groups * whole // before
    inner, outer = (whole, part * conv.groups) if is_transposed else (part * conv.groups, whole)
    conv.in_channels, conv.out_channels = inner, outer
    _check_equal(conv, outer, "bias")


def _check_equal(layer: nn.Module, size: int, *keys: str) -> None:
    for key in keys:
        tensor = getattr(layer, key, None)
        if tensor is not None and tensor.shape[0] != size:
            raise SurgeryError(
                f"A {type(layer).__name__} would have {size} channels and a {key} of "
                f"{tensor.shape[0]}. Cut all its tensors with one group."
            )
