"""From labels to channel groups: what shares a fate, and what kind of channel it is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from compressor.structure.groups import ChannelGroup, Count, Member
from compressor.structure.labels.flow import ROWS, TAPS, Flow

Place = tuple[str, int]  # a tensor and a dimension of it
COMPUTED_WEIGHT = ("original0", "weight_g")  # the scale of a weight norm, new style and old


@dataclass(frozen=True)
class Follower:
    """An integer that counts the entries with these labels that are left.

    Attributes:
        module: that holds it.
        attribute: of the module.
        path: in the attribute.
        labels: (n,).
        amount: by how much it falls with each entry.
    """

    module: str
    attribute: str
    path: tuple[int, ...]
    labels: Tensor
    amount: Fraction = Fraction(1)


def collect_groups(
    flow: Flow,
    order: Mapping[str, int],
    parameters: Collection[str],
    followers: Sequence[Follower] = (),
) -> list[ChannelGroup]:
    """All groups of channels that can be removed.

    Channels that run through the same tensors, with as many entries in each, make a group: any of
    them may be removed.

    Args:
        flow: of the graph.
        order: position of every tensor in the model, by its name in the graph.
        parameters: names of those that are trained.
        followers: integers of programs.
    """
    classes = _classes(flow)
    kinds: dict[tuple[tuple[Place, int], ...], list[int]] = defaultdict(list)
    for root, places in classes.items():
        kind = tuple(sorted((place, len(entries)) for place, entries in places.items()))
        kinds[kind].append(root)
    counts = _amounts(flow, followers)
    groups = []
    for roots in kinds.values():
        members = _members(flow, [classes[root] for root in roots], order)
        trained = {m.tensor for m in members if m.tensor in parameters}
        is_made = any(m.side == "out" and m.tensor in trained for m in members)
        is_used = any(name in flow.used for name in trained)
        if not is_used or not (is_made or len(trained) == 1):
            continue  # a tensor that nothing uses, a table that is computed with
        own = tuple(
            Count(f.module, f.attribute, amounts, f.path)
            for f, by_root in zip(followers, counts, strict=True)
            if any(amounts := tuple(by_root.get(root, 0) for root in roots))
        )
        groups.append((members, len(roots), own))
    return _named(groups, order)


def frozen_layers(flow: Flow) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Reason -> the layers whose outputs are frozen because of it, in the order of the model."""
    found: dict[str, list[str]] = {}
    for name, vectors in flow.tensors.items():
        for labels in vectors:
            if labels is None or len(vectors) < 2 or int(labels[0]) in flow.read:
                continue
            frozen = labels[flow.sets.is_frozen(labels)]
            reasons = {flow.sets.reason(int(label)) for label in frozen[:1]} - {TAPS, ROWS}
            for reason in reasons:
                layers = found.setdefault(str(reason), [])
                layer = name.rpartition(".")[0] or name
                if layer not in layers:
                    layers.append(layer)
    return tuple((reason, tuple(layers)) for reason, layers in found.items())


def _classes(flow: Flow) -> dict[int, dict[Place, list[int]]]:
    """For every set that is not frozen: the entries of each dimension of each tensor in it."""
    classes: dict[int, dict[Place, list[int]]] = defaultdict(dict)
    for name, vectors in flow.tensors.items():
        for dim, labels in enumerate(vectors):
            if labels is None:
                continue
            roots = flow.sets.find(labels).tolist()
            free = (~flow.sets.is_frozen(labels)).tolist()
            for entry, (root, is_free) in enumerate(zip(roots, free, strict=True)):
                if is_free:
                    classes[root].setdefault((name, dim), []).append(entry)
    return classes


def _amounts(flow: Flow, followers: Sequence[Follower]) -> list[dict[int, int]]:
    counts = []
    for follower in followers:
        by_root: dict[int, int] = defaultdict(int)
        for root in flow.sets.find(follower.labels).tolist():
            by_root[root] += 1
        whole = {root: number * follower.amount for root, number in by_root.items()}
        # A channel that would change it by a fraction is refused by the check.
        counts.append({root: int(n) for root, n in whole.items() if n.denominator == 1})
    return counts


def _members(
    flow: Flow, classes: Sequence[Mapping[Place, list[int]]], order: Mapping[str, int]
) -> tuple[Member, ...]:
    members = []
    for name, dim in classes[0]:
        labels = flow.tensors[name][dim]
        assert labels is not None
        is_read = int(labels[0]) in flow.read
        index = tuple(tuple(places[name, dim]) for places in classes)
        members.append(Member(name, dim, "in" if is_read else "out", index, len(labels)))
    return tuple(sorted(members, key=lambda m: (order[m.tensor], m.side == "in", m.dim)))


def _named(
    found: Sequence[tuple[tuple[Member, ...], int, tuple[Count, ...]]], order: Mapping[str, int]
) -> list[ChannelGroup]:
    """Groups named after the first layer that makes their channels, in the order of the model."""

    def place(group: tuple[tuple[Member, ...], int, tuple[Count, ...]]) -> tuple[int, int]:
        maker = _maker(group[0])
        return order[maker.tensor], maker.index[0][0]

    groups = []
    taken: set[str] = set()
    for members, size, counts in sorted(found, key=place):
        maker = _maker(members)
        name = maker.module.partition(".parametrizations.")[0] or maker.tensor
        if name in taken:
            name = f"{name}[{maker.index[0][0]}]"
        taken.add(name)
        groups.append(ChannelGroup(name, size, members, counts))
    return groups


def _maker(members: Sequence[Member]) -> Member:
    makers = [m for m in members if m.side == "out"] or list(members)
    weights = [m for m in makers if m.tensor.endswith(("weight", *COMPUTED_WEIGHT))]
    return next((m for m in weights if m.dim == 0), (weights or makers)[0])
