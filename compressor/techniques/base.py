"""What a technique is: it lists choices at sites, and applies the chosen ones to a copy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from compressor.interfaces.inputs import ModelInputs
from compressor.registry import Registry
from compressor.result import Choice, Plan

if TYPE_CHECKING:
    from compressor.structure.groups import ChannelGroup
    from compressor.training.algorithm import Algorithm
    from compressor.training.card import Card


class Stage(IntEnum):
    """When a technique is applied: structure (width, depth, rank), then values, then numbers.

    Width comes before depth because a channel group may run through a block that is then removed,
    and rank after both: a layer is factored as narrow as it has become. A palette is for the values
    that are left.
    """

    WIDTH = 0
    DEPTH = 1
    RANK = 2
    VALUES = 3
    PALETTE = 4
    NUMBERS = 5


@dataclass(frozen=True)
class Lost:
    """Something that a technique cannot act on, and why: reported, never guessed."""

    technique: str
    site: str
    reason: str


@dataclass
class TechniqueContext:
    """What a technique may know about the job.

    Attributes:
        inputs: of one call, for tracing, on the device of the model.
        width_multiple: kept widths are multiples of this, because of how the target's kernels step.
        min_width: no narrower; a layer that already is stays as it is.
        importance: name of the criterion that ranks channels; see `structure.scores`.
        group_cost: milliseconds that the layers of a channel group take on the target when the
            group keeps so many channels; None: widths follow `width_multiple` and `min_width`.
        accumulate_gradients: adds the gradients of the user's loss on a small subset to a model's
            parameters; first-order criteria call it.
        stores_compact: the target's files hold zeros and palettes in fewer bytes; where they do
            not, what only makes values alike saves nothing.
        layer_saves: whether a layer (by name) costs less on the target in a low-rank form, with
            these ranks; None where that is not asked.
        layer_formats: the formats that the target runs each layer in, by module name; asked once.
        lost: filled by `choices` with what could not be offered.
    """

    inputs: ModelInputs
    width_multiple: int = 4
    min_width: int = 4
    importance: str = "taylor"
    group_cost: Callable[[ChannelGroup, int], float] | None = None
    accumulate_gradients: Callable[[nn.Module], None] | None = None
    stores_compact: bool = False
    layer_saves: Callable[[str, str, tuple[int, ...]], bool] | None = None
    layer_formats: Callable[[], Mapping[str, Sequence[str]]] = dict
    lost: list[Lost] = field(default_factory=list)


class Technique(ABC):
    """A way to compress. One instance serves one reference; it may remember what it found there.

    Attributes:
        name: in plans and configurations.
        stage: when it is applied.
        card: what is told of it in the documentation.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    card: ClassVar[Card | None] = None

    @abstractmethod
    def choices(self, model: nn.Module, context: TechniqueContext) -> Iterator[Choice]:
        """Every choice at every site of `model`. Changes nothing."""

    @abstractmethod
    def apply(self, model: nn.Module, choices: Sequence[Choice], context: TechniqueContext) -> None:
        """Carry out `choices` on `model`, a copy of the reference, in place.

        A technique of stage NUMBERS that acts in the exported file only checks that its sites
        exist.

        Raises:
            SurgeryError: if a choice does not fit the model.
        """

    def algorithms(self, choices: Sequence[Choice]) -> Sequence[Algorithm]:
        """What training must do for `choices`, such as keeping masks."""
        del choices
        return ()


TECHNIQUES: Registry[type[Technique]] = Registry("technique")


def apply_plan(
    model: nn.Module, plan: Plan, techniques: Mapping[str, Technique], context: TechniqueContext
) -> None:
    """Carry out `plan` on `model`, a copy of the reference, in place, stage by stage.

    Raises:
        SurgeryError: if a choice does not fit the model.
    """
    for technique in sorted(techniques.values(), key=lambda t: t.stage):
        mine = plan.of(technique.name).choices
        if mine:
            technique.apply(model, mine, context)
