"""Which formats a layer may be quantized to: what the target runs, of what the user allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from compressor.config import CustomCompression, QuantizationArgs
from compressor.errors import ConfigError, suggest
from compressor.quantization.affine import fits
from compressor.quantization.plan import FORMATS
from compressor.quantization.scheme import FLOAT16
from compressor.search.space import FLOAT_BITS

LayerFormats = Mapping[str, Sequence[str]]
Runs = Callable[[nn.Module | None, str], bool]
# What is worth trying, by what the run makes small; the first is what all layers get at first.
# Weights of 4 bits and of 16 save bytes alone. Those of 16 lose next to nothing and take the time
# of float: they are for layers that fewer bits hurt. Not tried are bfloat16, since float16 loses an
# eighth as much, and 8 bits of weights alone: they are as many bytes as `static_int8`, and for
# their smaller damage would take its place, and its speed, where it does no harm either.
BY_OPTIMIZATION = {
    "latency": ("static_int8", "dynamic_int8", "dynamic_fp8"),
    "quantization": ("static_int8", "dynamic_int8", "dynamic_fp8"),
    "macs": (),
    "compression": ("static_int8", "dynamic_int8", "weight_int4", "weight_fp16"),
}
# Of embeddings, whose rows are looked up in the time of float.
TABLES_BY_OPTIMIZATION = {
    "latency": (),
    "quantization": ("weight_int8",),
    "macs": (),
    "compression": ("weight_int8", "weight_int4", "weight_fp16"),
}


def _is_in_files(_: nn.Module | None, form: str) -> bool:
    return form in FORMATS


def possible_formats(
    layers: Sequence[str], model: nn.Module, optimization: str, runs: Runs = _is_in_files
) -> dict[str, tuple[str, ...]]:
    """The formats that are tried, for each of `layers`, in their order.

    Args:
        layers: with a product by a constant weight, in the order in which they run; and embeddings.
        model: that they belong to.
        optimization: what the run makes small.
        runs: whether the target takes a layer in a format.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {
        name: tuple(
            form
            for form in _worth_trying(modules.get(name), optimization)
            if _has_kernel(modules.get(name), form) and runs(modules.get(name), form)
        )
        for name in layers
    }
    return {name: formats for name, formats in found.items() if formats}


def allowed_formats(
    layers: LayerFormats,
    model: nn.Module,
    custom: CustomCompression | None,
    runs: Runs = _is_in_files,
) -> dict[str, tuple[str, ...]]:
    """Those of `layers` that the configuration does not keep in float, in the same order.

    Args:
        layers: the formats that are possible for each, in the order in which they run.
        model: that they belong to.
        custom: None allows all.
        runs: whether the target takes a layer in a format.

    Raises:
        ConfigError: if a layer that is named does not exist, or has no format of the bits that are
            asked for.
    """
    known = {name: tuple(formats) for name, formats in layers.items()}
    if custom is None:
        return known
    if custom.layers:
        return _named_layers(known, model, custom, runs)
    args = custom.quantization_args
    if args is None:
        return known
    modules = dict(model.named_modules(remove_duplicate=False))
    layers_alone = [name for name in known if not isinstance(modules[name], nn.Embedding)]
    first = round(args.skip_layers_ratio * len(layers_alone))
    skipped = set(range(first)) | set(args.skip_layers or ())
    return {
        name: formats
        for position, (name, formats) in enumerate(known.items())
        if position not in skipped and _is_allowed(modules[name], args)
    }


def _worth_trying(layer: nn.Module | None, optimization: str) -> tuple[str, ...]:
    is_table = isinstance(layer, nn.Embedding)
    return (TABLES_BY_OPTIMIZATION if is_table else BY_OPTIMIZATION)[optimization]


def _has_kernel(layer: nn.Module | None, form: str) -> bool:
    """Whether the runtime has a product of such a layer in that format, with its weight."""
    if form == "weight_fp16":
        return isinstance(layer, (_ConvNd, nn.Linear, nn.Embedding)) and fits(layer.weight, FLOAT16)
    if isinstance(layer, nn.Embedding):
        return form in {"weight_int8", "weight_int4"}
    return form == "static_int8" or (isinstance(layer, nn.Linear) and form != "weight_bf16")


def _named_layers(
    layers: Mapping[str, tuple[str, ...]],
    model: nn.Module,
    custom: CustomCompression,
    runs: Runs,
) -> dict[str, tuple[str, ...]]:
    """Unlisted layers stay in float; a listed one has a format of its bits."""
    known = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for name, wanted in custom.layers.items():
        if name not in known:
            raise ConfigError(
                f"custom_compression names the layer {name!r}, which the model does not have. "
                f"{suggest(name, known)}"
            )
        if wanted.precision == FLOAT_BITS:
            continue
        if name not in layers:
            raise ConfigError(
                f"custom_compression asks for {wanted.precision} bits in {name!r}, which the "
                "target cannot quantize. Leave it out, or write precision 32."
            )
        found[name] = _of_bits(name, known[name], wanted.precision, runs)
    return {name: found[name] for name in layers if name in found}


def _of_bits(name: str, layer: nn.Module, bits: int, runs: Runs) -> tuple[str, ...]:
    possible = [form for form in FORMATS if _has_kernel(layer, form) and runs(layer, form)]
    formats = tuple(form for form in possible if FORMATS[form].weight.bits == bits)
    if not formats:
        known = sorted({FORMATS[form].weight.bits for form in possible})
        raise ConfigError(
            f"custom_compression asks for {bits} bits in {name!r}. This layer has "
            f"{', '.join(map(str, known))} and 32 (float): write one of them."
        )
    return formats


def _is_allowed(layer: nn.Module, args: QuantizationArgs) -> bool:
    if not isinstance(layer, _ConvNd):
        return True
    is_pointwise = all(size == 1 for size in layer.kernel_size)
    return (args.quantize_conv11 or not is_pointwise) and (args.quantize_group or layer.groups == 1)
