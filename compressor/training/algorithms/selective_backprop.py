"""Training on the samples whose loss is high (Jiang et al., 2019, https://arxiv.org/abs/1910.00762)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.interfaces.data import map_leaves, sample_count
from compressor.structure.trace import eval_mode
from compressor.training.algorithm import Algorithm
from compressor.training.algorithms.progressive_resizing import resize_batch
from compressor.training.algorithms.sample_losses import per_sample, sample_losses
from compressor.training.batch import get_item, set_item
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State


def should_selective_backprop(
    fraction: float, batch: int, start: float = 0.5, end: float = 0.9, interrupt: int = 2
) -> bool:
    """Whether samples of a batch are to be selected.

    Args:
        fraction: of the whole training that has passed, 0 to 1.
        batch: number of batches so far.
        start: fraction of the training from which on it is done.
        end: fraction from which on it is not.
        interrupt: every so many batches, one is left whole; 0 leaves none.

    >>> [should_selective_backprop(0.6, batch) for batch in range(4)]
    [False, True, False, True]
    """
    return start <= fraction < end and (not interrupt or batch % interrupt != 0)


def select_using_loss(
    inputs: Tensor,
    targets: Tensor,
    model: nn.Module,
    loss_function: Callable[[Any, Tensor], Tensor],
    keep: float = 0.5,
    scale_factor: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The samples of a batch to train on, drawn by `draw_by_loss`.

    Do it before inputs are mixed with each other: a mixture has no loss of its own. The model is
    called in evaluation mode and without gradients, so batch norms do not see the batch twice.

    Args:
        inputs: (N, ...); not changed.
        targets: (N, ...).
        model: takes inputs.
        loss_function: of outputs and targets, one for each sample, (N, ...):
            `nn.CrossEntropyLoss(reduction="none")`.
        keep: fraction of the samples, above 0 to 1.
        scale_factor: of the sides of images for the losses alone, above 0 to 1.
        generator: for the draws, on the CPU; None is torch's global one.

    Returns:
        Inputs (K, ...) and targets (K, ...), K = max(1, int(keep * N)).

    Raises:
        ConfigError: an option out of range.
        DataError: if there is not a loss for each sample.

    >>> inputs, targets = torch.rand(8, 2), torch.arange(8) % 2
    >>> loss = nn.CrossEntropyLoss(reduction="none")
    >>> chosen, labels = select_using_loss(inputs, targets, nn.Linear(2, 2), loss)
    >>> chosen.shape, labels.shape
    (torch.Size([4, 2]), torch.Size([4]))
    """
    _check_options(keep, scale_factor)
    seen = inputs if scale_factor == 1 else resize_batch(inputs, scale_factor)[0]
    with eval_mode(model), torch.no_grad():
        losses = per_sample(loss_function(model(seen), targets), len(inputs))
    chosen = draw_by_loss(losses, keep, generator)
    return inputs[chosen.to(inputs.device)], targets[chosen.to(targets.device)]


def draw_by_loss(
    losses: Tensor, keep: float = 0.5, generator: torch.Generator | None = None
) -> Tensor:
    """Samples drawn without replacement, by weights (rank / N)^(1 / keep - 1): high losses first.

    Args:
        losses: (N,).
        keep: fraction of the samples; 1 keeps all, 0.5 weighs by the rank itself.
        generator: on the CPU; None is torch's global one.

    Returns:
        (max(1, int(keep * N)),) int64 on the CPU, ascending.

    >>> draw_by_loss(torch.tensor([3.0, 1.0, 2.0]), keep=1.0)
    tensor([0, 1, 2])
    """
    samples = len(losses)
    percentiles = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
    weights = percentiles ** (1 / keep - 1)
    count = max(1, int(keep * samples + 1e-9))  # 1e-9: 0.29 * 100 is below 29
    # 1e-30: of many samples, the weights of the lowest may be 0, and one of them be needed
    drawn = torch.multinomial(weights.clamp_min(1e-30), count, generator=generator)
    return losses.detach().cpu().argsort(stable=True)[drawn].sort().values


