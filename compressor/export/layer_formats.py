"""Which layers of a model are quantized, in which format, and why others are not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import get_args

from torch import nn

from compressor.errors import ConfigError, ModelError, suggest
from compressor.export.post_training import PostTraining
from compressor.export.skipped import layers_in, skipped_modules
from compressor.quantization.graph import QuantizationGraph
from compressor.quantization.placement import Runtime
from compressor.quantization.plan import LayerFormat, check_fits_file, find_format
from compressor.quantization.recurrent import reason_against
from compressor.quantization.tables import table_format

Format = str | LayerFormat
NO_KERNEL = "ONNX has no convolution of integers whose range is found in each call."
NO_TABLES = "Tables are looked up in float in files for TensorRT."
NOT_WANTED = "It was not asked for."


def read_formats(
    format: Format | Mapping[str, Format], layers: Collection[str] | None
) -> LayerFormat | dict[str, LayerFormat]:
    """The formats of the layers that are named, or the one of all.

    Raises:
        ConfigError: for a name that is no format, or `layers` beside a mapping.
    """
    if not isinstance(format, Mapping):
        return _form(format)
    if layers is not None:
        raise ConfigError(
            f"`format` names {len(format)} layers and `layers` {len(layers)}. Give one of the two."
        )
    return {name: _form(form) for name, form in format.items()}


def check_runtime(forms: LayerFormat | Mapping[str, LayerFormat], runtime: str) -> None:
    """Refuse formats that the runtime cannot compute.

    Raises:
        ConfigError: for a runtime that does not exist, or a format that it has no kernel for.
    """
    if runtime not in get_args(Runtime):
        raise ConfigError(f"runtime={runtime!r} is unknown. {suggest(runtime, get_args(Runtime))}")
    if runtime != "tensorrt":
        return
    for form in forms.values() if isinstance(forms, Mapping) else [forms]:
        weight = form.weight
        if form.activations != "static":
            raise ConfigError(
                f"TensorRT multiplies integers only where the file has the ranges of both factors, "
                f"and this format has {form.activations} activations. Write format='static_int8'."
            )
        if weight.is_float or weight.storage != "int8" or weight.block or not weight.symmetric:
            raise ConfigError(
                "TensorRT takes weights of int8 with zero point 0 and a scale for each output "
                f"channel, not {weight.to_json()}. Write format='static_int8'."
            )


def _form(format: Format) -> LayerFormat:
    form = format if isinstance(format, LayerFormat) else find_format(format)
    check_fits_file([form])
    return form


def choose_formats(
    model: nn.Module,
    quantizer: PostTraining,
    forms: LayerFormat | Mapping[str, LayerFormat],
    layers: Collection[str] | None,
    ignored: Collection[str],
) -> tuple[dict[str, LayerFormat], dict[str, str]]:
    """The format of each layer, and why others stay in float.

    Args:
        model: that `quantizer` was made of.
        quantizer: knows the layers that can be quantized.
        forms: as of `read_formats`.
        layers: names of layers or of modules with layers inside; None is all.
        ignored: names of those that stay in float.

    Raises:
        ModelError: for a name that does not exist; the message has the nearest.
        ConfigError: if no layer is left.
    """
    graph = quantizer.graph
    known = graph.sites
    without = _inside("ignored", ignored, model, graph.names)
    if isinstance(forms, Mapping):
        wanted = _by_layer(forms, graph)
        wanted = {name: form for name, form in wanted.items() if name not in without}
    else:
        chosen = known if layers is None else _inside("layers", layers, model, graph.names)
        wanted = {name: forms for name in known if name in chosen and name not in without}
    convolutions = {p.layer for p in graph.products if p.is_convolution}
    tables = quantizer.tables
    formats: dict[str, LayerFormat] = {}
    skipped = skipped_modules(model, graph.names, _names_of_tables(quantizer))
    for name in known:
        form = wanted.get(name)
        reason = reason_against(form) if form and name in graph.recurrent_layers else None
        if form is not None and name in tables:
            form = table_format(form)
            reason = NO_TABLES if quantizer.runtime == "tensorrt" else None
        if form is None:
            skipped[name] = NOT_WANTED
        elif reason is not None:
            skipped[name] = reason
        elif name in convolutions and form.activations == "dynamic":
            skipped[name] = NO_KERNEL
        else:
            formats[name] = _without_blocks(form) if name in convolutions else form
    if not formats:
        raise ConfigError(
            f"No layer is left to quantize of {', '.join(known)}: "
            f"{skipped[next(iter(wanted), known[0])]} Name others in `layers`, or choose another "
            "format."
        )
    return formats, skipped


def _names_of_tables(quantizer: PostTraining) -> set[str]:
    """Every name of those that the runtime looks up in few bits."""
    if quantizer.runtime == "tensorrt":
        return set()
    tables = {table.layer for table in quantizer.graph.tables}
    return {name for name, layer in quantizer.graph.names.items() if layer in tables}


def _by_layer(forms: Mapping[str, LayerFormat], graph: QuantizationGraph) -> dict[str, LayerFormat]:
    """The formats by the names that the layers go by in the graph."""
    graph.products_of([graph.names.get(name, name) for name in forms])
    found: dict[str, LayerFormat] = {}
    for name, form in forms.items():
        layer = graph.names[name]
        if found.setdefault(layer, form) != form:
            raise ConfigError(
                f"`format` has two formats for one weight: {layer!r} and {name!r} share it. Give "
                "both the same."
            )
    return found


def _without_blocks(form: LayerFormat) -> LayerFormat:
    """Blocks are of matrices; of a convolution each output channel has one scale."""
    return replace(form, weight=replace(form.weight, block=None))


def _inside(
    option: str, names: Collection[str], model: nn.Module, known: Mapping[str, str]
) -> set[str]:
    """The layers that `names` are, or are inside of, as `known` calls them."""
    if isinstance(names, str):
        raise ConfigError(
            f"`{option}` is {names!r}, not a list. Write it in brackets: [{names!r}]."
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in modules and name not in known:
            raise ModelError(
                f"The model has no module {name!r}, which `{option}` names. {suggest(name, known)}"
            )
    return {known[layer] for name in names for layer in layers_in(name, known)}
