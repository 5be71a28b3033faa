"""Weights that become 0, more and more of them, while training goes on (Zhu and Gupta, 2017)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.training.algorithms.holding import Holding
from compressor.training.algorithms.windows import refuse_window
from compressor.training.card import Card
from compressor.training.clock import Duration, DurationLike
from compressor.training.events import Event
from compressor.training.ramp import progress
from compressor.training.state import State

if TYPE_CHECKING:
    from compressor.structure.surgery import Edit

Scope: TypeAlias = Literal["layer", "global"]


def cubic_sparsity(fraction: float, final: float, initial: float = 0.0) -> float:
    """The sparsity on the way from `initial` to `final`: fast at first, then ever more gently.

    final + (initial - final) * (1 - fraction)**3

    Args:
        fraction: of the way, 0 to 1.
        final: sparsity at 1.
        initial: sparsity at 0.

    >>> cubic_sparsity(0.5, final=0.5)
    0.4375
    """
    return final + (initial - final) * (1 - fraction) ** 3


def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Which weights are kept when the smallest ones go.

    Args:
        weight: of any shape.
        sparsity: fraction that goes, 0 to 1; rounded to whole weights. Of equal ones, the first go.

    Returns:
        Of the shape of `weight`, False where it goes.

    >>> magnitude_mask(torch.tensor([3.0, -1.0, 2.0, -4.0]), 0.5)
    tensor([ True, False, False,  True])
    """
    return ~_smallest([weight.detach().abs()], sparsity)[0]


