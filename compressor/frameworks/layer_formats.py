"""Which formats a layer may be quantized to: what the target runs, of what the user allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from compressor.config import CustomCompression, QuantizationArgs
from compressor.errors import ConfigError, suggest
from compressor.quantization.plan import FORMATS
from compressor.search.space import FLOAT_BITS

LayerFormats = Mapping[str, Sequence[str]]
# what is worth trying, by what the run makes small: int4 of weights saves bytes alone
BY_OPTIMIZATION = {
    "latency": ("static_int8", "dynamic_int8"),
    "quantization": ("static_int8", "dynamic_int8"),
    "macs": (),
    "compression": ("static_int8", "dynamic_int8", "weight_int4"),
}


def possible_formats(
    layers: Sequence[str], model: nn.Module, optimization: str
) -> dict[str, tuple[str, ...]]:
    """The formats that are tried, for each of `layers`, in their order.

    Args:
        layers: with a product by a constant weight, in the order in which they run.
        model: that they belong to.
        optimization: what the run makes small.
    """
    modules = dict(model.named_modules())
    wanted = BY_OPTIMIZATION[optimization]
    found = {
        name: tuple(form for form in wanted if _has_kernel(modules.get(name), form))
        for name in layers
    }
    return {name: formats for name, formats in found.items() if formats}


def allowed_formats(
    layers: LayerFormats, model: nn.Module, custom: CustomCompression | None
) -> dict[str, tuple[str, ...]]:
    """Those of `layers` that the configuration does not keep in float, in the same order.

    Args:
        layers: the formats that are possible for each, in the order in which they run.
        model: that they belong to.
        custom: None allows all.

    Raises:
        ConfigError: if a layer that is named does not exist, or has no format of the bits that are
            asked for.
    """
    known = {name: tuple(formats) for name, formats in layers.items()}
    if custom is None:
        return known
    if custom.layers:
        return _named_layers(known, model, custom)
    args = custom.quantization_args
    if args is None:
        return known
    modules = dict(model.named_modules())
    first = round(args.skip_layers_ratio * len(known))
    skipped = set(range(first)) | set(args.skip_layers or ())
    return {
        name: formats
        for position, (name, formats) in enumerate(known.items())
        if position not in skipped and _is_allowed(modules[name], args)
    }


def _has_kernel(layer: nn.Module | None, form: str) -> bool:
    """Whether the runtime has a product of such a layer in that format."""
    return form == "static_int8" or isinstance(layer, nn.Linear)


def _named_layers(
    layers: Mapping[str, tuple[str, ...]], model: nn.Module, custom: CustomCompression
) -> dict[str, tuple[str, ...]]:
    """Unlisted layers stay in float; a listed one has a format of its bits."""
    known = dict(model.named_modules())
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
        found[name] = _of_bits(name, known[name], wanted.precision)
    return {name: found[name] for name in layers if name in found}


def _of_bits(name: str, layer: nn.Module, bits: int) -> tuple[str, ...]:
    formats = tuple(
        form for form in FORMATS if FORMATS[form].weight.bits == bits and _has_kernel(layer, form)
    )
    if not formats:
        known = sorted({FORMATS[form].weight.bits for form in FORMATS if _has_kernel(layer, form)})
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
