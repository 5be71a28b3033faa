"""What is quantized, and how: for every tensor its scheme, its scale and its zero point.

A plan is made of a graph, of the format that each layer shall have, and of observed ranges. The
simulation in torch and the exported file are both made of it, so they agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from compressor.errors import ConfigError, suggest
from compressor.quantization.affine import parameters_of_range
from compressor.quantization.graph import Product, QuantizationGraph
from compressor.quantization.kinds import LABELS, reason_against
from compressor.quantization.placement import Placement, Runtime, place
from compressor.quantization.scheme import (
    ACTIVATION,
    BFLOAT16,
    FLOAT16,
    MIN_BITS,
    WEIGHT,
    Scheme,
)
from compressor.quantization.weights import check_weight, fitting_bias, weight_parameters

Activations = Literal["static", "dynamic", "float"]
SCALE_BITS = 32


@dataclass(frozen=True)
class LayerFormat:
    """How a layer is stored and computed.

    Attributes:
        weight: of its weight.
        activations: "static": it reads integers whose range was calibrated; "dynamic": integers
            whose range is found in every call; "float": only the weight is stored in few bits.
        is_fp8: in place of integers there are floats of eight bits (e4m3): torch computes with them
            on GPUs, and files have none.
    """

    weight: Scheme = WEIGHT
    activations: Activations = "static"
    is_fp8: bool = False

    def __post_init__(self) -> None:
        """Refuse what no file can say.

        Raises:
            ConfigError: for activations of another kind, and weights that the runtime cannot read.
        """
        known = get_args(Activations)
        if self.activations not in known:
            raise ConfigError(
                f"activations={self.activations!r} is unknown. {suggest(self.activations, known)}"
            )
        if not isinstance(self.weight, Scheme):
            raise ConfigError(
                f"weight={self.weight!r} is no Scheme. Write WEIGHT.with_bits(4), or the name of a "
                "format in place of a LayerFormat."
            )
        if self.weight.is_float:
            raise ConfigError(
                "weight has 32 bits, which is float, and no format. Write 8, or leave the layer "
                "out: name it in `ignored`."
            )
        if self.weight.axis not in {None, 0}:
            raise ConfigError(
                f"axis={self.weight.axis} of a weight: its scales are of output channels. Write 0."
            )
        if self.weight.has_integers and self.weight.bits > 8:
            raise ConfigError(
                f"{self.weight.bits} bits of a weight: a file has integers of 2 to 8, or floats of "
                "16. Write 8, or format='weight_fp16'."
            )
        if self.weight.float_type is not None and self.activations != "float":
            raise ConfigError(
                f"A layer with a weight in {self.weight.float_type} computes in float32, and its "
                f"activations are {self.activations!r}. Write activations='float'."
            )
        if self.activations == "dynamic" and (self.weight.bits != 8 or self.weight.block):
            raise ConfigError(
                "Activations whose range is found in each call need weights of 8 bits with a scale "
                f"for each channel, not {self.weight.to_json()}. Write activations='float'."
            )

    @property
    def stored_bits(self) -> float:
        """Bits of a weight in the file, with its share of the scales of blocks."""
        bits = self.weight.bits
        return bits if self.weight.block is None else bits + (SCALE_BITS + bits) / self.weight.block


STATIC_INT8 = LayerFormat()
DYNAMIC_INT8 = LayerFormat(activations="dynamic")
WEIGHT_INT8 = LayerFormat(activations="float")
WEIGHT_INT4 = LayerFormat(Scheme(4, signed=True, symmetric=True, axis=0, block=32), "float")
WEIGHT_FP16 = LayerFormat(FLOAT16, "float")
WEIGHT_BF16 = LayerFormat(BFLOAT16, "float")
FORMATS: Mapping[str, LayerFormat] = {
    "static_int8": STATIC_INT8,
    "dynamic_int8": DYNAMIC_INT8,
    "weight_int8": WEIGHT_INT8,
    "weight_int4": WEIGHT_INT4,
    "weight_fp16": WEIGHT_FP16,
    "weight_bf16": WEIGHT_BF16,
}
# of 8 bits where it is computed on integers
FEW_BIT_FORMATS: Mapping[str, LayerFormat] = {
    f"w{bits}a8": LayerFormat(WEIGHT.with_bits(bits)) for bits in range(MIN_BITS, WEIGHT.bits)
}
FILE_FORMATS: Mapping[str, LayerFormat] = {**FORMATS, **FEW_BIT_FORMATS}
# of torch alone: no file has them
FP8_FORMATS: Mapping[str, LayerFormat] = {
    "dynamic_fp8": LayerFormat(activations="dynamic", is_fp8=True),
    "weight_fp8": LayerFormat(activations="float", is_fp8=True),
}

Formats = Mapping[str, LayerFormat]
Ranges = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TensorPlan:
    """One tensor in few bits.

    Attributes:
        scheme: of its numbers.
        scale: (), (size,) or (size, blocks); see `affine.quantize`.
        zero_point: of the same shape.
    """

    scheme: Scheme
    scale: Tensor
    zero_point: Tensor

    def to_json(self) -> dict[str, Any]:
        """Numbers as lists."""
        return {
            "scheme": self.scheme.to_json(),
            "scale": self.scale.tolist(),
            "zero_point": self.zero_point.tolist(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorPlan:
        """What `to_json` wrote."""
        return cls(
            Scheme(**data["scheme"]),
            torch.tensor(data["scale"], dtype=torch.float32),
            torch.tensor(data["zero_point"], dtype=torch.int32),
        )


@dataclass(frozen=True)
class QuantizationPlan:
    """How a model is quantized.

    Attributes:
        formats: of layers, by name; others stay in float.
        weights: by path of the parameter.
        activations: by name in the graph: those that have a range of their own.
        runtime: that the quantizers are placed for.
    """

    formats: Mapping[str, LayerFormat] = field(default_factory=dict)
    weights: Mapping[str, TensorPlan] = field(default_factory=dict)
    activations: Mapping[str, TensorPlan] = field(default_factory=dict)
    runtime: Runtime = "onnxruntime"

    def layers(self, activations: Activations) -> list[str]:
        """Layers whose activations are so."""
        return [name for name, form in self.formats.items() if form.activations == activations]

    def to_json(self) -> dict[str, Any]:
        """For a file; see `from_json`."""
        return {
            "formats": {
                name: {"weight": form.weight.to_json(), "activations": form.activations}
                for name, form in self.formats.items()
            },
            "weights": {path: tensor.to_json() for path, tensor in self.weights.items()},
            "activations": {name: tensor.to_json() for name, tensor in self.activations.items()},
            "runtime": self.runtime,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QuantizationPlan:
        """What `to_json` wrote."""
        return cls(
            {
                name: LayerFormat(Scheme(**form["weight"]), form["activations"])
                for name, form in data["formats"].items()
            },
            {path: TensorPlan.from_json(tensor) for path, tensor in data["weights"].items()},
            {name: TensorPlan.from_json(tensor) for name, tensor in data["activations"].items()},
            data.get("runtime", "onnxruntime"),  # the only one when it was not written
        )


def find_format(name: str) -> LayerFormat:
    """The format that is called so.

    Raises:
        ConfigError: if there is none; the message has the nearest name and all of them.
    """
    known = {**FILE_FORMATS, **FP8_FORMATS}
    if name not in known:
        raise ConfigError(f"There is no format {name!r}. {suggest(name, known)}")
    return known[name]


def make_plan(
    graph: QuantizationGraph,
    formats: Formats,
    ranges: Ranges,
    *,
    activation: Scheme = ACTIVATION,
    fixed: Mapping[str, TensorPlan] | None = None,
    runtime: Runtime = "onnxruntime",
) -> QuantizationPlan:
    """Scales and zero points for the layers of `formats`.

    Args:
        graph: of the model.
        formats: of the layers that are quantized.
        ranges: (low, high) of at least `observed_values(graph, …)`, by name.
        activation: the scheme of all activations.
        fixed: of weights, by path, whose numbers are known for the scheme that they have.
        runtime: that the quantizers are placed for.

    Raises:
        ConfigError: if a layer cannot have its format; see `kinds`.
        ModelError: if there is no such layer, or a weight is not finite or too large for its type.
    """
    _check_kinds(graph, formats, runtime)
    placement = place_static(graph, formats, runtime)
    activations = {
        node.name: TensorPlan(activation, *parameters_of_range(*ranges[node.name], activation))
        for node in placement.origins
    }
    weights: dict[str, TensorPlan] = {}
    for product in graph.products_of(formats):
        form = formats[product.layer]
        check_weight(product.weight, graph.tensor(product.weight), form.weight)
        known, given = weights.get(product.weight), (fixed or {}).get(product.weight)
        if known is None and given is not None and given.scheme == form.weight:
            known = given
        scale, zero_point = known_or_new(known, graph.tensor(product.weight), form.weight)
        if form.activations == "static" and product.bias is not None and runtime != "tensorrt":
            origin = placement.scale_of[product.source]
            source_scale = activations[origin.name].scale
            scale = fitting_bias(scale, graph.tensor(product.bias), source_scale)
        weights[product.weight] = TensorPlan(form.weight, scale, zero_point)
    for recurrence in graph.recurrences_of(formats):
        form = formats[recurrence.layer]
        for path in recurrence.weights:
            check_weight(path, graph.tensor(path), form.weight)
            numbers = known_or_new(weights.get(path), graph.tensor(path), form.weight)
            weights[path] = TensorPlan(form.weight, *numbers)
    for table in graph.tables_of(formats):
        form, path = formats[table.layer], table.weight
        if path in weights:
            continue  # it has what the layer has that it is the weight of
        check_weight(path, graph.tensor(path), form.weight)
        numbers = weight_parameters(graph.tensor(path), form.weight)
        weights[path] = TensorPlan(form.weight, *numbers)
    return QuantizationPlan(dict(formats), weights, activations, runtime)


def _check_kinds(graph: QuantizationGraph, formats: Formats, runtime: Runtime) -> None:
    for name, kind in graph.kinds.items():
        reason = reason_against(kind, formats[name], runtime) if name in formats else None
        if reason is not None:
            raise ConfigError(f"The {LABELS[kind]} {name!r} cannot have this format. {reason}")


def place_static(
    graph: QuantizationGraph, formats: Formats, runtime: Runtime = "onnxruntime"
) -> Placement:
    """Where the quantizers of the layers with static activations sit."""
    layers = [name for name, form in formats.items() if form.activations == "static"]
    return place(graph, layers, runtime)


def observed_values(
    graph: QuantizationGraph, layers: Iterator[str] | list[str], runtime: Runtime = "onnxruntime"
) -> list[str]:
    """Names of the values whose ranges any choice among `layers` needs."""
    return [node.name for node in place(graph, list(layers), runtime).origins]


def known_or_new(known: TensorPlan | None, weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a weight; of a shared one, those that it has."""
    if known is not None:
        return known.scale, known.zero_point
    return weight_parameters(weight, scheme)


def bias_scale(product: Product, plan: QuantizationPlan, placement: Placement) -> Tensor | None:
    """The step of the product's bias, (out,) or (); None where it is added in float."""
    form = plan.formats[product.layer]
    # TensorRT refuses to dequantize int32: "only activation types allowed as input"
    is_added_inside = plan.runtime != "tensorrt" and (product.is_convolution or product.is_matrix)
    if product.bias is None or form.activations != "static" or not is_added_inside:
        return None
    weight = plan.weights.get(product.weight)
    if weight is None or weight.scheme.block is not None:
        return None
    return plan.activations[placement.scale_of[product.source].name].scale * weight.scale
