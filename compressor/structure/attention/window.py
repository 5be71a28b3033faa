"""Attention within windows of an image, with widths of its own.

torchvision's Swin (Liu et al., 2021), Swin V2 (Liu et al., 2022) and MaxViT (Tu et al., 2022).
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.structure.attention.heads import (
    copy_linear,
    copy_part,
    join_heads,
    split_heads,
)

MAX_LOGIT_SCALE = math.log(100)  # Swin V2, section 3.2
APART = -100.0  # added to the scores of two tokens that the shift made neighbours; Swin's value


class PrunableWindowAttention(nn.Module):
    """What a `ShiftedWindowAttention` or a `ShiftedWindowAttentionV2` of torchvision computes.

    A head is `head_dim` outputs of `q`, `k` and `v`, as many inputs of `out`, a column of
    `relative_position_bias_table` or an output of `cpb_mlp`, and an entry of `logit_scale`.

    Args:
        attention: the module that it equals. Its weights are copied.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.head_dim: int = attention.qkv.out_features // 3 // attention.num_heads
        self.window_size: tuple[int, ...] = tuple(attention.window_size)
        self.shift_size: tuple[int, ...] = tuple(attention.shift_size)
        self.attention_dropout: float = attention.attention_dropout
        self.dropout: float = attention.dropout
        self.q, self.k, self.v = (copy_linear(attention.qkv, part, 3) for part in range(3))
        self.out = copy_linear(attention.proj)
        self.relative_position_index: Tensor
        self.relative_coords_table: Tensor
        self.register_buffer("relative_position_index", attention.relative_position_index.clone())
        if hasattr(attention, "logit_scale"):
            self.k.register_parameter("bias", None)  # V2 takes it for zero, whatever it holds
            self.logit_scale: nn.Parameter | None = copy_part(attention.logit_scale)
            self.register_buffer("relative_coords_table", attention.relative_coords_table.clone())
            self.cpb_mlp = copy.deepcopy(attention.cpb_mlp)
        else:
            self.register_parameter("logit_scale", None)
            self.relative_position_bias_table = copy_part(attention.relative_position_bias_table)
        self.train(attention.training)

    @property
    def num_heads(self) -> int:
        """Heads that are there."""
        return self.q.out_features // self.head_dim

    def forward(self, x: Tensor) -> Tensor:
        """(N, height, width, channels) -> the same shape."""
        count, height, width, _ = x.shape
        padded = [size + -size % w for size, w in zip(x.shape[1:3], self.window_size, strict=True)]
        x = F.pad(x, (0, 0, 0, padded[1] - width, 0, padded[0] - height))
        # A window that holds the whole of an axis has nowhere to go.
        shift = [
            s if w < size else 0
            for s, w, size in zip(self.shift_size, self.window_size, padded, strict=True)
        ]
        is_shifted = any(shift)
        if is_shifted:
            x = x.roll((-shift[0], -shift[1]), (1, 2))
        mask = self.position_bias().unsqueeze(0)
        if is_shifted:
            mask = mask + shift_mask(padded, self.window_size, shift, mask)
            mask = mask.expand(count, -1, -1, -1, -1).flatten(0, 1)
        x = self._attend(cut_windows(x, self.window_size), mask)
        x = join_windows(x, self.window_size, padded)
        if is_shifted:
            x = x.roll((shift[0], shift[1]), (1, 2))
        return x[:, :height, :width].contiguous()

    def position_bias(self) -> Tensor:
        """What the places of two tokens in a window add to their score: (heads, tokens, tokens)."""
        if self.logit_scale is None:
            return look_up(self.relative_position_bias_table, self.relative_position_index)
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)
        return 16 * look_up(table, self.relative_position_index).sigmoid()

    def _attend(self, x: Tensor, mask: Tensor) -> Tensor:
        """(windows, tokens, channels) -> the same shape."""
        q, k, v = (split_heads(layer(x), self.head_dim) for layer in (self.q, self.k, self.v))
        scale = self.head_dim**-0.5
        if self.logit_scale is not None:
            q = F.normalize(q, dim=-1) * self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
            k, scale = F.normalize(k, dim=-1), 1.0
        dropout = self.attention_dropout if self.training else 0.0
        heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        return F.dropout(self.out(join_heads(heads)), self.dropout, self.training)


