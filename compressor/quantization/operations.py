"""The operations that quantization knows, by what becomes of the numbers in them."""

from __future__ import annotations

from typing import Any

import torch

aten: Any = torch.ops.aten
CONVOLUTIONS = frozenset(
    {
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        aten.conv1d.padding,
        aten.conv2d.padding,
        aten.conv3d.padding,
    }
)
LINEAR = aten.linear.default
LSTM = aten.lstm.input
EMBEDDING = aten.embedding.default
CLIPPING = frozenset(
    {
        aten.relu.default,
        aten.relu6.default,
        aten.hardtanh.default,
        aten.clamp.default,
        aten.clamp_min.default,
    }
)
MOVING = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.dropout.default,
        aten.expand.default,
        aten.flatten.using_ints,
        aten.max_pool1d.default,
        aten.max_pool2d.default,
        aten.max_pool3d.default,
        aten.permute.default,
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.t.default,
        aten.transpose.int,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.view.default,
    }
)
SPLITTING = frozenset(
    {
        aten.chunk.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unbind.int,
    }
)
PADDING = frozenset({aten.pad.default, aten.constant_pad_nd.default})
# in the runtime they are one operation each, with an integer kernel
COMPUTING = frozenset(
    {
        aten.add.Tensor,
        aten.avg_pool2d.default,
        aten.cat.default,
        aten.leaky_relu.default,
        aten.mul.Tensor,
        aten.sigmoid.default,
    }
)
BINARY = frozenset({aten.add.Tensor, aten.mul.Tensor})
