"""Batch norms that normalise parts of a batch (Hoffer et al., 2017, https://arxiv.org/abs/1705.08741)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from compressor.errors import ConfigError, ModelError
from compressor.structure import surgery
from compressor.structure.surgery import Edit
from compressor.training.algorithm import Algorithm
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State


def ghost_parts(inputs: Tensor, ghost_batch_size: int) -> Sequence[Tensor]:
    """The batch as parts of at most so many samples, as even as can be.

    Even, because a last part of one sample has no variance.

    >>> [len(part) for part in ghost_parts(torch.zeros(10, 3), ghost_batch_size=4)]
    [4, 3, 3]
    """
    return inputs.tensor_split(max(-(-len(inputs) // ghost_batch_size), 1))


class _Ghost(_BatchNorm):
    """Normalises each part of a batch by itself while it is trained; in evaluation a batch norm.

    The running statistics move once a batch, towards the mean of those of the parts: the paper
    moves them once a part, which makes them younger the larger a batch is.
    """

    ghost_batch_size: int

    @classmethod
    def around(cls, norm: _BatchNorm, ghost_batch_size: int) -> _Ghost:
        """The batch norm `norm` by parts, with the same parameters and buffers."""
        new = cls(
            norm.num_features,
            norm.eps,
            norm.momentum,
            norm.affine,
            norm.track_running_stats,
            device="meta",
        )
        new.ghost_batch_size = ghost_batch_size
        new._parameters.update(norm._parameters)
        new._buffers.update(norm._buffers)
        return new

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> the same."""
        if not self.training or len(input) <= self.ghost_batch_size:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        parts = ghost_parts(input, self.ghost_batch_size)
        if self.running_mean is None or self.running_var is None:
            return torch.cat([self._normalised(part, None, None) for part in parts])
        means, variances = (
            torch.zeros_like(running).repeat(len(parts), 1)
            for running in (self.running_mean, self.running_var)
        )
        outputs = [self._normalised(*each) for each in zip(parts, means, variances, strict=True)]
        self._follow(self.running_mean, self.running_var, means.mean(0), variances.mean(0))
        return torch.cat(outputs)

    def extra_repr(self) -> str:
        """As of a batch norm, and the size of a part."""
        options: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{options}, ghost_batch_size={self.ghost_batch_size}"

    def _normalised(self, part: Tensor, mean: Tensor | None, variance: Tensor | None) -> Tensor:
        """`part` by its own statistics, which are written into `mean` and `variance`."""
        return F.batch_norm(
            part, mean, variance, self.weight, self.bias, True, momentum=1.0, eps=self.eps
        )

    def _follow(
        self, running_mean: Tensor, running_var: Tensor, mean: Tensor, variance: Tensor
    ) -> None:
        step: Any = self.momentum
        with torch.no_grad():
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
                if step is None:  # a mean of all batches
                    step = 1 / float(self.num_batches_tracked)
            running_mean.lerp_(mean, step or 0.0)
            running_var.lerp_(variance, step or 0.0)


class GhostBatchNorm1d(_Ghost, nn.BatchNorm1d):
    """Of inputs (N, C) or (N, C, L)."""


class GhostBatchNorm2d(_Ghost, nn.BatchNorm2d):
    """Of images (N, C, H, W)."""


class GhostBatchNorm3d(_Ghost, nn.BatchNorm3d):
    """Of volumes (N, C, D, H, W)."""


GHOSTS: dict[type[nn.Module], type[_Ghost]] = {
    nn.BatchNorm1d: GhostBatchNorm1d,
    nn.BatchNorm2d: GhostBatchNorm2d,
    nn.BatchNorm3d: GhostBatchNorm3d,
}


def apply_ghost_batchnorm(model: nn.Module, ghost_batch_size: int = 32) -> Edit:
    """Let the batch norms of `model` normalise parts of a batch, in place.

    Parameters and buffers stay the same objects under the same names, and what the model computes
    in evaluation stays. Batches of `ghost_batch_size` or less are normalised as a whole. Done
    again, it changes nothing.

    Args:
        model: with batch norms; others, such as those synchronised between processes, stay.
        ghost_batch_size: samples in a part, at most.

    Returns:
        What happened to the parameters: nothing.

    Raises:
        ConfigError: if `ghost_batch_size` is not above 0.
        ModelError: if there is no batch norm.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    >>> _ = apply_ghost_batchnorm(model, ghost_batch_size=8)
    >>> type(model[1]).__name__
    'GhostBatchNorm1d'
    """
    if ghost_batch_size < 1:
        raise ConfigError(
            f"ghost_batch_size={ghost_batch_size} is no number of samples. Write 1 or more."
        )
    edit, is_ghostly = Edit(), False
    for name, module in list(model.named_modules()):
        if isinstance(module, _Ghost):
            is_ghostly = True
        elif type(module) in GHOSTS:
            assert isinstance(module, _BatchNorm)
            new = GHOSTS[type(module)].around(module, ghost_batch_size)
            edit, is_ghostly = edit.then(surgery.replace(model, name, new)), True
    if not is_ghostly:
        raise ModelError(
            f"The {type(model).__name__} has no nn.BatchNorm1d, 2d or 3d. Leave GhostBatchNorm out."
        )
    return edit


class GhostBatchNorm(Algorithm):
    """Applies `apply_ghost_batchnorm` before training.

    A part is one of what reaches the layer: of a micro-batch where there are some, and of the
    samples of one process; what is left of a batch after `SelectiveBackprop` may be a single part.

    Args:
        ghost_batch_size: samples in a part, at most.
    """

    events = frozenset({Event.SETUP})
    card = Card(
        summary="Normalises parts of a large batch, each by its own statistics.",
        source="Hoffer et al. (2017), Train longer, generalize better: closing the generalization "
        "gap in large batch training of neural networks",
        functional="apply_ghost_batchnorm",
        settings="`ghost_batch_size`, the samples that share statistics.",
        use_when="Batches are large, and the noise of small ones is missed.",
        avoid_when="Batches, or micro-batches, are small already.",
        cost="A call of the batch norm for each part, and a copy of its outputs; nothing at "
        "inference.",
    )

    def __init__(self, ghost_batch_size: int = 32) -> None:
        self.ghost_batch_size = ghost_batch_size

    def on(self, event: Event, state: State) -> None:
        """Replace."""
        state.edit(lambda model: apply_ghost_batchnorm(model, self.ghost_batch_size))