class PrunableGridAttention(nn.Module):
    """What a `RelativePositionalMultiHeadAttention` of torchvision's MaxViT computes.

    A head is `head_dim` outputs of `q`, `k` and `v`, as many inputs of `out`, and a column of
    `relative_position_bias_table`.

    Args:
        attention: the module that it equals. Its weights are copied.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.head_dim: int = attention.head_dim
        self.scale: float = attention.scale_factor
        self.q, self.k, self.v = (copy_linear(attention.to_qkv, part, 3) for part in range(3))
        self.out = copy_linear(attention.merge)
        self.relative_position_bias_table = copy_part(attention.relative_position_bias_table)
        self.relative_position_index: Tensor
        self.register_buffer("relative_position_index", attention.relative_position_index.clone())
        self.train(attention.training)

    @property
    def num_heads(self) -> int:
        """Heads that are there."""
        return self.q.out_features // self.head_dim

    def forward(self, x: Tensor) -> Tensor:
        """(N, windows, tokens, channels) -> the same shape."""
        windows = x.flatten(0, 1)
        q, k, v = (split_heads(layer(windows), self.head_dim) for layer in (self.q, self.k, self.v))
        bias = look_up(self.relative_position_bias_table, self.relative_position_index)
        heads = F.scaled_dot_product_attention(q, k, v, bias.unsqueeze(0), scale=self.scale)
        output: Tensor = self.out(join_heads(heads))
        return torch.unflatten(output, 0, x.shape[:2])


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """The entries of all pairs of tokens: (places, heads) -> (heads, tokens, tokens).

    Args:
        table: one row for each distance of two tokens.
        index: tokens * tokens numbers of rows, in any shape.
    """
    tokens = math.isqrt(index.numel())
    return torch.unflatten(table[index.flatten()], 0, (tokens, tokens)).permute(2, 0, 1)


def cut_windows(x: Tensor, window: tuple[int, ...]) -> Tensor:
    """(N, height, width, channels) -> (N * windows, tokens, channels); the sides are multiples."""
    x = torch.unflatten(torch.unflatten(x, 2, (-1, window[1])), 1, (-1, window[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def join_windows(x: Tensor, window: tuple[int, ...], size: list[int]) -> Tensor:
    """The inverse of `cut_windows`; `size` is (height, width)."""
    rows, columns = size[0] // window[0], size[1] // window[1]
    x = torch.unflatten(torch.unflatten(x, 1, window), 0, (-1, rows, columns))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def shift_mask(size: list[int], window: tuple[int, ...], shift: list[int], like: Tensor) -> Tensor:
    """Keeps apart what a cyclic shift brought together: (windows, 1, tokens, tokens).

    Args:
        size: height and width, multiples of `window`.
        window: its height and width.
        shift: by how much the image was rolled up and left.
        like: gives dtype and device.
    """
    rows, columns = (
        _regions(*axis, device=like.device) for axis in zip(size, window, shift, strict=True)
    )
    regions = 3 * rows[:, None] + columns
    tokens = cut_windows(regions[None, :, :, None], window).squeeze(2)
    is_apart = (tokens[:, :, None] != tokens[:, None, :]).unsqueeze(1)
    return like.new_zeros(is_apart.shape).masked_fill(is_apart, APART)


def _regions(size: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Of each place along an axis: 2 if it came from the other edge, 1 if just before, else 0."""
    place = torch.arange(size, device=device)
    if not shift:
        return torch.zeros_like(place)
    return (place >= size - window).long() + (place >= size - shift).long()
