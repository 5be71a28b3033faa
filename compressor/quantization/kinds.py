"""Which kind of layer can have which format, in which runtime: the one place that says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from compressor.quantization.scheme import WEIGHT

if TYPE_CHECKING:
    from compressor.quantization.plan import LayerFormat

Kind = Literal["convolution", "linear", "lstm", "table"]
LABELS: Mapping[Kind, str] = {
    "convolution": "convolution",
    "linear": "linear layer",
    "lstm": "LSTM",
    "table": "embedding",
}


def reason_against(kind: Kind, form: LayerFormat, runtime: str = "onnxruntime") -> str | None:
    """Why a layer cannot have a format; None if it can.

    A linear layer can have all that a runtime has for any layer.

    Args:
        kind: of the layer.
        form: as it would be stored.
        runtime: "onnxruntime" and "tensorrt" read a file; "inductor" runs torchao's layers.
    """
    if runtime == "inductor":
        return _against_torchao(kind, form)
    if form.is_fp8:
        return (
            "Floats of eight bits are computed by torch.compile on a GPU, and no ONNX file has "
            "them. Write format='dynamic_int8', or run the engine with target={'runtime': "
            "'inductor', 'device': 'cuda'}."
        )
    if runtime == "tensorrt":
        return _against_tensorrt(kind, form)
    if kind == "convolution":
        return _against_convolution(form)
    if kind == "lstm":
        return _against_lstm(form)
    if kind == "table" and form.activations != "float":
        return "Its rows are looked up, and not multiplied by integers. Write weight_int8."
    return None


def _against_torchao(kind: Kind, form: LayerFormat) -> str | None:
    if kind != "linear":
        return f"torchao has linear layers in few bits, and this is a {LABELS[kind]}."
    has_eight = form.weight.has_integers and form.weight.bits == WEIGHT.bits
    if form.activations == "static" or not has_eight:
        return (
            "torchao has weights of eight bits, and activations in float or with the range of each "
            "call. Write dynamic_int8, or weight_int8."
        )
    return None


def _against_tensorrt(kind: Kind, form: LayerFormat) -> str | None:
    if kind == "table":
        return "Tables are looked up in float in files for TensorRT."
    if kind == "lstm":
        return "TensorRT has no LSTM of integers."
    weight = form.weight
    if form.activations != "static":
        return (
            f"TensorRT multiplies integers only where the file has the ranges of both factors, "
            f"and this format has {form.activations} activations. Write format='static_int8'."
        )
    if weight.storage != "int8" or weight.block or not weight.symmetric:
        return (
            "TensorRT takes weights of int8 with zero point 0 and a scale for each output "
            f"channel, not {weight.to_json()}. Write format='static_int8'."
        )
    return None


def _against_convolution(form: LayerFormat) -> str | None:
    if form.activations == "dynamic":
        return (
            "A convolution whose input's range is found in each call (ConvInteger) is slower in "
            "ONNX Runtime than one in float. Write static_int8."
        )
    if form.weight.block is not None:
        return "Scales of blocks are of matrices. Write block=None."
    return None


def _against_lstm(form: LayerFormat) -> str | None:
    if form.activations == "static":
        return (
            "ONNX Runtime has no LSTM of integers whose ranges are fixed. Write dynamic_int8, or "
            "weight_int8."
        )
    if not form.weight.has_integers:
        return None
    if form.weight.bits != WEIGHT.bits or form.weight.block:
        return (
            "Integer weights of an LSTM are stored in 8 bits, with a scale for each row. Write "
            "dynamic_int8, or weight_int8."
        )
    if form.activations == "dynamic" and not (form.weight.signed and form.weight.symmetric):
        return (
            "The weights of ONNX Runtime's LSTM of integers are int8 with zero point 0. Write "
            "dynamic_int8."
        )
    return None
