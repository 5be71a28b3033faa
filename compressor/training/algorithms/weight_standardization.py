"""Filters of mean 0 and variance 1 (Qiao et al., 2019, https://arxiv.org/abs/1903.10520)."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor, nn

from compressor.errors import ConfigError, ModelError
from compressor.structure import surgery
from compressor.structure.surgery import Edit
from compressor.training.algorithm import Algorithm
from compressor.training.algorithms.surgical import FIRST_AT_SETUP, GROUPED, changing_layers
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State

VARIANCE_FLOOR = 1e-10  # a filter of equal entries becomes 0; far below what is trained
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NOT_STANDARDIZED = (
    "cannot act in one fit: zeros and equal entries of a weight are others once it is "
    "standardized. Leave WeightStandardization out."
)


def standardize_weight(weight: Tensor) -> Tensor:
    """(weight - mean) / sqrt(variance), of each filter by itself.

    Args:
        weight: (out, in, ...).

    Returns:
        (out, in, ...), of mean 0 and variance 1 over all but the first dimension.

    >>> standardize_weight(torch.tensor([[[1.0, 3.0]], [[5.0, 1.0]]]))
    tensor([[[-1.,  1.]],
    <BLANKLINE>
            [[ 1., -1.]]])
    """
    dims = list(range(1, weight.dim()))
    variance, mean = torch.var_mean(weight, dim=dims, correction=0, keepdim=True)
    return (weight - mean) * (variance + VARIANCE_FLOOR).rsqrt()


class StandardizedWeight(nn.Module):
    """`standardize_weight` as a parametrization of torch."""

    def forward(self, weight: Tensor) -> Tensor:
        """(out, in, ...) -> the same."""
        return standardize_weight(weight)


def apply_weight_standardization(model: nn.Module, n_last_layers_ignore: int = 0) -> Edit:
    """Let the convolutions of `model` use standardized weights, in place.

    The trained weights are the parameter objects that they were, now called
    "….parametrizations.weight.original". What the model computes changes: the mean of a filter is
    lost, and its length, which a norm behind it makes up for in training. Train on; for what was
    trained, `reestimate_batchnorm` first. Done again, it changes nothing.

    To deploy a plain convolution that computes the same:
    `torch.nn.utils.parametrize.remove_parametrizations(conv, "weight")`.

    Args:
        model: with convolutions of one to three dimensions, and norms behind them.
        n_last_layers_ignore: convolutions that stay as they are, the last ones in the order of
            their registration.

    Returns:
        What happened to the parameters: they have other names.

    Raises:
        ConfigError: if `n_last_layers_ignore` is below 0.
        ModelError: if there is no convolution, or all are left out.
        SurgeryError: if a weight is computed otherwise already.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> _ = apply_weight_standardization(model)
    >>> model[0].weight.mean((1, 2, 3)).abs().max().item() < 1e-6
    True
    """
    if n_last_layers_ignore < 0:
        raise ConfigError(
            f"n_last_layers_ignore={n_last_layers_ignore} is no number of layers. Write 0 or more."
        )
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, CONVOLUTIONS)]
    chosen = found[: max(len(found) - n_last_layers_ignore, 0)]
    if not chosen:
        raise ModelError(
            f"The {type(model).__name__} has {len(found)} convolutions of which "
            f"{n_last_layers_ignore} are left out, and none to standardize. Lower "
            "n_last_layers_ignore, or leave WeightStandardization out."
        )
    edit = Edit()
    with surgery.whole_or_not_at_all(model):
        for name, conv in chosen:
            if not _is_standardized(conv):
                weight = f"{name}.weight".lstrip(".")
                edit = edit.then(surgery.parametrize(model, weight, StandardizedWeight()))
    return edit


class WeightStandardization(Algorithm):
    """Applies `apply_weight_standardization` before training.

    Args:
        n_last_layers_ignore: convolutions that stay as they are, the last ones in the order of
            their registration.
    """

    events = frozenset({Event.SETUP})
    before = FIRST_AT_SETUP
    after = ("BlurPool", "Factorize", "SqueezeExcite")  # which look for plain convolutions
    conflicts = MappingProxyType(
        {
            **changing_layers("apply_weight_standardization", *GROUPED),
            "Holding": NOT_STANDARDIZED,
        }
    )
    card = Card(
        summary="Gives each filter of a convolution the mean 0 and the variance 1.",
        source="Qiao et al. (2019), Micro-Batch Training with Batch-Channel Normalization and "
        "Weight Standardization",
        functional="apply_weight_standardization",
        settings="`n_last_layers_ignore`, the convolutions at the end that stay as they are.",
        use_when="Batches are very small, and the norms are group norms or batch norms.",
        avoid_when="A trained model is compressed or shortly fine-tuned: what it computes changes. "
        "Convolutions have no norm behind them. Weights are pruned or masked in the same fit.",
        cost="A pass over the weights at each forward and backward; nothing at inference, once it "
        "is baked in.",
    )

    def __init__(self, n_last_layers_ignore: int = 0) -> None:
        self.n_last_layers_ignore = n_last_layers_ignore

    def on(self, event: Event, state: State) -> None:
        """Parametrize."""
        state.edit(lambda model: apply_weight_standardization(model, self.n_last_layers_ignore))


def _is_standardized(conv: nn.Module) -> bool:
    return any(isinstance(module, StandardizedWeight) for module in conv.modules())