def nm_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Which weights are kept when, of every `m` neighbours along the inputs, the `n` largest stay.

    Args:
        weight: (out, in, …), with `in` a multiple of `m`.
        n: 1 to `m`.
        m: length of a group, such as 4 for the 2:4 of sparse tensor cores.

    Returns:
        Of the shape of `weight`, False where it goes.

    Raises:
        ConfigError: if it does not divide.

    >>> nm_mask(torch.tensor([[1.0, -4.0, 3.0, 2.0]]), 2, 4)
    tensor([[False,  True,  True, False]])
    """
    if weight.dim() < 2 or weight.shape[1] % m or not 1 <= n <= m:
        raise ConfigError(
            f"A weight of shape {tuple(weight.shape)} has no pattern {n}:{m}. "
            f"Its dimension 1 must be a multiple of {m}."
        )
    return ~_smallest_of_groups(weight.detach().abs(), n, m)


class GradualSparsity(Holding):
    """Sets the smallest weights to 0, in so many steps, and holds them there.

    Masked weights get no gradient, and are 0 again after every step, which momentum would move them
    from. A weight that was masked stays so. An average of the weights (`EMA`, `SWA`) is masked when
    it is put into the model, so that what is evaluated and kept is as sparse as what is trained.
    After the fit the zeros are in the weights themselves; nothing is left on the model. It has no
    `window`: `start` and `end` say when it grows, and what has grown is held.

    Args:
        final_sparsity: fraction of the weights of the layers that is 0 in the end. With a pattern
            n:m, None and at most 1 - n/m.
        start: of the growth.
        end: of the growth; leave time after it to recover.
        updates: steps in which it grows; each sorts the weights.
        layers: names of the modules whose `weight` is masked; None: all linear and convolution
            layers, with a pattern those whose inputs it divides.
        pattern: None, or "n:m", such as "2:4": of every m inputs n stay. It grows by whole groups.
        scope: "layer": every layer becomes equally sparse; "global": the smallest of all go, which
            may leave nothing of a layer.

    Raises:
        ConfigError: what contradicts itself.
    """

    events = Holding.events | {Event.BATCH_END, Event.EPOCH_END}
    participle = "masked"
    card = Card(
        summary="Prunes single weights by magnitude along a cubic schedule, while training.",
        source="Zhu and Gupta (2017), To prune, or not to prune; n:m: Mishra et al. (2021), "
        "Accelerating sparse deep neural networks",
        functional="magnitude_mask",
        settings="`final_sparsity`, or a `pattern` such as '2:4'; `end`, from which on masks stay.",
        use_when="The target runs sparse weights faster, or the file is compressed.",
        avoid_when="The target computes densely: zeros are not skipped, prune channels instead.",
        cost="A byte a masked weight, two passes over the weights a step, `updates` sorts of them.",
    )

    def __init__(
        self,
        final_sparsity: float | None = None,
        start: DurationLike = "0dur",
        end: DurationLike = "0.5dur",
        *,
        updates: int = 50,
        layers: Collection[str] | None = None,
        pattern: str | None = None,
        scope: Scope = "layer",
    ) -> None:
        self.pattern = None if pattern is None else _parse_pattern(pattern)
        most = 1.0 if self.pattern is None else 1 - self.pattern[0] / self.pattern[1]
        if final_sparsity is None and pattern is None:
            raise ConfigError("How sparse? Give `final_sparsity`, such as 0.8, or a `pattern`.")
        self.final_sparsity = most if final_sparsity is None else final_sparsity
        if not 0 <= self.final_sparsity <= most:
            raise ConfigError(
                f"final_sparsity={final_sparsity} cannot be reached. Write 0 to {most:g}."
            )
        if updates < 1:
            raise ConfigError(f"updates={updates} masks nothing. Write 1 or more.")
        if scope not in ("layer", "global"):
            raise ConfigError(f"There is no scope {scope!r}. Write 'layer' or 'global'.")
        self.start, self.end = Duration.parse(start), Duration.parse(end)
        self.updates = updates
        super().__init__(layers)  # what is held: True where a weight is 0
        self.scope = scope
        self._level = 0  # of `updates`

    @property
    def sparsity(self) -> float:
        """The fraction of the layers' weights that is masked now."""
        total = sum(pruned.numel() for pruned in self._held.values())
        return sum(int(p.sum()) for p in self._held.values()) / total if total else 0.0

    def project(self, values: Tensor, held: Tensor) -> None:
        """Zero where `held`."""
        values.masked_fill_(held, 0.0)

    def fits(self, weight: Tensor) -> bool:
        """Whether the pattern divides its inputs."""
        return self.pattern is None or (weight.dim() > 1 and not weight.shape[1] % self.pattern[1])

    def on(self, event: Event, state: State) -> None:
        """Mask gradients or weights, or grow the masks."""
        if event in (Event.BATCH_END, Event.EPOCH_END):
            self._grow(state)
            return
        if event is Event.SETUP:
            self._level = 0
        super().on(event, state)

    def check_window(self) -> None:
        """Refuse a window: there are `start` and `end`."""
        refuse_window(self, "`start` and `end`", "nobody would hold its masks outside")

    def rebind(self, edit: Edit, state: State) -> None:
        """Cut masks like their parameters; the next batch masks what is new."""
        super().rebind(edit, state)
        if self._level:
            self._level = -1  # below every level: masks are chosen anew

    def state_dict(self) -> dict[str, Any]:
        """Masks, and how far they have grown."""
        return {"pruned": self._held, "level": self._level}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take them."""
        self.begin_to_hold(saved["pruned"])
        self._level = saved["level"]

    def check_layer(self, name: str, holders: list[nn.Module]) -> None:
        """Refuse a layer that the pattern does not divide as well."""
        super().check_layer(name, holders)
        for layer in holders:
            weight = layer.get_parameter("weight")
            if self.pattern is not None and not self.fits(weight):
                nm_mask(weight, *self.pattern)  # raises

    def _grow(self, state: State) -> None:
        passed = progress(state.clock, state.max_duration, self.start, self.end)
        level = int(passed * self.updates + 1e-9)  # 0.3 * 10 is 3, although 0.3 is less
        if level <= self._level:
            return
        self._level = level
        targets = self.targets(state.model)
        scores = [self._score(name, weight) for name, weight in targets.items()]
        masks = self._choose(scores, cubic_sparsity(level / self.updates, self.final_sparsity))
        # Surgery may have left more zeros than are due now; they stay.
        self.begin_to_hold(
            {
                name: mask | self._held.get(name, torch.zeros_like(mask))
                for name, mask in zip(targets, masks, strict=True)
            }
        )
        self.hold(state.model)

    def _score(self, name: str, weight: Tensor) -> Tensor:
        """Magnitudes; what is masked goes first, also before a weight that happens to be 0."""
        score = weight.detach().abs()
        pruned = self._held.get(name)
        return score if pruned is None else score.masked_fill(pruned.to(score.device), -1.0)

    def _choose(self, scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
        if self.scope == "layer":
            return [mask for score in scores for mask in self._choose_together([score], sparsity)]
        return self._choose_together(scores, sparsity)

    def _choose_together(self, scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
        if self.pattern is None:
            return _smallest(scores, sparsity)
        n, m = self.pattern
        masks = [_smallest_of_groups(score, n, m) for score in scores]
        losses = [
            _to_groups(score.masked_fill(~mask, 0.0), m).sum(1)
            for score, mask in zip(scores, masks, strict=True)
        ]
        chosen = _smallest(losses, sparsity / (1 - n / m) if n < m else 0.0)
        return [
            mask & _from_groups(groups[:, None].expand(-1, m), mask.shape)
            for mask, groups in zip(masks, chosen, strict=True)
        ]


def _parse_pattern(pattern: str) -> tuple[int, int]:
    n, _, m = pattern.partition(":")
    if not (n.isdigit() and m.isdigit() and 1 <= int(n) <= int(m)):
        raise ConfigError(f"There is no pattern {pattern!r}. Write '2:4' to keep 2 of every 4.")
    return int(n), int(m)


def _smallest(scores: Sequence[Tensor], fraction: float) -> list[Tensor]:
    """True for the smallest entries of all `scores` together, `fraction` of them."""
    if not scores:
        return []
    flat = torch.cat([score.flatten() for score in scores])
    # Not a threshold: of several equal scores only as many as are needed are to go.
    order = flat.argsort(stable=True)[: round(fraction * flat.numel())]
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[order] = True
    parts = torch.split(mask, [score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def _smallest_of_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """True for the m - n smallest of every group of `m` along dimension 1."""
    groups = _to_groups(scores, m)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(1, groups.argsort(dim=1, stable=True)[:, : m - n], True)
    return _from_groups(mask, scores.shape)


def _to_groups(tensor: Tensor, m: int) -> Tensor:
    """(out, in, …) -> (groups, m), groups along `in`."""
    return tensor.movedim(1, -1).reshape(-1, m)


def _from_groups(groups: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_to_groups`."""
    moved = torch.Size((shape[0], *shape[2:], shape[1]))
    return groups.reshape(moved).movedim(-1, 1)
