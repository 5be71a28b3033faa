"""A model as a float ONNX file: dynamic batch, plain names, batch norms folded."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from onnx import helper
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compressor.errors import ExportError, first_line
from compressor.export.attention_ops import with_four_dimensions
from compressor.export.bfloat16 import BFLOAT16_OPSET, check_types, in_bfloat16
from compressor.export.clamp_ops import even_limits
from compressor.export.detection_ops import DESCRIPTION_WARNING
from compressor.export.exported_program import export_program, is_image_list
from compressor.export.graph import Graph, attribute, drop_unused_constants, sort_nodes
from compressor.export.lstm_ops import by_layers, float_lstm_translations
from compressor.export.names import name_plainly
from compressor.export.scopes import scope_of
from compressor.export.signature import METADATA_KEY, Signature
from compressor.export.torchlib import operations_read_once
from compressor.files import write_bytes
from compressor.interfaces.inputs import ModelInputs, device_of
from compressor.structure.trace import eval_mode

OPSET = 20
MAX_FILE_BYTES = 2**31 - 1  # of one protocol buffer


def export_onnx(
    model: nn.Module,
    inputs: ModelInputs,
    path: Path | str,
    *,
    precision: Literal["fp32", "fp16", "bf16"] = "fp32",
) -> Path:
    """Write `model` in evaluation mode as one ONNX file that takes any batch size.

    Of a detector that takes a list of images, the number and the sizes of the images are fixed; how
    many objects it finds is not.

    The file's metadata hold the `Signature`. The same model gives the same bytes.

    Args:
        model: not changed; its mode is restored.
        inputs: one call's arguments.
        path: of the file; the weights are inside.
        precision: "fp16" and "bf16" store and compute in 16 bits; inputs and outputs stay float32.
            ONNX Runtime has no CPU kernels for "bf16".

    Raises:
        ExportError: if the model cannot be traced, has an operation without a translation, or
            without that precision, or is larger than 2 GB.
        ModelError: if it cannot be copied, for "bf16".
    """
    if precision == "bf16":
        inputs = inputs.to(device_of(model))
        proto = make_onnx(in_bfloat16(model, inputs), inputs, opset=BFLOAT16_OPSET)
        check_types(proto)
    else:
        proto = make_onnx(model, inputs)
        if precision == "fp16":
            proto = _to_half(proto)
    name_plainly(proto)
    return save_onnx(proto, path)


def make_onnx(
    model: nn.Module,
    inputs: ModelInputs,
    *,
    translations: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
    opset: int = OPSET,
) -> onnx.ModelProto:
    """What `export_onnx` writes.

    Args:
        model: not changed; its mode is restored.
        inputs: one call's arguments.
        translations: what operations that torch does not know by itself are in ONNX.
        opset: of the file.

    Raises:
        ExportError: if the model cannot be traced, or has an operation without a translation.
    """
    inputs = inputs.to(device_of(model))
    with eval_mode(model), torch.no_grad():
        signature = Signature.of(model, inputs, inputs.call(model))
    flat = _Flat(model, inputs)
    program = export_program(flat, flat.example, blamed=model, any_batch=not is_image_list(inputs))
    program = by_layers(with_four_dimensions(program))
    even_limits(program)
    known = {**float_lstm_translations(opset), **(translations or {})}
    # Converting decomposes the traced graph again: as it was traced, without gradients.
    with _quiet(), operations_read_once(), torch.no_grad():
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                external_data=False,
                verbose=False,
                opset_version=opset,
                custom_translation_table=known,
            )
        except RuntimeError as error:
            raise ExportError(_untranslated(error)) from error
    assert exported is not None
    proto = exported.model_proto
    _pool_means(proto)
    _rename(proto, signature)
    _name_batch(proto)
    _annotate(proto, signature)
    return proto


def save_onnx(
    proto: onnx.ModelProto, path: Path | str, *, check: Callable[[bytes], None] | None = None
) -> Path:
    """Write the file whole or not at all.

    Args:
        proto: the content.
        path: of the file.
        check: raises an error if the bytes shall not be written.

    Raises:
        ExportError: if it is larger than a protocol buffer may be.
    """
    path = Path(path)
    size_bytes = proto.ByteSize()
    if size_bytes > MAX_FILE_BYTES:
        raise ExportError(
            f"The ONNX file would have {size_bytes} bytes, more than the 2 GB of one file. "
            "Export this model as a torch.export program."
        )
    content = proto.SerializeToString(deterministic=True)
    if check is not None:
        check(content)
    write_bytes(path, content)
    return path


def read_signature(path: Path | str) -> Signature:
    """The signature of a file that `export_onnx` wrote.

    Raises:
        ExportError: if another program wrote the file.
    """
    for entry in onnx.load(path, load_external_data=False).metadata_props:
        if entry.key == METADATA_KEY:
            return Signature.from_json(entry.value)
    raise ExportError(f"{path} does not say how it is called. Write it with `export_onnx`.")


class _Flat(nn.Module):
    """The model as a function of its input tensors that returns its output tensors.

    So the file has one input for each tensor and none for what is no tensor, in a known order, and
    outputs that are None, numbers, or one tensor twice do not stop the exporter.
    """

    def __init__(self, model: nn.Module, inputs: ModelInputs) -> None:
        super().__init__()
        self.model = model
        leaves, self._spec = pytree.tree_flatten((inputs.args, dict(inputs.kwargs)))
        self._fixed = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._flowing = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.example = ModelInputs(tuple(inputs.tensors()))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The model's output tensors."""
        leaves: list[Any] = list(self._fixed)
        for i, tensor in zip(self._flowing, tensors, strict=True):
            leaves[i] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        leaves = pytree.tree_leaves(self.model(*args, **kwargs))
        return tuple(leaf.clone() for leaf in leaves if isinstance(leaf, Tensor))


