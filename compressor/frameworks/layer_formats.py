"""Which formats a layer may be quantized to: what the target runs, of what the user allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from compressor.config import CustomCompression, QuantizationArgs
from compressor.errors import ConfigError, suggest
from compressor.quantization.affine import fits
from compressor.quantization.graph import QuantizationGraph
from compressor.quantization.kinds import Kind, reason_against
from compressor.quantization.plan import FILE_FORMATS, find_format
from compressor.search.space import FLOAT_BITS


@dataclass(frozen=True)
class Site:
    """What may be quantized.

    Attributes:
        kind: of layer.
        weights: that would be.
        module: that owns them.
    """

    kind: Kind
    weights: tuple[Tensor, ...]
    module: nn.Module | None


LayerFormats = Mapping[str, Sequence[str]]
Sites = Mapping[str, Site]
Runs = Callable[[Kind, nn.Module | None, str], bool]
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
# Of LSTMs, whose time is not measured alone: they are quantized where bytes decide.
LSTMS_BY_OPTIMIZATION = {
    "latency": (),
    "quantization": ("dynamic_int8",),
    "macs": (),
    "compression": ("dynamic_int8", "weight_fp16"),
}


def sites(graph: QuantizationGraph, model: nn.Module) -> dict[str, Site]:
    """All that can be quantized, in the order in which it runs; then embeddings.

    Args:
        graph: of the model.
        model: whose modules are asked for.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    paths: dict[str, list[str]] = {name: [] for name in graph.kinds}
    for product in graph.products:
        paths[product.layer].append(product.weight)
    for recurrence in graph.recurrences:
        paths[recurrence.layer] += recurrence.weights
    for table in graph.tables:
        paths[table.layer].append(table.weight)
    return {
        name: Site(kind, tuple(graph.tensor(path) for path in paths[name]), modules.get(name))
        for name, kind in graph.kinds.items()
    }


def is_in_files(kind: Kind, _: nn.Module | None, form: str) -> bool:
    """Whether a file for ONNX Runtime has such a layer in a format."""
    return form in FILE_FORMATS and reason_against(kind, find_format(form)) is None


def possible_formats(
    sites: Sites, optimization: str, runs: Runs = is_in_files
) -> dict[str, tuple[str, ...]]:
    """The formats that are tried, for each of `sites`, in their order.

    Args:
        sites: as of `sites`.
        optimization: what the run makes small.
        runs: whether the target takes a layer in a format.
    """
    found = {
        name: tuple(
            form for form in _worth_trying(site, optimization) if _is_possible(site, form, runs)
        )
        for name, site in sites.items()
    }
    return {name: formats for name, formats in found.items() if formats}


def allowed_formats(
    layers: LayerFormats,
    sites: Sites,
    model: nn.Module,
    custom: CustomCompression | None,
    runs: Runs = is_in_files,
) -> dict[str, tuple[str, ...]]:
    """Those of `layers` that the configuration does not keep in float, in the same order.

    Args:
        layers: the formats that are possible for each, in the order in which they run.
        sites: as of `sites`; a layer that is named may be of them alone.
        model: that they belong to.
        custom: None allows all.
        runs: whether the target takes a layer in a format.

    Raises:
        ConfigError: if a layer that is named or numbered does not exist, or has no format of the
            bits that are asked for.
    """
    known = {name: tuple(formats) for name, formats in layers.items()}
    if custom is None:
        return known
    if custom.layers:
        return _named_layers(sites, model, custom, runs)
    args = custom.quantization_args
    if args is None:
        return known
    missing = [position for position in args.skip_layers or () if position not in range(len(known))]
    if missing:
        raise ConfigError(
            f"skip_layers={list(args.skip_layers or ())} has {missing[0]}, and {len(known)} layers "
            f"can be quantized. Write positions from 0 to {len(known) - 1}."
        )
    layers_alone = [name for name in known if sites[name].kind != "table"]
    first = round(args.skip_layers_ratio * len(layers_alone))
    skipped = set(range(first)) | set(args.skip_layers or ())
    return {
        name: formats
        for position, (name, formats) in enumerate(known.items())
        if position not in skipped and _is_allowed(sites[name].module, args)
    }


def _worth_trying(site: Site, optimization: str) -> tuple[str, ...]:
    by_kind = {"table": TABLES_BY_OPTIMIZATION, "lstm": LSTMS_BY_OPTIMIZATION}
    return by_kind.get(site.kind, BY_OPTIMIZATION)[optimization]


def _is_possible(site: Site, form: str, runs: Runs) -> bool:
    """Whether the runtime has such a layer in that format, and the format its weights."""
    scheme = find_format(form).weight
    return runs(site.kind, site.module, form) and all(fits(w, scheme) for w in site.weights)


def _named_layers(
    sites: Sites,
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
        if name not in sites:
            raise ConfigError(
                f"custom_compression asks for {wanted.precision} bits in {name!r}, which the "
                "target cannot quantize. Leave it out, or write precision 32."
            )
        found[name] = _of_bits(name, sites[name], wanted.precision, runs)
    return {name: found[name] for name in sites if name in found}


def _of_bits(name: str, site: Site, bits: int, runs: Runs) -> tuple[str, ...]:
    """Those of the bits that are worth trying; where none is, the first that is possible."""
    possible = [form for form in FILE_FORMATS if _is_possible(site, form, runs)]
    formats = [form for form in possible if FILE_FORMATS[form].weight.bits == bits]
    if not formats:
        known = sorted({FILE_FORMATS[form].weight.bits for form in possible})
        raise ConfigError(
            f"custom_compression asks for {bits} bits in {name!r}. This layer has "
            f"{', '.join(map(str, known))} and 32 (float): write one of them."
        )
    worth_it = [form for form in formats if form in _worth_trying(site, "compression")]
    return tuple(worth_it or formats[:1])


def _is_allowed(layer: nn.Module | None, args: QuantizationArgs) -> bool:
    if not isinstance(layer, _ConvNd):
        return True
    is_pointwise = all(size == 1 for size in layer.kernel_size)
    return (args.quantize_conv11 or not is_pointwise) and (args.quantize_group or layer.groups == 1)
