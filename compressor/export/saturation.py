"""Whether integer sums overflow on this CPU, found by one product whose result is known.

Without VNNI, x86 multiplies uint8 by int8 in pairs whose sum is cut at 16 bits. Weights of 7 bits
are safe there. The same file then gives other numbers on another CPU, so it is measured where it
runs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from compressor.quantization.plan import LayerFormat

SIZE = 64


@cache
def is_saturating() -> bool:
    """Whether ONNX Runtime's products of uint8 and int8 are wrong for large numbers here."""
    rows = np.full((SIZE, SIZE), 255, dtype=np.uint8)
    columns = np.full((SIZE, SIZE), 127, dtype=np.int8)
    (sums,) = _product().run(None, {"rows": rows, "columns": columns})
    return bool((sums != 255 * 127 * SIZE).any())


def safe_format(form: LayerFormat) -> LayerFormat:
    """`form`, with weights of one bit less where sums of all bits would be cut here."""
    if form.activations == "float" or form.weight.bits < 8 or not is_saturating():
        return form
    return replace(form, weight=replace(form.weight, reduced=True))


def _product() -> ort.InferenceSession:
    node = helper.make_node("MatMulInteger", ["rows", "columns"], ["sums"])
    shape = [SIZE, SIZE]
    graph = helper.make_graph(
        [node],
        "product",
        [
            helper.make_tensor_value_info("rows", TensorProto.UINT8, shape),
            helper.make_tensor_value_info("columns", TensorProto.INT8, shape),
        ],
        [helper.make_tensor_value_info("sums", TensorProto.INT32, shape)],
    )
    opset = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
