"""Variants of the reference with the cheap repair done, and how far their outputs are from its."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.frameworks.subset import Subset, outputs_on, parts_of
from compressor.interfaces.divergence import divergence
from compressor.interfaces.inputs import ModelInputs, device_of, output_tensors
from compressor.logs import get_logger
from compressor.result import Plan
from compressor.search.making import Base
from compressor.structure.prefix import MOST_BYTES, PrefixCache, first_change
from compressor.structure.repair.changes import changed_modules, kept_outputs
from compressor.structure.repair.moments import Moments, record_moments
from compressor.structure.repair.repair import repair
from compressor.structure.repair.targets import Target, record_targets
from compressor.structure.run_record import RunRecord, record_run
from compressor.structure.trace import copy_model, in_eval
from compressor.structure.widening import widened
from compressor.techniques import TECHNIQUES, Stage, Technique, TechniqueContext, apply_plan
from compressor.training.algorithms.batchnorm import reestimate_batchnorm

logger = get_logger(__name__)

PROBE_SAMPLES = 2
HOPELESS_DAMAGE = 5.0  # of a part; the rest is not looked at
SENSING_SHARE = 0.25  # of the positions that a repair takes for a variant to be trained
REACH = 6  # layers behind a change that are fitted when it is sensed
WIDTH = (Stage.WIDTH, Stage.DEPTH)  # what only removes and chooses
STRUCTURE = (*WIDTH, Stage.RANK)
VALUES = (Stage.VALUES, Stage.PALETTE)


@dataclass(frozen=True)
class _Origin:
    """What variants are made from, and what they are repaired towards.

    Attributes:
        start: of the reference's shape; plans are applied to copies of it.
        model: of which variants keep what no plan changes: the reference, or a recovered variant.
        kept: which outputs of the reference's layers those of `model` have, by layer.
        record: of a run of `model`; None if it cannot be watched.
        targets: what its layers give on the first part of the subset.
        moments: of what its batch norms are given there.
        prefix: outputs of its modules.
    """

    start: nn.Module
    model: nn.Module
    kept: Mapping[str, Tensor]
    record: RunRecord | None = None
    targets: Mapping[str, Target] | None = None
    moments: Mapping[str, Moments] = field(default_factory=dict)
    prefix: PrefixCache | None = None


@dataclass(frozen=True)
class _Repaired:
    """A variant after its repair.

    Attributes:
        since: time of its first change in the record of its origin.
        outputs: on the first part of the subset; None if they were not seen.
    """

    model: nn.Module
    since: int = 0
    outputs: list[Tensor] | None = None


class Sensing:
    """Makes and measures variants of one reference, which is not changed."""

    def __init__(
        self,
        reference: nn.Module,
        subset: Subset,
        techniques: Mapping[str, Technique],
        context: Callable[[], TechniqueContext],
        *,
        is_classifier: bool,
        prefix_bytes: int = MOST_BYTES,
    ) -> None:
        """Measure nothing yet.

        Args:
            reference: in eval mode, on the device of the job.
            subset: that damage is measured on, and variants are repaired with.
            techniques: by name; all that plans have.
            context: of the techniques.
            is_classifier: see `divergence`.
            prefix_bytes: of outputs that are kept to be used again; 0 keeps none.
        """
        self._reference = reference
        self._subset = subset
        self._techniques = techniques
        self._context = context
        self._is_classifier = is_classifier
        self._prefix_bytes = prefix_bytes
        self._device = device_of(reference)
        self._based: tuple[Base[nn.Module], _Origin] | None = None

    def build(self, plan: Plan, base: Base[nn.Module] | None = None) -> nn.Module:
        """A copy of the reference with `plan` applied and repaired.

        Args:
            plan: holds the structure of `base`.
            base: a recovered variant, whose weights are taken over.

        Raises:
            SurgeryError: if a choice does not fit the reference.
        """
        return in_eval(self._make(plan, base, share=1.0).model)

    def damage_of(self, plan: Plan, base: Base[nn.Module] | None = None) -> float:
        """Divergence of the outputs of `build(plan, base)` from the reference's on the subset.

        The repair is of fewer positions. Where the first part of the subset says that it is
        hopeless, it is that of the first part.
        """
        variant = self._make(plan, base, share=SENSING_SHARE)
        origin = self._origin(base)
        total, samples = 0.0, 0
        for number, inputs in enumerate(self._parts):
            outputs = variant.outputs if number == 0 else None
            if outputs is None:
                outputs = self._run(variant.model, origin, variant.since, number)
            damage = self._divergence([outputs], [self._reference_outputs[number]])
            total += damage * inputs.batch_size
            samples += inputs.batch_size
            if not damage < HOPELESS_DAMAGE:
                break
        return total / samples

    def divergence_of(self, module: nn.Module) -> float:
        """Divergence of a module's outputs from the reference's on the subset."""
        outputs = outputs_on(module, self._parts, device_of(module))
        return self._divergence(outputs, self._reference_outputs)

    def time_of(self, module: str) -> int:
        """When a module of the reference runs first, in any unit; 0 if that is not known."""
        record = self._from_reference.record
        return 0 if record is None else record.start_of(module)

    def release(self) -> None:
        """Let go of the memory of what can be found again, and is when it is next asked for.

        It is a waste while something else needs the memory; what is made and measured afterwards is
        the same.
        """
        self._based = None
        for name in ("_from_reference", "_reference_outputs"):
            vars(self).pop(name, None)  # cached properties

    def _divergence(
        self, outputs: Iterable[list[Tensor]], reference: Iterable[list[Tensor]]
    ) -> float:
        return divergence(outputs, reference, is_classifier=self._is_classifier)

    def _make(self, plan: Plan, base: Base[nn.Module] | None, share: float) -> _Repaired:
        origin = self._origin(base)
        model = in_eval(copy_model(origin.start))
        structure, values = _stages(plan, STRUCTURE), _stages(plan, VALUES)
        kept = self._kept(structure)
        self._apply(model, structure)
        made = _Repaired(model)
        if len(structure) or base is not None:
            made = self._repaired(model, origin, kept, share)
        if len(values):
            before = copy_model(model)
            self._apply(model, values)
            frozen = _within(model, values)
            if changed_modules(before, model) <= frozen:
                made = self._repaired(model, origin, kept, share, frozen)
            else:  # channels are in another order
                self._reestimate(model)
                made = _Repaired(model)
        self._apply(model, _stages(plan, (Stage.NUMBERS,)))
        return made

    def _repaired(
        self,
        model: nn.Module,
        origin: _Origin,
        kept: Mapping[str, Tensor],
        share: float,
        frozen: Collection[str] = (),
    ) -> _Repaired:
        """`model`, repaired in place behind its first change."""
        changed = changed_modules(origin.model, model)
        if origin.record is None or origin.targets is None:
            if changed:
                self._reestimate(model)
            return _Repaired(model)
        since = first_change(origin.record, changed)
        if not changed:
            return _Repaired(model, since)
        with self._cut(model, origin, since, 0):
            outputs = repair(
                model,
                origin.targets,
                origin.record,
                self._call(0),
                kept=_relative(kept, origin.kept),
                since=since,
                until=_reach(origin, changed) if share < 1 else None,
                moments=origin.moments,
                frozen=frozen,
                share=share,
            )
        return _Repaired(model, since, outputs)

    def _reestimate(self, model: nn.Module) -> None:
        reestimate_batchnorm(
            model, self._parts, lambda each, inputs: inputs.to(self._device).call(each)
        )

    def _apply(self, model: nn.Module, plan: Plan) -> None:
        apply_plan(model, plan, self._techniques, self._context())

    def _kept(self, plan: Plan) -> Mapping[str, Tensor]:
        """Which outputs of the reference's layers a plan of structure leaves."""
        widths = _stages(plan, WIDTH)
        return kept_outputs(self._reference, lambda model: self._apply(model, widths))

    def _run(self, model: nn.Module, origin: _Origin, since: int, part: int) -> list[Tensor]:
        with torch.no_grad(), self._cut(model, origin, since, part):
            return self._call(part)(model)

    def _call(self, part: int) -> Callable[[nn.Module], list[Tensor]]:
        """What runs a model on a part of the subset; its outputs are on the CPU."""
        inputs = self._parts[part].to(self._device)
        return lambda model: [t.float().cpu() for t in output_tensors(inputs.call(model))]

    def _cut(
        self, model: nn.Module, origin: _Origin, since: int, part: int
    ) -> AbstractContextManager[None]:
        return nullcontext() if origin.prefix is None else origin.prefix.cut(model, since, part)

    # what is found once -----------------------------------------------------------------------

    @cached_property
    def _parts(self) -> Sequence[ModelInputs]:
        probe = self._subset.inputs[0].with_batch(PROBE_SAMPLES)
        try:
            record = record_run(self._reference, probe.to(self._device))
        except ModelError:
            return self._subset.inputs
        return parts_of(self._subset, record.largest_bytes // record.samples)

    @cached_property
    def _reference_outputs(self) -> list[list[Tensor]]:
        return list(outputs_on(self._reference, self._parts, self._device))

    @cached_property
    def _from_reference(self) -> _Origin:
        return self._watched(_Origin(self._reference, self._reference, self._kept(Plan())))

    def _origin(self, base: Base[nn.Module] | None) -> _Origin:
        """That of the reference, or of the base that was asked for last."""
        if base is None:
            return self._from_reference
        if self._based is None or self._based[0].model is not base.model:
            self._based = None  # it holds memory
            widths = _stages(base.plan, WIDTH)
            start = widened(self._reference, lambda model: self._apply(model, widths), base.model)
            model = in_eval(copy_model(base.model).to(self._device))
            self._based = (base, self._watched(_Origin(start, model, self._kept(base.plan))))
        return self._based[1]

    def _watched(self, origin: _Origin) -> _Origin:
        """With what is known of a run of its model, if that can be watched."""
        probe = self._subset.inputs[0].with_batch(PROBE_SAMPLES).to(self._device)
        parts = [inputs.to(self._device) for inputs in self._parts]
        try:
            record = record_run(origin.model, probe)
            targets = record_targets(origin.model, record, parts[0])
            moments = record_moments(origin.model, parts[0])
        except ModelError as error:
            logger.warning(
                "Pruned variants are repaired by their batch norms alone, since the model cannot "
                "be watched layer by layer: %s",
                error,
            )
            return origin
        prefix = None
        if self._prefix_bytes:
            prefix = PrefixCache(origin.model, record, probe, parts, self._prefix_bytes)
        return replace(origin, record=record, targets=targets, moments=moments, prefix=prefix)


def _reach(origin: _Origin, changed: Collection[str]) -> int | None:
    """Time of the last layer that is fitted when a choice is sensed; None is the end."""
    assert origin.record is not None
    assert origin.targets is not None
    last = max(origin.record.start_of(name) for name in changed)
    behind = sorted(t for name in origin.targets if (t := origin.record.start_of(name)) > last)
    return behind[REACH - 1] if len(behind) >= REACH else None


def _stages(plan: Plan, stages: Collection[Stage]) -> Plan:
    """The choices of techniques of those stages."""
    return Plan(tuple(c for c in plan if TECHNIQUES.get(c.technique).stage in stages))


def _within(model: nn.Module, plan: Plan) -> set[str]:
    """Names of the modules that the choices of `plan` name, and of all inside them."""
    sites = {name for choice in plan for name in (choice.site, *choice.modules)}
    return {
        name
        for name, _ in model.named_modules()
        if any(not site or name == site or name.startswith(f"{site}.") for site in sites)
    }


def _relative(kept: Mapping[str, Tensor], origin: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Numbers of outputs of the reference's layers as numbers of those that the origin has."""
    found = {}
    for name, rows in kept.items():
        if name in origin and bool(torch.isin(rows, origin[name]).all()):
            found[name] = torch.searchsorted(origin[name], rows)
    return found
