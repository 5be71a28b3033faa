"""Multiply-accumulates of ATen operations: a table of formulas, and a table of what counts as none.

One MAC is one product that is added to a sum. Element-wise arithmetic, normalisation, pooling and
softmax count as none, as is usual; an operation in neither table is reported, not guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

Formula = Callable[[tuple[Any, ...], Any], int]  # arguments, result -> MACs


def macs_of(operation: OpOverload, args: tuple[Any, ...], result: Any) -> int | None:
    """MACs of one call of an ATen operation; None if it is in neither table.

    >>> a, b = torch.ones(2, 3), torch.ones(3, 5)
    >>> macs_of(torch.ops.aten.mm.default, (a, b), a @ b)
    30
    """
    name = operation.overloadpacket.__name__
    if operation.namespace == "aten" and name in FORMULAS:
        return FORMULAS[name](args, result)
    return 0 if _is_free(operation, name) else None


def _is_free(operation: OpOverload, name: str) -> bool:
    if operation.namespace in {"prim", "profiler"}:
        return True
    if operation.namespace != "aten":
        return False
    is_tagged = torch.Tag.pointwise in operation.tags or operation.is_view
    return is_tagged or name.removesuffix("_") in FREE


def _product(args: tuple[Any, ...], result: Tensor) -> int:
    """`a @ b`: one MAC for each entry of the result and of the dimension summed over."""
    return result.numel() * int(args[0].shape[-1])


def _added_product(args: tuple[Any, ...], result: Tensor) -> int:
    """`c + a @ b`."""
    return result.numel() * int(args[1].shape[-1])


def _summed_product(args: tuple[Any, ...], _: Tensor) -> int:
    """`c + sum of a[i] @ b[i]`."""
    return int(args[1].numel()) * int(args[2].shape[-1])


def _convolution(args: tuple[Any, ...], result: Tensor) -> int:
    """The weight is (out, in / groups, …), transposed (in, out / groups, …); padding counts."""
    source, weight, is_transposed = args[0], args[1], args[6]
    positions = source.numel() if is_transposed else result.numel()
    return int(positions * prod(weight.shape[1:]))


def _attention(args: tuple[Any, ...], _: Any) -> int:
    """Scores and their mix of values, for all pairs: a mask saves nothing here."""
    query, key, value = args[:3]
    pairs = prod(query.shape[:-1]) * key.shape[-2]
    return int(pairs * (query.shape[-1] + value.shape[-1]))


def _rnn_layer(args: tuple[Any, ...], _: Any) -> int:
    """One direction of one layer: both weights are applied to every time step of every sample."""
    source, input_weight, hidden_weight = args[:3]
    steps = prod(source.shape[:-1])
    return int(steps * (input_weight.numel() + hidden_weight.numel()))


def _cudnn_rnn(args: tuple[Any, ...], _: Any) -> int:
    source, weights = args[:2]
    return int(prod(source.shape[:-1]) * sum(w.numel() for w in weights if w.dim() == 2))


def _trilinear(args: tuple[Any, ...], _: Any) -> int:
    """`nn.Bilinear`: three tensors, expanded to common dimensions, multiplied and summed."""
    shapes = []
    for tensor, expanded in zip(args[:3], args[3:6], strict=True):
        for dim in sorted(expanded):
            tensor = tensor.unsqueeze(dim)
        shapes.append(tensor.shape)
    return prod(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


FORMULAS: Mapping[str, Formula] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "linear", "mkldnn_linear"), _product),
    **dict.fromkeys(("_int_mm", "_scaled_mm"), _product),
    **dict.fromkeys(("addmm", "addmv", "baddbmm", "_addmm_activation"), _added_product),
    "addbmm": _summed_product,
    **dict.fromkeys(("convolution", "_convolution", "convolution_overrideable"), _convolution),
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        ),
        _attention,
    ),
    "mkldnn_rnn_layer": _rnn_layer,
    "_cudnn_rnn": _cudnn_rnn,
    "_trilinear": _trilinear,
}

# What counts as none, by name without the `_` of the in-place form. Most element-wise operations
# and views are not here: their tags tell.
MOVES = """
    alias as_strided cat channel_shuffle chunk clone col2im constant_pad_nd contiguous copy
    detach embedding _embedding_bag _embedding_bag_forward_only expand flip gather im2col index
    index_add index_copy index_fill index_put index_select _local_scalar_dense masked_scatter
    masked_select native_channel_shuffle nonzero pixel_shuffle pixel_unshuffle reflection_pad1d
    reflection_pad2d reflection_pad3d repeat repeat_interleave replication_pad1d
    replication_pad2d replication_pad3d _reshape_alias resize roll rot90 scatter scatter_add
    scatter_reduce select_scatter set slice_scatter split split_copy split_with_sizes
    split_with_sizes_copy stack take _to_copy tril triu unfold unfold_copy unsafe_chunk
    _unsafe_index _unsafe_index_put unsafe_split unsafe_split_with_sizes _unsafe_view
"""
MAKES = """
    arange empty empty_like empty_strided eye fill full full_like linspace new_empty
    new_empty_strided new_full new_ones new_zeros one_hot ones ones_like scalar_tensor zero
    zeros zeros_like
"""
REDUCES = """
    all amax amin aminmax any argmax argmin argsort bincount bucketize count_nonzero cummax
    cummin cumprod cumsum equal isin kthvalue linalg_vector_norm logcumsumexp logsumexp max mean
    median min mode nansum norm prod searchsorted sort std std_mean sum topk _unique2
    unique_consecutive var var_mean
"""
NORMALISES = """
    batch_norm _batch_norm_with_update cudnn_batch_norm _fused_rms_norm miopen_batch_norm
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
    native_group_norm native_layer_norm _weight_norm _weight_norm_interface
"""
ACTIVATES = """
    abs complex copysign floor_divide gelu glu hardswish log_sigmoid_forward _log_softmax
    masked_fill _masked_softmax mish polar _prelu_kernel relu6 rrelu_with_noise _safe_softmax
    _softmax _thnn_fused_gru_cell _thnn_fused_lstm_cell threshold where
"""
POOLS = """
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d avg_pool1d
    avg_pool2d avg_pool3d fractional_max_pool2d fractional_max_pool3d max_pool2d_with_indices
    max_pool3d_with_indices max_unpool2d max_unpool3d
"""
DRAWS = """
    bernoulli exponential multinomial native_dropout normal rand rand_like randint randint_like
    randn randn_like random randperm uniform
"""
KEEPS_BOOKS = """
    _assert_async _assert_scalar _assert_tensor_metadata _cudnn_rnn_flatten_weight
    _has_compatible_shallow_copy_type is_same_size item lift_fresh lift_fresh_copy
    _pack_padded_sequence _pad_packed_sequence sym_size
"""
RESAMPLES = """
    grid_sampler_2d grid_sampler_3d upsample_bicubic2d _upsample_bicubic2d_aa
    upsample_bilinear2d _upsample_bilinear2d_aa upsample_linear1d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d upsample_trilinear3d
"""
FREE = frozenset(
    " ".join(
        (MOVES, MAKES, REDUCES, NORMALISES, ACTIVATES, POOLS, DRAWS, KEEPS_BOOKS, RESAMPLES)
    ).split()
)
