"""Which layers of a model are quantized, in which format, and why others are not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import nn

from compressor.errors import ConfigError, ModelError, suggest
from compressor.export.post_training import PostTraining
from compressor.quantization.plan import LayerFormat, find_format

Format = str | LayerFormat
# what a reader looks for among the skipped
LAYERS = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.Embedding,
    nn.EmbeddingBag,
)
NO_PRODUCT = "It is no convolution or linear operation by a constant weight in the model's graph."
NO_KERNEL = "ONNX has no convolution of integers whose range is found in each call."
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


def _form(format: Format) -> LayerFormat:
    if isinstance(format, LayerFormat):
        return format
    return find_format(format)


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
    known = quantizer.layers
    without = _inside("ignored", ignored, model, known)
    if isinstance(forms, Mapping):
        quantizer.graph.products_of(forms)
        wanted = {name: form for name, form in forms.items() if name not in without}
    else:
        chosen = known if layers is None else _inside("layers", layers, model, known)
        wanted = {name: forms for name in known if name in chosen and name not in without}
    convolutions = {p.layer for p in quantizer.graph.products if p.is_convolution}
    formats: dict[str, LayerFormat] = {}
    skipped = {
        name: NO_PRODUCT
        for name, module in model.named_modules()
        if isinstance(module, LAYERS) and not _layers_in(name, known)
    }
    for name in known:
        form = wanted.get(name)
        if form is None:
            skipped[name] = NOT_WANTED
        elif name in convolutions and form.activations == "dynamic":
            skipped[name] = NO_KERNEL
        else:
            formats[name] = _without_blocks(form) if name in convolutions else form
    if not formats:
        raise ConfigError(
            f"No layer is left to quantize of {', '.join(known)}: {skipped[known[0]]} Name others "
            "in `layers`, or choose another format."
        )
    return formats, skipped


def _without_blocks(form: LayerFormat) -> LayerFormat:
    """Blocks are of matrices; of a convolution each output channel has one scale."""
    return replace(form, weight=replace(form.weight, block=None))


def _inside(
    option: str, names: Collection[str], model: nn.Module, known: Collection[str]
) -> set[str]:
    """The layers that `names` are, or are inside of."""
    if isinstance(names, str):
        raise ConfigError(
            f"`{option}` is {names!r}, not a list. Write it in brackets: [{names!r}]."
        )
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules and name not in known:
            raise ModelError(
                f"The model has no module {name!r}, which `{option}` names. {suggest(name, known)}"
            )
    return {layer for name in names for layer in _layers_in(name, known)}


def _layers_in(name: str, known: Collection[str]) -> list[str]:
    return [layer for layer in known if not name or f"{layer}.".startswith(f"{name}.")]
