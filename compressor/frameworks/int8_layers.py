"""Which layers the user lets run in int8."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from compressor.config import CustomCompression, QuantizationArgs
from compressor.errors import ConfigError, suggest

FLOAT_BITS = 32
INT8_BITS = 8


def allowed_layers(
    layers: Sequence[str], model: nn.Module, custom: CustomCompression | None
) -> list[str]:
    """Those of `layers` that the configuration does not keep in float, in the same order.

    Args:
        layers: that the target can run in int8, in the order in which they run.
        model: that they belong to.
        custom: None allows all.

    Raises:
        ConfigError: if a layer that is named does not exist, or a width other than 8 or 32 is
            asked.
    """
    if custom is None:
        return list(layers)
    if custom.layers:
        return _named_layers(layers, model, custom)
    args = custom.quantization_args
    if args is None:
        return list(layers)
    modules = dict(model.named_modules())
    first = round(args.skip_layers_ratio * len(layers))
    skipped = set(range(first)) | set(args.skip_layers or ())
    return [
        name
        for position, name in enumerate(layers)
        if position not in skipped and _is_allowed(modules[name], args)
    ]


def _named_layers(layers: Sequence[str], model: nn.Module, custom: CustomCompression) -> list[str]:
    """Unlisted layers stay in float."""
    known = dict(model.named_modules())
    for name, wanted in custom.layers.items():
        if name not in known:
            raise ConfigError(
                f"custom_compression names the layer {name!r}, which the model does not have. "
                f"{suggest(name, known)}"
            )
        if wanted.precision not in {INT8_BITS, FLOAT_BITS}:
            raise ConfigError(
                f"custom_compression asks for {wanted.precision} bits in {name!r}. This version "
                "has 8 (int8) and 32 (float): write one of them."
            )
    return [
        name
        for name in layers
        if name in custom.layers and custom.layers[name].precision == INT8_BITS
    ]


def _is_allowed(layer: nn.Module, args: QuantizationArgs) -> bool:
    if not isinstance(layer, _ConvNd):
        return True
    is_pointwise = all(size == 1 for size in layer.kernel_size)
    return (args.quantize_conv11 or not is_pointwise) and (args.quantize_group or layer.groups == 1)
