"""Convex combinations of pairs of samples (Zhang et al., 2018, https://arxiv.org/abs/1710.09412)."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import ConfigError, DataError
from compressor.training.algorithm import Algorithm
from compressor.training.algorithms.mixing import (
    MixedTargets,
    check_mixable,
    check_share,
    draw_mixing,
    draw_permutation,
)
from compressor.training.algorithms.soft_targets import IGNORED
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State


def mixup_batch(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.2,
    mixing: float | None = None,
    indices: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, float]:
    """(1 - mixing) * inputs + mixing * inputs[indices], one share for the whole batch.

    The loss of the mixed inputs is `(1 - mixing) * loss(outputs, targets) + mixing * loss(outputs,
    permuted)`; with cross entropy that is the loss of the targets mixed in the same way.

    Args:
        inputs: (N, ...), floating point; not changed.
        targets: (N, ...), of any dtype.
        alpha: of Beta(alpha, alpha), from which the share is drawn; 0 mixes nothing.
        mixing: the share of the other sample, 0 to 1; None draws one, 0.5 at most, so that the
            sample itself weighs more.
        indices: (N,), the other sample of each; None draws a permutation.
        generator: for the draws, on the CPU; None is torch's global one.

    Returns:
        Mixed inputs (N, ...), permuted targets (N, ...), and the share.

    Raises:
        ConfigError: `alpha` or `mixing` out of range.
        DataError: if inputs and targets cannot be mixed.

    >>> inputs, targets = torch.tensor([[0.0], [4.0]]), torch.tensor([0, 1])
    >>> mixup_batch(inputs, targets, mixing=0.25, indices=torch.tensor([1, 0]))
    (tensor([[1.],
            [3.]]), tensor([1, 0]), 0.25)
    """
    check_mixable(inputs, targets)
    if not inputs.is_floating_point():
        raise DataError(
            f"The inputs are {inputs.dtype}; a share of one is none of the other. Mix images as "
            "floats, and text after its embedding."
        )
    if mixing is None:
        mixing = draw_mixing(alpha, generator)
        mixing = min(mixing, 1 - mixing)
    check_share(mixing)
    if indices is None:
        indices = draw_permutation(len(inputs), generator)
    mixed = torch.lerp(inputs, inputs[indices.to(inputs.device)], mixing)
    return mixed, targets[indices.to(targets.device)], mixing


class MixUp(Algorithm):
    """Trains on mixed pairs: inputs at BEFORE_FORWARD, within the micro-batch, targets after it.

    Targets become weights of the classes, (N, K, ...), which the loss must take, as cross entropy
    does; one that takes class indices only fails at the first batch, and needs `interpolate_loss`.
    Targets in the shape of the outputs are mixed as they are. Class weights in a loss are divided
    by the number of targets, where torch divides by their sum for indices. With other mixing
    algorithms they act in turn.

    Args:
        alpha: of Beta(alpha, alpha): the nearer to 0, the less is mixed.
        interpolate_loss: leave the targets as they are and mix the losses of both, for a loss that
            takes class indices only; it is then computed twice. Not beside another that mixes.
        input_key: place of the inputs in a batch.
        target_key: place of the targets.
        ignore_index: a target that does not count.
        class_dim: where the classes are in the outputs; None: where the task says, or 1. Write -1
            for tokens (N, T, K).

    Raises:
        ConfigError: if `alpha` is below 0.
    """

    events = frozenset({Event.BEFORE_FORWARD, Event.AFTER_FORWARD, Event.AFTER_LOSS})
    card = Card(
        summary="Trains on convex combinations of pairs of samples and of their targets.",
        source="Zhang et al. (2018), mixup: Beyond Empirical Risk Minimization",
        functional="mixup_batch",
        settings="`alpha`: 0.2 mixes little, 1 makes all shares as likely.",
        use_when="An image classifier overfits, and training is long.",
        avoid_when="The fit is short or the model underfits, as small compressed ones do; inputs "
        "are no real numbers (tokens).",
        cost="One pass over the inputs. With interpolate_loss a second evaluation of the loss.",
    )

    def __init__(
        self,
        alpha: float = 0.2,
        *,
        interpolate_loss: bool = False,
        input_key: int | str = 0,
        target_key: int | str = 1,
        ignore_index: int = IGNORED,
        class_dim: int | None = None,
    ) -> None:
        if not alpha >= 0:
            raise ConfigError(f"alpha={alpha} is no Beta distribution. Write 0 or more.")
        self.alpha = alpha
        self.mixed_targets = MixedTargets(
            input_key, target_key, interpolate_loss, ignore_index, class_dim
        )
        self.conflicts = self.mixed_targets.conflicts

    def on(self, event: Event, state: State) -> None:
        """Mix inputs, then their targets or losses."""
        if event is not Event.BEFORE_FORWARD:
            self.mixed_targets.follow(event, state)
            return
        inputs, targets = self.mixed_targets.items(state)
        mixing = draw_mixing(self.alpha)
        mixing = min(mixing, 1 - mixing)
        indices = draw_permutation(len(inputs))
        mixed, _, _ = mixup_batch(inputs, targets, mixing=mixing, indices=indices)
        self.mixed_targets.begin(state, mixed, indices, mixing)
