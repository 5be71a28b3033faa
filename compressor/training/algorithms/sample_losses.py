"""The loss of each sample of a batch, by a loss function that gives one number for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compressor.errors import DataError
from compressor.interfaces.data import sample_count, split_batch
from compressor.structure.trace import eval_mode
from compressor.training.precision import make_autocast
from compressor.training.state import State
from compressor.training.step import Call, recorded_calls


def sample_losses(
    state: State, batch: Any, losses: Callable[[Any, Any], Tensor] | None = None
) -> Tensor:
    """The loss of each sample of `batch` in evaluation mode, (N,), without gradients.

    Raises:
        DataError: if there is not one for each sample.
    """
    model, before = state.model, state.calls
    autocast = make_autocast(state.precision, state.device)
    try:
        with eval_mode(model), torch.no_grad(), autocast:
            with recorded_calls(model) as calls:
                state.run_model(model, batch)
            if losses is not None:
                return per_sample(losses(_outputs(calls), batch), sample_count(batch))
            samples = split_batch(batch, 1)
            found = _losses_of_outputs(state, samples, calls)
            if len(samples) > 1 and bool((found == found[0]).all()):
                # The loss was computed within the model, and the outputs have it for all.
                found = torch.stack([_loss_alone(state, sample) for sample in samples])
            return found
    finally:
        state.calls = before


def per_sample(losses: Tensor, samples: int) -> Tensor:
    """Losses (N, ...) as means for each sample, (N,).

    Raises:
        DataError: if there is not one for each of `samples`.

    >>> per_sample(torch.tensor([[1.0, 3.0], [0.0, 1.0]]), samples=2)
    tensor([2.0000, 0.5000])
    """
    if not losses.dim() or len(losses) != samples:
        raise DataError(
            f"The losses have the shape {tuple(losses.shape)}, and there are {samples} samples. "
            'Give one for each: nn.CrossEntropyLoss(reduction="none").'
        )
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses


def _losses_of_outputs(state: State, samples: list[Any], calls: list[Call]) -> Tensor:
    """Of the outputs for all of them, cut into those of each."""
    cut = [split_batch(call.outputs, 1) for call in calls]
    for outputs in cut:
        if len(outputs) != len(samples):
            raise DataError(
                f"The model gave outputs for {len(outputs)} samples, and the batch has "
                f"{len(samples)}, so whose loss is high is not known. Give `losses`."
            )
    found = []
    for index, sample in enumerate(samples):
        state.calls = [
            Call(call.inputs, part[index]) for call, part in zip(calls, cut, strict=True)
        ]
        found.append(_total(state.recompute_loss(_outputs(state.calls), sample)))
    return torch.stack(found)


def _loss_alone(state: State, sample: Any) -> Tensor:
    with recorded_calls(state.model) as state.calls:
        state.run_model(state.model, sample)
    return _total(state.recompute_loss(_outputs(state.calls), sample))


def _outputs(calls: list[Call]) -> Any:
    return calls[-1].outputs if calls else None


def _total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()
