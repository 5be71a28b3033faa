"""Dropout that trains few subnetworks, each for long (Lee et al., 2022).

https://proceedings.mlsys.org/paper_files/paper/2022/hash/72aa1632b83c93a2f680dbb5235f1a83-Abstract.html
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compressor.errors import ConfigError, ModelError
from compressor.seeding import derive_seed
from compressor.structure import surgery
from compressor.structure.surgery import Edit
from compressor.training.algorithm import Algorithm
from compressor.training.algorithms.surgical import FIRST_AT_SETUP
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State


def gyro_dropout(inputs: Tensor, p: float, tau: int, seed: int) -> Tensor:
    """Dropout with `tau` masks, which `seed` decides: sample n of N gets the mask n * tau // N.

    Args:
        inputs: (N, ...); not changed.
        p: with which an entry is dropped; what is kept is divided by 1 - p.
        tau: masks; as many samples in a row share one.
        seed: the same one gives the same masks for the same shape (...).

    Returns:
        Of the shape of `inputs`.

    >>> dropped = gyro_dropout(torch.ones(4, 1000), p=0.5, tau=2, seed=0)
    >>> torch.equal(dropped[0], dropped[1]), torch.equal(dropped[1], dropped[2])
    (True, False)
    >>> dropped.unique()
    tensor([0., 2.])
    """
    generator = torch.Generator().manual_seed(seed)
    is_kept = torch.rand(tau, *inputs.shape[1:], generator=generator) >= p
    masks = is_kept.to(inputs.device, inputs.dtype) * (0.0 if p == 1 else 1 / (1 - p))
    groups = torch.arange(len(inputs), device=inputs.device) * tau // max(1, len(inputs))
    return inputs * masks[groups]


def gyro_phase(fraction: float, sigma: int, tau: int) -> int:
    """The number of the `tau` masks in use, of sigma // tau such sets, after a part of training.

    >>> [gyro_phase(fraction, sigma=12, tau=4) for fraction in (0.0, 0.3, 0.4, 0.7, 1.0)]
    [0, 0, 1, 2, 2]
    """
    phases = max(1, sigma // tau)
    return min(int(fraction * phases + 1e-9), phases - 1)  # 1e-9: 0.29 * 100 is below 29


class GyroDropoutLayer(nn.Dropout):
    """A dropout with masks that change with `phase` alone; in evaluation it does nothing.

    Args:
        p: with which an entry is dropped.
        sigma: masks in the whole training.
        tau: masks at a time.
        seed: of the masks.

    Attributes:
        phase: the number of the masks in use.
    """

    def __init__(self, p: float = 0.5, sigma: int = 256, tau: int = 16, seed: int = 0) -> None:
        super().__init__(p)
        self.sigma = sigma
        self.tau = tau
        self.seed = seed
        self.phase = 0

    def forward(self, input: Tensor) -> Tensor:
        """(N, ...) -> (N, ...)."""
        if not self.training or not self.p:
            return input
        return gyro_dropout(input, self.p, self.tau, derive_seed(self.seed, self.phase))

    def extra_repr(self) -> str:
        """The options."""
        return f"p={self.p}, sigma={self.sigma}, tau={self.tau}"


def apply_gyro_dropout(
    model: nn.Module,
    p: float | None = None,
    sigma: int = 256,
    tau: int = 16,
    seed: int = 0,
) -> Edit:
    """Put a `GyroDropoutLayer` in place of each `nn.Dropout` of `model`, in place.

    In evaluation the model computes what it did. In a loop of your own, call
    `advance_gyro_dropout(model, fraction)` before each batch. Done again, it changes nothing.

    Args:
        model: of any architecture.
        p: with which an entry is dropped; None: that of each layer.
        sigma: subnetworks that are trained in all.
        tau: of them, trained at a time, each on its part of the batch.
        seed: of the masks, which are others in each layer.

    Returns:
        What happened to the parameters: nothing.

    Raises:
        ConfigError: an option out of range.
        ModelError: if there is no dropout.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3))
    >>> _ = apply_gyro_dropout(model, sigma=8, tau=2)
    >>> model[1]
    GyroDropoutLayer(p=0.3, sigma=8, tau=2)
    """
    _check_options(p, sigma, tau)
    edit, is_found = Edit(), False
    for name, module in list(model.named_modules()):
        is_found |= isinstance(module, GyroDropoutLayer)
        if type(module) is not nn.Dropout:
            continue
        chosen = module.p if p is None else p
        new = GyroDropoutLayer(chosen, sigma, tau, derive_seed(seed, "gyro dropout", name))
        edit, is_found = edit.then(surgery.replace(model, name, new)), True
    if not is_found:
        raise ModelError(
            f"The {type(model).__name__} has no nn.Dropout. Leave gyro dropout out, or write "
            "nn.Dropout where it calls a function."
        )
    return edit


def advance_gyro_dropout(model: nn.Module, fraction: float) -> None:
    """Let the layers of `model` use the masks of a moment, in place.

    Args:
        model: of `apply_gyro_dropout`.
        fraction: of the whole training that has passed, 0 to 1.

    >>> model = nn.Sequential(GyroDropoutLayer(sigma=8, tau=2))
    >>> advance_gyro_dropout(model, fraction=0.5)
    >>> model[0].phase
    2
    """
    for module in model.modules():
        if isinstance(module, GyroDropoutLayer):
            module.phase = gyro_phase(fraction, module.sigma, module.tau)


class GyroDropout(Algorithm):
    """Applies `apply_gyro_dropout` before training, and takes the next masks at BATCH_START.

    Which masks are in use is a function of the clock, and what they are one of the trainer's seed.
    With micro-batches, each of them is divided among the masks.

    Args:
        p: with which an entry is dropped; None: that of each layer.
        sigma: subnetworks that are trained in all.
        tau: of them, trained at a time.

    Raises:
        ConfigError: an option out of range.
    """

    events = frozenset({Event.SETUP, Event.FIT_START, Event.BATCH_START})
    before = FIRST_AT_SETUP
    card = Card(
        summary="Trains a fixed number of subnetworks by dropout, each for longer than a batch.",
        source="Lee et al. (2022), Gyro Dropout: Maximizing Ensemble Effect in Neural Network "
        "Training",
        functional="apply_gyro_dropout",
        settings="`sigma` subnetworks in all, `tau` at a time; `p`, where the layers have another.",
        use_when="A network that has nn.Dropout is trained from scratch.",
        avoid_when="A compressed model is recovered in a short fit: few masks are seen, each for "
        "a few batches; together with torch.compile, which compiles anew with the masks.",
        cost="tau masks are drawn on the CPU in each layer and batch, and copied to the device.",
    )

    def __init__(self, p: float | None = None, sigma: int = 256, tau: int = 16) -> None:
        _check_options(p, sigma, tau)
        self.p = p
        self.sigma = sigma
        self.tau = tau
        self._phase: int | None = None  # of the layers; None: not known

    def on(self, event: Event, state: State) -> None:
        """Replace, then advance."""
        if event is Event.SETUP:
            state.edit(
                lambda model: apply_gyro_dropout(model, self.p, self.sigma, self.tau, state.seed)
            )
        if event is not Event.BATCH_START:
            self._phase = None
            return
        phase = gyro_phase(state.fraction, self.sigma, self.tau)
        if phase != self._phase:
            advance_gyro_dropout(state.model, state.fraction)
            self._phase = phase

    def rebind(self, edit: Edit, state: State) -> None:
        """New layers may have come in."""
        self._phase = None


def _check_options(p: float | None, sigma: int, tau: int) -> None:
    if p is not None and not 0 <= p < 1:
        raise ConfigError(f"p={p} is no part to drop. Write 0 to below 1, or None.")
    if not 1 <= tau <= sigma:
        raise ConfigError(
            f"sigma={sigma}, tau={tau}: of sigma subnetworks, tau are trained at a time. Write 1 "
            "or more for tau, and not less for sigma."
        )
