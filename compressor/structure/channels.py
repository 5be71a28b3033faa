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
from compressor.structure.program_trace import Traced
from compressor.structure.rewriting import (
    aligned_nodes,
    find_followers,
    fixing_modules,
    padding_modules,
    trace_modules,
)
from compressor.structure.trace import FORWARD_FAILURES, copy_model


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
    single = copy_model(model).cpu().float().eval()  # code may cast to float32, and rely on it
    replace_attention(single)
    given = inputs.to("cpu").with_batch(2).float()
    graphs = exportable_parts(single, given, trains=check.trains)
    del single
    if not graphs:
        return _by_autograd(Check(model, inputs))
    analysis = _Analysis(check, graphs, attentions)
    analysis.rewrite(padding_modules(analysis.flow))
    found = analysis.verify()
    names = fixing_modules(analysis.flow, found.failed)
    if analysis.rewrite(names):
        found = analysis.verify()
    quarantined = tuple((name, analysis.why(fault)) for name, fault in found.faults.items())
    return ChannelMap(tuple(found.sound), quarantined, frozen_layers(analysis.flow))


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
        graphs: Mapping[str, Sequence[ExportedProgram]],
        attentions: Sequence[str],
    ) -> None:
        self.flow = Flow(graphs)
        self._check = check
        self._graphs = graphs
        self._attentions = attentions
        self._names = _first_names(check.probe)
        self._programs: dict[str, Traced] = {}
        self._refused: dict[str, str] = {}
        self._followers: list[Follower] = []

    def rewrite(self, names: Collection[str]) -> bool:
        """Let these modules have programs; False if that is nothing new."""
        new = [name for name in names if name not in self._programs and name not in self._refused]
        traced, refused = trace_modules(self._check.probe, new, self._check.inputs)
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
        return True

    def verify(self) -> _Verified:
        """All groups, each with the counts that it needs."""
        found = collect_groups(
            self.flow,
            self._positions(),
            dict(self._check.probe.named_parameters(remove_duplicate=False)),
            self._followers,
        )
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

    def why(self, fault: str) -> str:
        """The fault, and why nothing could be done about it."""
        reasons = [reason for reason in self._refused.values() if reason]
        return f"{fault} {reasons[0]}" if reasons else fault


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
    quarantined += [(name, why) for name, why in faults.items() if why is not IS_OUTPUT]
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