class SelectiveBackprop(Algorithm):
    """Trains only on part of a batch, at BATCH_START, before anything changes or mixes the samples.

    The loss of each sample is that of your own loss function for it alone, of outputs in evaluation
    mode. Only what has an entry for each sample is selected: tensors (N, ...), and lists and tuples
    of N items without tensors. Durations in samples count those that are trained.

    Args:
        start: fraction of the training from which on it is done.
        end: fraction from which on it is not.
        keep: fraction of the samples, above 0 to 1.
        scale_factor: of the sides of images for the losses alone, above 0 to 1: at 0.5 they cost a
            quarter.
        interrupt: every so many batches, one is left whole; 0 leaves none.
        losses: (outputs of the model, batch) -> (N, ...), the loss of each sample. None asks your
            loss function for one sample after the other, which takes N calls of it.
        input_key: place of the images in a batch, with `scale_factor`.

    Raises:
        ConfigError: an option out of range.
    """

    events = frozenset({Event.BATCH_START})
    before = ("RandAugment", "AugMix", "CutOut", "ColOut", "ProgressiveResizing", "MixUp", "CutMix")
    card = Card(
        summary="Trains on the part of each batch whose loss is high, and skips the rest.",
        source="Jiang et al. (2019), Accelerating Deep Learning by Focusing on the Biggest Losers",
        functional="select_using_loss",
        settings="`keep`, the fraction of a batch; `start` and `end`, fractions of the "
        "training; `losses`, which gives the loss of each sample at once.",
        use_when="Much of a large data set is learnt already, and steps are long.",
        avoid_when="Labels are wrong at times, which have the highest losses; batches are small, "
        "and batch norms see still fewer samples; the fit is short.",
        cost="A forward pass of the batch without gradients, and a loss for each sample. Saves "
        "the part of a step that the samples left out would take.",
    )

    def __init__(
        self,
        start: float = 0.5,
        end: float = 0.9,
        keep: float = 0.5,
        scale_factor: float = 1.0,
        interrupt: int = 2,
        *,
        losses: Callable[[Any, Any], Tensor] | None = None,
        input_key: int | str = 0,
    ) -> None:
        if not 0 <= start < end <= 1 or interrupt < 0 or interrupt == 1:
            raise ConfigError(
                f"start={start}, end={end}, interrupt={interrupt} never selects. Write two parts "
                "of the training, the earlier one first, and an interrupt of 0, 2 or more."
            )
        _check_options(keep, scale_factor)
        self.start = start
        self.end = end
        self.keep = keep
        self.scale_factor = scale_factor
        self.interrupt = interrupt
        self.losses = losses
        self.input_key = input_key

    def on(self, event: Event, state: State) -> None:
        """Select."""
        batch, clock = state.batch, state.clock
        if not should_selective_backprop(
            state.fraction, clock.batch, self.start, self.end, self.interrupt
        ):
            return
        seen = batch
        if self.scale_factor != 1:
            small, _ = resize_batch(get_item(batch, self.input_key), self.scale_factor)
            seen = set_item(batch, self.input_key, small)
        chosen = draw_by_loss(sample_losses(state, seen, self.losses), self.keep)
        state.batch = take_samples(batch, chosen)


def take_samples(batch: Any, chosen: Tensor) -> Any:
    """A batch of the same form with the samples `chosen`, (K,) int64, of what has one for each.

    >>> take_samples({"x": torch.tensor([1, 2, 3]), "name": ["a", "b", "c"]}, torch.tensor([0, 2]))
    {'x': tensor([1, 3]), 'name': ['a', 'c']}
    """
    count, numbers = sample_count(batch), chosen.tolist()

    def is_per_sample(value: Any) -> bool:
        is_list = type(value) in (list, tuple) and value is not batch and len(value) == count
        return is_list and not any(isinstance(item, Tensor) for item in value)

    def take(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            is_cut = leaf.dim() > 0 and len(leaf) == count
            return leaf[chosen.to(leaf.device)] if is_cut else leaf
        return type(leaf)(leaf[n] for n in numbers) if isinstance(leaf, (list, tuple)) else leaf

    return map_leaves(take, batch, is_per_sample)


def _check_options(keep: float, scale_factor: float) -> None:
    if not 0 < keep <= 1 or not 0 < scale_factor <= 1:
        raise ConfigError(
            f"keep={keep}, scale_factor={scale_factor} keeps no part. Write above 0, at most 1."
        )
