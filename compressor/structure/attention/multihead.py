"""`nn.MultiheadAttention` with a width of its own (Vaswani et al., 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ModelError
from compressor.structure.attention.heads import (
    copy_linear,
    copy_part,
    join_heads,
    make_linear,
    split_heads,
)


class PrunableMultiheadAttention(nn.Module):
    """What an `nn.MultiheadAttention` computes; its heads are outputs of `q`, `k` and `v`.

    It is called in the same way, and may stand in torch's transformer layers, which then take
    their ordinary path. Removing a head takes `head_dim` rows from `q`, `k` and `v` (and from
    `bias_k` and `bias_v`) and as many columns from `out`. Averaged weights are means over the heads
    that are there.

    Args:
        attention: the module that it equals. Its weights are copied.
    """

    # Keeps `nn.TransformerEncoderLayer` from its fast path, which takes q, k and v as one matrix.
    _qkv_same_embed_dim: bool = False

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.head_dim: int = attention.head_dim
        self.batch_first: bool = attention.batch_first
        self.dropout: float = attention.dropout
        self.add_zero_attn: bool = attention.add_zero_attn
        self.q, self.k, self.v = _projections(attention)
        self.out = copy_linear(attention.out_proj)
        self.bias_k: nn.Parameter | None
        self.bias_v: nn.Parameter | None
        self.register_parameter("bias_k", copy_part(attention.bias_k))
        self.register_parameter("bias_v", copy_part(attention.bias_v))
        self.train(attention.training)

    @property
    def num_heads(self) -> int:
        """Heads that are there."""
        return self.q.out_features // self.head_dim

    @property
    def embed_dim(self) -> int:
        """Features of a query."""
        return self.q.in_features

    # `nn.TransformerEncoder` asks its first layer for these, for their device and `requires_grad`.
    @property
    def in_proj_weight(self) -> Tensor:
        """That of the queries alone."""
        return self.q.weight

    @property
    def in_proj_bias(self) -> Tensor | None:
        """That of the queries alone."""
        return self.q.bias

    @property
    def out_proj(self) -> nn.Linear:
        """As torch calls `out`."""
        return self.out

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The output and, if asked for, the weights, as of `nn.MultiheadAttention`.

        Args:
            query: (N, L, E) if `batch_first`, else (L, N, E); or (L, E). A nested tensor of N
                sequences gives one back.
            key: (N, S, kdim), (S, N, kdim) or (S, kdim).
            value: (N, S, vdim), (S, N, vdim) or (S, vdim).
            key_padding_mask: (N, S) or (S,); True where a key is not seen, or floats to add.
            need_weights: whether to return the weights, which takes longer.
            attn_mask: (L, S) or (N * num_heads, L, S); booleans or floats, as above.
            average_attn_weights: weights (N, L, S), else (N, num_heads, L, S).
            is_causal: promises that `attn_mask` is the causal one.

        Raises:
            ModelError: if `is_causal` is promised of no mask, or a nested tensor comes with one.
        """
        if query.is_nested:
            if attn_mask is not None or key_padding_mask is not None or not self.batch_first:
                raise ModelError(
                    "Nested tensors come without masks, and to attention that has "
                    "batch_first=True. Give padded tensors."
                )
            return self._forward_nested(query, key, value, need_weights, average_attn_weights)
        if is_causal and attn_mask is None:
            raise ModelError(
                "is_causal=True promises that attn_mask is causal, and there is no attn_mask. "
                "Make one with nn.Transformer.generate_square_subsequent_mask."
            )
        # As torch: the promise is taken at its word where nothing else is to be added.
        is_causal = is_causal and key_padding_mask is None and not need_weights
        if is_causal:
            attn_mask = None
        is_batched = query.dim() == 3
        if not is_batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        masks = (attn_mask, key_padding_mask)
        output, weights = self._attend(query, key, value, *masks, is_causal, need_weights)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not is_batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _forward_nested(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As `forward`, with the lengths of the sequences as a mask."""
        lengths = torch.tensor([len(keys) for keys in key.unbind()], device=key.device)
        q, k, v = (torch.nested.to_padded_tensor(x, 0.0) for x in (query, key, value))
        mask = torch.arange(k.shape[1], device=k.device) >= lengths[:, None]
        padded, weights = self.forward(q, k, v, mask, need_weights, None, average)
        pairs = zip(padded, query.unbind(), strict=True)
        return torch.nested.as_nested_tensor([out[: len(own)] for out, own in pairs]), weights

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """As `forward`, of (N, length, features), with weights (N, heads, L, S)."""
        q = split_heads(self.q(query), self.head_dim)
        k = split_heads(self._lengthened(self.k(key), self.bias_k), self.head_dim)
        v = split_heads(self._lengthened(self.v(value), self.bias_v), self.head_dim)
        added = (self.bias_k is not None) + self.add_zero_attn
        mask = merge_masks(attn_mask, key_padding_mask, q, added)
        dropout = self.dropout if self.training else 0.0
        scale = self.head_dim**-0.5  # written out, as the head's width is not to be pruned
        if not need_weights:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=scale)
            return self.out(join_heads(heads)), None
        scores = (q * scale) @ k.transpose(-2, -1)
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        return self.out(join_heads(weights @ v)), weights

    def _lengthened(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(N, S, width) with the learned entry and the zero one that are seen beside the others."""
        if bias is not None:
            x = torch.cat((x, bias.expand(x.shape[0], -1, -1)), dim=1)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x


def merge_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, added: int
) -> Tensor | None:
    """What is added to the scores: broadcasts to (N, heads, L, S + added).

    Args:
        attn_mask: (L, S) or (N * heads, L, S), boolean (True: not seen) or float.
        key_padding_mask: (N, S), likewise.
        q: (N, heads, L, head_dim).
        added: number of keys that every query sees, behind the others.
    """
    masks = []
    if attn_mask is not None:
        mask = _to_be_added(attn_mask, q)
        masks.append(torch.unflatten(mask, 0, q.shape[:2]) if mask.dim() == 3 else mask)
    if key_padding_mask is not None:
        masks.append(_to_be_added(key_padding_mask, q)[:, None, None])
    if not masks:
        return None
    merged = masks[0] if len(masks) == 1 else masks[0] + masks[1]
    return F.pad(merged, (0, added)) if added else merged


def _to_be_added(mask: Tensor, q: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return q.new_zeros(mask.shape).masked_fill(mask, float("-inf"))
    return mask.to(q.dtype)


def _projections(attention: nn.MultiheadAttention) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    if attention.in_proj_weight is None:
        weights = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
        copies = [copy_part(weight) for weight in weights]
    else:
        copies = [copy_part(attention.in_proj_weight, part, 3) for part in range(3)]
    biases = [copy_part(attention.in_proj_bias, part, 3) for part in range(3)]
    q, k, v = map(make_linear, copies, biases)
    return q, k, v
