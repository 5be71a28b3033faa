"""Channel groups of a model, each verified: pruned equals masked, or the group is quarantined.

Groups are read off the exported graph by labels (`structure.labels`). Of a model that cannot be
exported the parts that can are read, each with fixed inputs and outputs; where there are none,
autograd's graph (`structure.dependency`). All are believed only after the check.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.export import ExportedProgram

from compressor.errors import first_line
from compressor.interfaces.inputs import ModelInputs
from compressor.structure.attention import replace_attention
from compressor.structure.check import IS_OUTPUT, Check
from compressor.structure.counting import with_counts
from compressor.structure.dependency import candidate_groups
from compressor.structure.groups import ChannelGroup, ChannelMap, Preparation
from compressor.structure.labels import Flow
from compressor.structure.labels.collect import Follower, collect_groups, frozen_layers
from compressor.structure.parts import exportable_parts
from compressor.structure.programs.trace import Traced
from compressor.structure.rewriting import (
    aligned_nodes,
    find_followers,
    fixing_modules,
    freeze_fixed,
    padding_modules,
    trace_modules,
)
from compressor.structure.trace import FORWARD_FAILURES, copy_for_analysis

ALL_AT_ONCE = "they can only be removed all at once"
OUTSIDE = "they are outside the parts of the model that can be exported"


def find_groups(model: nn.Module, inputs: ModelInputs) -> ChannelMap:
    """All channel groups of `model`, verified. The model is not changed.

    Groups whose channels are the model's outputs are left out: there is nothing to prune.

    Args:
        model: on any device; the check runs on the CPU in float64.
        inputs: real ones, for one call; two samples of them are used.

    Raises:
        ModelError: if the model cannot be copied, or does not run on `inputs`.
    """
    check = Check(model, inputs)
    attentions = replace_attention(check.probe)
    plain = copy_for_analysis(model).float()  # code may cast to float32, and rely on it
    replace_attention(plain)
    given = inputs.to("cpu").with_batch(2).float()
    graphs = exportable_parts(plain, given, trains=check.trains)
    if not graphs:
        return _by_autograd(Check(model, inputs))
    analysis = _Analysis(check, plain, given, graphs, attentions)
    analysis.rewrite(padding_modules(analysis.flow))
    found = analysis.verify()
    if analysis.rewrite(fixing_modules(analysis.flow, found.failed)):
        found = analysis.verify()
    quarantined = tuple(
        (group.name, analysis.why(group, found.faults[group.name]))
        for group in found.failed
        if found.faults[group.name] != IS_OUTPUT
    )
    return ChannelMap(tuple(found.sound), quarantined, analysis.frozen())


@dataclass(frozen=True)
class _Verified:
    """What the check said."""

    sound: list[ChannelGroup]
    failed: list[ChannelGroup]
    faults: dict[str, str]


class _Analysis:
    """The groups of one graph, found again when modules of it got programs."""

    def __init__(
        self,
        check: Check,
        plain: nn.Module,
        inputs: ModelInputs,
        graphs: Mapping[str, Sequence[ExportedProgram]],
        attentions: Sequence[str],
    ) -> None:
        self.flow = Flow(graphs)
        self._check = check
        self._plain = plain
        self._inputs = inputs
        self._graphs = graphs
        self._attentions = attentions
        self._names = _first_names(check.probe)
        self._programs: dict[str, Traced] = {}
        self._refused: dict[str, str] = {}
        self._followers: list[Follower] = []
        self._single: list[ChannelGroup] = []

    def rewrite(self, names: Collection[str]) -> bool:
        """Let these modules have programs; False if that is nothing new."""
        new = [name for name in names if name not in self._programs and name not in self._refused]
        traced, refused = trace_modules(self._plain, new, self._inputs)
        self._refused |= refused
        self._programs |= traced
        if not traced:
            return False
        pairs = {n: aligned_nodes(self.flow, n, p) for n, p in self._programs.items()}
        rewritten = {
            pairs[name][node]
            for name, program in self._programs.items()
            for node, _ in [*program.slots, *program.following]
            if node in pairs[name]
        }
        self.flow = Flow(self._graphs, rewritten)
        self._followers = [
            follower
            for name, program in self._programs.items()
            for follower in find_followers(self.flow, name, program, pairs[name])
        ]
        for name, program in self._programs.items():
            freeze_fixed(self.flow, name, program, pairs[name])
        return True

    def verify(self) -> _Verified:
        """All groups, each with the counts that it needs."""
        found = collect_groups(
            self.flow,
            self._positions(),
            dict(self._check.probe.named_parameters(remove_duplicate=False)),
            self._followers,
        )
        self._single = [group for group in found if group.size < 2]
        groups = [self._complete(group) for group in found if group.size > 1]
        faults = self._check.faults(groups)
        mended: dict[str, ChannelGroup] = {}
        failed = [group for group in groups if group.name in faults]
        for candidates in with_counts(self._check.probe, failed):
            left = [group for group in candidates if group.name not in mended]
            wrong = self._check.faults(left)
            mended |= {group.name: group for group in left if group.name not in wrong}
        sound = [mended.get(g.name, g) for g in groups if g.name in mended or g.name not in faults]
        faults = {name: why for name, why in faults.items() if name not in mended}
        if mended:
            faults |= self._check.faults(sound)
        return _Verified(
            [group for group in sound if group.name not in faults],
            [group for group in groups if group.name in faults],
            faults,
        )

    def _complete(self, group: ChannelGroup) -> ChannelGroup:
        """With the tensors' first names, and with what modules need before it is cut."""
        members = tuple(replace(m, tensor=self._names[m.tensor]) for m in group.members)
        steps = [
            Preparation(name)
            for name in self._attentions
            if any(member.tensor.startswith(f"{name}.") for member in members)
        ]
        programmed = {count.module for count in group.counts}
        steps += [Preparation(n, p.program) for n, p in self._programs.items() if n in programmed]
        return replace(group, members=members, prepared=tuple(steps))

    def _positions(self) -> dict[str, int]:
        order = {name: number for number, name in enumerate(self._names.values())}
        return {name: order[self._names[name]] for name in self.flow.tensors}

    def why(self, group: ChannelGroup, fault: str) -> str:
        """The fault, and why no program could mend it."""
        original = {name: alias for alias, name in reversed(self._names.items())}
        members = tuple(replace(m, tensor=original[m.tensor]) for m in group.members)
        names = fixing_modules(self.flow, [replace(group, members=members)])
        reasons = [self._refused[name] for name in names if name in self._refused]
        return f"{fault} {reasons[0]}" if reasons else fault

    def frozen(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Reason -> the layers whose channels cannot be removed because of it."""
        reasons = dict(frozen_layers(self.flow))
        if self._single:
            reasons[ALL_AT_ONCE] = tuple(group.name for group in self._single)
        outside = [
            name.rpartition(".")[0] or name
            for name, parameter in self._plain.named_parameters()
            if parameter.dim() > 1 and name not in self.flow.tensors
        ]
        if "" not in self._graphs and outside:
            reasons[OUTSIDE] = tuple(dict.fromkeys(outside))
        return tuple(reasons.items())


def verify_group(model: nn.Module, inputs: ModelInputs, group: ChannelGroup) -> str | None:
    """Why `group` cannot be pruned from `model`, in a sentence; None if it can. Changes nothing.

    Raises:
        ModelError: if the model cannot be copied, or does not run on `inputs`.
    """
    return Check(model, inputs).faults([group]).get(group.name)


def _by_autograd(check: Check) -> ChannelMap:
    """The groups that torch-pruning finds, for models without a graph of their own."""
    try:
        candidates = candidate_groups(check.probe, check.inputs)
    except FORWARD_FAILURES as error:
        reason = f"torch-pruning cannot read this model: {first_line(error)}"
        return ChannelMap((), (("", reason),))
    finally:
        check.probe.requires_grad_(False)
    quarantined = [(c.name, c.reason) for c in candidates if c.group is None]
    groups = [candidate.group for candidate in candidates if candidate.group is not None]
    faults = check.faults(groups)
    quarantined += [(name, why) for name, why in faults.items() if why != IS_OUTPUT]
    sound = tuple(group for group in groups if group.name not in faults)
    return ChannelMap(sound, tuple(quarantined))


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of every tensor -> its first name, in the order of the model."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for items in (
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    ):
        for name, tensor in items:
            names[name] = first.setdefault(id(tensor), name)
    return names
