"""Look-ups in tables of few bits, such that nothing of a table's size is computed.

Rows of integers and their scales are looked up, and what was found is multiplied. In ONNX Runtime
(x86, one thread) 64 of 30,522 rows of 384 take 9 us so, and 5 in float. DequantizeLinear before the
look-up takes 1,800 us in every call; Cast and Mul of the table are folded into a table of floats
when the file is loaded.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor
from torch.nn import functional as F

from compressor.quantization.affine import quantize
from compressor.quantization.plan import TensorPlan
from compressor.quantization.scheme import Scheme, torch_dtype
from compressor.quantization.tables import PACKED_BITS

TRANSPOSED = "_transposed_"
STEPS = 2**PACKED_BITS


def table_constants(values: Tensor, plan: TensorPlan) -> dict[str, Tensor]:
    """What is stored of a table (count, columns), by names, in the order of `look_up`.

    Integers of four bits lie two in a byte, both from 0 on: of the first half of the columns, and
    of the second. ONNX looks up nothing smaller.
    """
    scheme, kind = plan.scheme, torch_dtype(plan.scheme)
    if not scheme.has_integers:
        return {scheme.storage: values.to(kind)}
    integers = quantize(values, plan.scale, plan.zero_point, scheme)
    offset = packing_offset(scheme)
    if offset is not None:
        integers = F.pad(integers, (0, integers.shape[1] % 2)) + offset
        first, second = integers.chunk(2, dim=1)
        constants = {"packed": (first + STEPS * second).to(torch.uint8)}
    else:
        constants = {scheme.storage: integers.to(kind)}
    constants["row_scale"] = _by_rows(plan.scale, len(values))
    if plan.zero_point.any():
        constants["row_zero_point"] = _by_rows(plan.zero_point.to(kind), len(values))
    return constants


def packing_offset(scheme: Scheme) -> int | None:
    """What makes the least integer of four bits 0; None if integers have bytes of their own.

    >>> packing_offset(Scheme(4, signed=True)), packing_offset(Scheme(8, signed=True))
    (8, None)
    """
    if scheme.bits > PACKED_BITS:
        return None
    return STEPS // 2 if scheme.signed else 0


def look_up(
    indices: Tensor,
    columns: int,
    block: int | None,
    offset: int | None,
    rows: Tensor,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> Tensor:
    """Rows of a table as float32, (…, columns).

    Args:
        indices: (…), of rows.
        columns: of the table.
        block: so many of them have a scale; None is all.
        offset: `packing_offset` of the table.
        rows: of `table_constants`, like all that follows.
        scale: (count, 1) or (count, blocks); None for floats.
        zero_point: of the same shape; None is 0.
    """

    def entries(numbers: Tensor) -> Tensor:
        found = F.embedding(indices, numbers).to(torch.float32)
        if block is not None:
            found = found.repeat_interleave(block, dim=-1)
        return found[..., :columns] if columns < found.shape[-1] else found

    values = F.embedding(indices, rows).to(torch.float32)
    if offset is not None:  # in floats: of a shift of bytes the exporter makes eight operations
        second = (values / STEPS).floor()
        values = torch.cat([values - STEPS * second, second], dim=-1) - offset
        values = values[..., :columns] if columns % 2 else values
    if zero_point is not None:
        values = values - entries(zero_point)
    return values if scale is None else values * entries(scale)


def share_transposed(proto: onnx.ModelProto) -> None:
    """Store what is looked up and multiplied as well once, in place.

    ONNX Runtime transposes a constant when it loads the file.
    """
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name, tensor in constants.items():
        source = name.replace(TRANSPOSED, "_")
        if source == name or source not in constants:
            continue
        if not _is_transposed(tensor, constants[source]):
            continue  # of another layer, or of blocks
        transpose = helper.make_node("Transpose", [source], [name], f"{name}/node", perm=[1, 0])
        proto.graph.initializer.remove(tensor)
        proto.graph.node.insert(0, transpose)


def _by_rows(numbers: Tensor, count: int) -> Tensor:
    """Of one for all, of one for each row, or of blocks, as (count, …)."""
    return numbers if numbers.dim() == 2 else numbers.reshape(-1, 1).expand(count, 1)


def _is_transposed(one: onnx.TensorProto, other: onnx.TensorProto) -> bool:
    """Whether they are a matrix and its transposed, of one type."""
    if len(one.dims) != 2 or one.data_type != other.data_type:
        return False
    return np.array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other).T)
