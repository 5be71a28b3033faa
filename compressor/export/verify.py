"""How far an exported file's outputs are from the model's, and how often its answers differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import ExportError
from compressor.interfaces.inputs import ModelInputs, device_of, output_tensors
from compressor.result import Agreement, Parity
from compressor.structure.trace import eval_mode


def parity(model: nn.Module, runtime_module: Callable[..., Any], inputs: ModelInputs) -> Parity:
    """Compare `model` in evaluation mode with the file that was made of it, on the same inputs.

    Raises:
        ExportError: if the file returns other outputs than the model, or some that are not finite.
    """
    with eval_mode(model), torch.no_grad():
        expected = output_tensors(inputs.to(device_of(model)).call(model))
        actual = output_tensors(inputs.call(runtime_module))
    wanted = [tuple(tensor.shape) for tensor in expected]
    if [tuple(tensor.shape) for tensor in actual] != wanted:
        raise ExportError(
            f"The exported file returns shapes {[tuple(tensor.shape) for tensor in actual]}, "
            f"the model {wanted}. Look for sizes that its forward computes in Python."
        )
    absolute, relative = 0.0, 0.0
    for tensor, reference in zip(actual, expected, strict=True):
        if not reference.numel():
            continue
        reference = reference.detach().double().cpu()
        error = float((tensor.detach().double().cpu() - reference).abs().max())
        if not error < float("inf"):
            raise ExportError(
                "The exported file returns values that are not finite. "
                "Export in fp32 if it was in fp16; else check the model's own outputs."
            )
        absolute = max(absolute, error)
        relative = max(relative, error / max(float(reference.abs().max()), 1e-12))
    return Parity(absolute, relative, inputs.batch_size)


def agreement(
    file: Callable[..., Any],
    simulation: nn.Module,
    reference: nn.Module,
    batches: Iterable[ModelInputs],
    *,
    has_positions: bool = False,
) -> Agreement | None:
    """How often a quantized file names another class than its simulation, and than the reference.

    Args:
        file: the file, as it runs.
        simulation: the quantized model in torch.
        reference: the float model. Both are called in evaluation mode, on their devices.
        batches: of samples.
        has_positions: a class is named at every position of the first output (N, K, ...), and of
            each sample the share of its positions is counted, as in a segmentation.

    Returns:
        None if there is no sample, or the first output is not (N, K) with two classes or more;
        or, of positions, (N, K, ...).
    """
    samples, differing = 0, [0.0, 0.0]
    for inputs in batches:
        answers = [
            _answers(model, inputs, has_positions=has_positions)
            for model in (file, simulation, reference)
        ]
        named, *expected = answers
        for i, other in enumerate(expected):
            if named is None or other is None:
                return None
            differing[i] += float((named != other).double().mean(1).sum())
        samples += inputs.batch_size
    if not samples:
        return None
    return Agreement(differing[0] / samples, differing[1] / samples, samples)


def _answers(
    model: Callable[..., Any], inputs: ModelInputs, *, has_positions: bool
) -> Tensor | None:
    """The classes of each sample (N, positions), on the CPU."""
    if isinstance(model, nn.Module):
        with eval_mode(model), torch.no_grad():
            outputs = output_tensors(inputs.to(device_of(model)).call(model))
    else:
        outputs = output_tensors(inputs.call(model))
    dims = outputs[0].dim() if outputs else 0
    if dims < 2 or (dims == 2) is has_positions or outputs[0].shape[1] < 2:
        return None
    return outputs[0].argmax(1).reshape(len(outputs[0]), -1).cpu()