def _pool_means(proto: onnx.ModelProto) -> None:
    """Write means over height and width as average pools, in place.

    It is the same number, but runtimes keep their blocked and their integer layouts for pools only.
    """
    graph = Graph(proto)
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in proto.graph.value_info}
    nodes = []
    for node in graph.nodes:
        if not _is_spatial_mean(graph, node, ranks):
            nodes.append(node)
            continue
        source, result = node.input[0], node.output[0]
        pooled = result if attribute(node, "keepdims", 1) else f"{result}.pooled"
        parts = [helper.make_node("GlobalAveragePool", [source], [pooled], name=node.name)]
        if pooled != result:
            flat = helper.make_node("Flatten", [pooled], [result], name=f"{node.name}_flatten")
            parts.append(flat)
        for part in parts:
            part.metadata_props.extend(node.metadata_props)
        nodes += parts
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    drop_unused_constants(proto)


def _is_spatial_mean(graph: Graph, node: onnx.NodeProto, ranks: Mapping[str, int]) -> bool:
    if node.op_type != "ReduceMean":
        return False
    rank = ranks.get(node.input[0], 0)
    axes = graph.constants.get(node.input[1]) if len(node.input) > 1 else None
    if rank != 4 or axes is None:
        return False
    return sorted(int(axis) % rank for axis in onnx.numpy_helper.to_array(axes)) == [2, 3]


def _rename(proto: onnx.ModelProto, signature: Signature) -> None:
    """Give inputs, outputs and parameters their plain names, in place."""
    graph = proto.graph
    names = {tensor.name: tensor.name.removeprefix("model.") for tensor in graph.initializer}
    wanted = [*signature.input_names(), *signature.output_names()]
    values = [value.name for value in (*graph.input, *graph.output)]
    others = {name for node in graph.node for name in node.output} | names.keys()
    names |= {name: f"{name}_" for name in others & set(wanted) - set(values)}
    names |= dict(zip(values, wanted, strict=True))
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = names.get(value.name, value.name)
    # shapes of the inner values: no runtime needs them, and after an edit they would lie
    del graph.value_info[:]


def _name_batch(proto: onnx.ModelProto) -> None:
    """Call the size of the batch "batch", in place; the exporter calls it s87, or so.

    It is the only size of the inputs that is open. Sizes of outputs may be reckoned from it
    ("2*batch"), or be of their own, such as how many boxes were found.
    """
    graph = proto.graph
    dims = [list(value.type.tensor_type.shape.dim) for value in (*graph.input, *graph.output)]
    symbols = {each[0].dim_param for each in dims[: len(graph.input)] if each} - {""}
    for dim in (dim for each in dims for dim in each if dim.dim_param):
        words = re.split(r"(\w+)", dim.dim_param)
        dim.dim_param = "".join("batch" if word in symbols else word for word in words)


def _annotate(proto: onnx.ModelProto, signature: Signature) -> None:
    """Say how the file is called, and of which module each node is.

    The exporter's notes are dropped: they hold source lines.
    """
    for node in proto.graph.node:
        node.name = f"{scope_of(node)}/{node.name}".removeprefix("/")
        del node.metadata_props[:]
        node.doc_string = ""
    del proto.metadata_props[:]
    proto.metadata_props.add(key=METADATA_KEY, value=signature.to_json())


def _to_half(proto: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    half: onnx.ModelProto = convert_float_to_float16(proto, keep_io_types=True)
    sort_nodes(half)
    return half


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes of the exporter and its optimiser to their own developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx._internal.exporter", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(torch\.onnx|onnxscript|onnx_ir)(\.|$)")
            warnings.filterwarnings("ignore", DESCRIPTION_WARNING, FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _untranslated(error: RuntimeError) -> str:
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return (
        f"The model has an operation that ONNX does not: {first_line(causes[-1])} "
        "Replace the operation, or export the model as a torch.export program."
    )
