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
from compressor.quantization.kinds import Kind, reason_against
from compressor.quantization.placement import Runtime
from compressor.quantization.plan import FILE_FORMATS, FP8_FORMATS, LayerFormat
from compressor.quantization.scheme import Scheme
from compressor.quantization.tables import table_format

Format = str | LayerFormat
NOT_WANTED = "It was not asked for."
NO_WEIGHT = "It has no weight of its own that is multiplied: a norm is folded into a layer."


def read_formats(
    format: Format | Mapping[str, Format], layers: Collection[str] | None
) -> LayerFormat | dict[str, LayerFormat]:
    """The formats of the layers that are named, or the one of all.

    Raises:
        ConfigError: for what is no format, no layer at all, or `layers` beside a mapping.
    """
    if layers is not None and not layers and not isinstance(layers, str):
        raise ConfigError("`layers` is empty. Leave it out for all layers, or name some.")
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
    for form in forms.values() if isinstance(forms, Mapping) else [forms]:
        reason = reason_against("linear", form, runtime)
        if reason is not None:
            raise ConfigError(reason)


def _form(format: Format) -> LayerFormat:
    if isinstance(format, LayerFormat):
        return format
    if isinstance(format, Scheme):
        raise ConfigError(
            "`format` is the Scheme of a weight, which does not say how activations are. Write "
            "LayerFormat(scheme, activations='static'), or 'float'."
        )
    if not isinstance(format, str):
        raise ConfigError(
            f"format={format!r} is no format. Write its name, 'static_int8', or a LayerFormat."
        )
    known = {**FILE_FORMATS, **FP8_FORMATS}
    if format not in known:  # those that no file has are not suggested
        raise ConfigError(f"There is no format {format!r}. {suggest(format, FILE_FORMATS)}")
    return known[format]


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
        ConfigError: if a name has no layer inside, or no layer is left.
    """
    graph = quantizer.graph
    known = graph.sites
    skipped = skipped_modules(model, graph.names, _names_of_tables(quantizer))
    without = _inside("ignored", ignored, model, graph.names)
    if "" in ignored:
        raise ConfigError(
            "`ignored` has the name '', which is the whole model: nothing is left to "
            "quantize. Name layers or modules inside of it."
        )
    if isinstance(forms, Mapping):
        wanted = _by_layer(forms, graph)
        wanted = {name: form for name, form in wanted.items() if name not in without}
    else:
        chosen = known if layers is None else _inside("layers", layers, model, graph.names)
        for name in layers or ():
            if not layers_in(name, graph.names):
                raise ConfigError(
                    f"`layers` names {name!r}, and nothing of it can be quantized. "
                    f"{skipped.get(name, NO_WEIGHT)} Name one of {', '.join(known)}."
                )
        wanted = {name: forms for name in known if name in chosen and name not in without}
    kinds = graph.kinds
    formats: dict[str, LayerFormat] = {}
    for name in known:
        if name not in wanted:
            skipped[name] = NOT_WANTED
            continue
        form = _stored(wanted[name], kinds[name])
        reason = reason_against(kinds[name], form, quantizer.runtime)
        if reason is not None:
            skipped[name] = reason
        else:
            formats[name] = form
    if not formats:
        names = ", ".join(name or "the model, which is one layer" for name in known)
        raise ConfigError(
            f"No layer is left to quantize of {names}: "
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


def _stored(form: LayerFormat, kind: Kind) -> LayerFormat:
    """What a layer of that kind is stored as where `form` is asked for."""
    if kind == "table":
        return table_format(form)
    if kind == "convolution":  # blocks are of matrices; here each output channel has one scale
        return replace(form, weight=replace(form.weight, block=None))
    return form


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
