"""The mean error of each output channel, taken out of the bias.

Rounded weights and inputs shift the mean of what a layer computes. It is measured layer by layer,
with the inputs as the quantized model has them, and the layers before corrected already: the
empirical form of Nagel et al. (2019), Data-free quantization (1906.04721), section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from compressor.errors import DataError
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.affine import fake_quantize
from compressor.quantization.corrections.channels import channel_axis, count_readers
from compressor.quantization.corrections.walking import Walk, forward_of
from compressor.quantization.graph import QuantizationGraph
from compressor.quantization.model import QuantizedModel
from compressor.quantization.plan import QuantizationPlan


@torch.no_grad()
def correct_biases(
    graph: QuantizationGraph,
    plan: QuantizationPlan,
    reference: fx.GraphModule,
    parts: Sequence[ModelInputs],
) -> list[str]:
    """Change biases such that each layer of `plan` has the mean output of `reference`, in place.

    Layers without a bias, and those whose bias others have as well, are left as they are.

    Args:
        graph: of the model, whose biases are changed.
        plan: the formats and numbers that the model will have.
        reference: a copy of `graph.module` with the weights of the float model.
        parts: calibration samples, as of `walking.cut`.

    Returns:
        The layers that were corrected.

    Raises:
        DataError: if an output is not finite; the message names the layer.
    """
    walks = Walk(reference, parts), Walk(QuantizedModel(graph, plan).graph, parts)
    corrected = []
    for product in graph.products_of(plan.formats):
        if product.bias is None or count_readers(graph, product.bias) != 1:
            continue
        forward, axis = forward_of(product), channel_axis(product)
        bias, weight = graph.tensor(product.bias), graph.tensor(product.weight)
        tensor = plan.weights.get(product.weight)
        if tensor is not None:
            scales = tensor.scale.to(weight.device), tensor.zero_point.to(weight.device)
            weight = fake_quantize(weight, *scales, tensor.scheme)
        float_weight = reference.get_parameter(product.weight)
        float_bias = reference.get_parameter(product.bias)
        shift, count = torch.zeros_like(bias, dtype=torch.float64), 0
        for expected, actual in zip(
            walks[0].inputs(product), walks[1].inputs(product), strict=True
        ):
            wanted = forward(expected, float_weight, float_bias)
            shift += _channel_sums(wanted - forward(actual, weight, bias), axis)
            count += wanted.numel() // len(bias)
        if not shift.isfinite().all():
            raise DataError(
                f"The outputs of the layer {product.layer!r} are not finite. Look for NaN in the "
                "calibration data, or for an overflow in the layer."
            )
        bias.add_((shift / count).to(bias.dtype))
        corrected.append(product.layer)
    return corrected


def _channel_sums(x: Tensor, axis: int) -> Tensor:
    return x.double().movedim(axis, 0).flatten(1).sum(1)
