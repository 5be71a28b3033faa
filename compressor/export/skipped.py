"""Modules with weights that are in no product of a model's graph, and why they stay in float."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

NO_PRODUCT = "It is no convolution or linear operation by a constant weight in the model's graph."
REASONS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Embedding, "Its table is read by other operations as well, or by none, or in TensorRT."),
    (nn.EmbeddingBag, "ONNX Runtime has no sum of rows of integers."),
    (_ConvTransposeNd, "ONNX Runtime has no transposed convolution of integers."),
    (nn.GRU, "ONNX Runtime has no GRU of integers."),
    (nn.RNN, "ONNX Runtime has no RNN of integers."),
    (nn.RNNCellBase, "ONNX Runtime has no single step of integers."),
)


def skipped_modules(
    model: nn.Module, layers: Collection[str], tables: Collection[str]
) -> dict[str, str]:
    """Why modules with a matrix of their own are not quantized, by name.

    Args:
        model: in float.
        layers: names of all layers that can be quantized; a module is one if such a layer is it,
            or is inside of it.
        tables: names of those that are looked up.
    """
    found = {}
    for name, module in model.named_modules():
        # what it looks up stays in float, even where a layer shares the weight
        is_float = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and name not in tables
        if is_float or (name and _has_matrix(module) and not layers_in(name, layers)):
            found[name] = _reason(module)
    return found


def layers_in(name: str, layers: Collection[str]) -> list[str]:
    """Those of `layers` that the module `name` is, or has inside."""
    return [layer for layer in layers if not name or f"{layer}.".startswith(f"{name}.")]


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


def _reason(module: nn.Module) -> str:
    if isinstance(module, nn.LSTM) and module.proj_size:
        return f"ONNX Runtime has no LSTM with a projection (proj_size={module.proj_size})."
    return next((why for kind, why in REASONS if isinstance(module, kind)), NO_PRODUCT)
