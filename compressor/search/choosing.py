"""Which variant becomes the result, and why, or why it is the reference.

It is the cheapest within delta, if that is cheaper than the reference still when the file to deploy
is measured. On a busy machine a latency of the search may not be: then the next one is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from compressor.result import Cost, VariantRecord
from compressor.search.goal import Goal, best_record

Deployed = TypeVar("Deployed")


def choose(
    goal: Goal,
    best: VariantRecord | None,
    reference: Cost,
    records: Sequence[VariantRecord],
    *,
    choices: int,
    deploy: Callable[[VariantRecord | None], Deployed],
    cost: Callable[[Deployed], Cost],
    say: Callable[[str], None],
) -> tuple[VariantRecord | None, str, Deployed]:
    """The variant to be given back, why it is the reference if it is, and what is deployed.

    Args:
        goal: what counts.
        best: the search's answer; None: nothing was within delta.
        reference: its cost.
        records: all variants.
        choices: how many were proposed.
        deploy: writes the files of a variant, or of the reference for None.
        cost: what was measured on these.
        say: explains a decision.
    """
    reason = explain(goal, best, reference, records, choices=choices)
    left = list(records)
    while True:
        best = None if reason else best
        say(conclude(goal, best, records, reason))
        deployed = deploy(best)
        measured = goal.value(cost(deployed)) / goal.value(reference)
        if best is None or measured < 1:
            return best, reason, deployed
        wanted = " and ".join(goal.resources)
        say(
            f"Variant {best.id} is not taken: its file, measured again, has {measured:.3g} times "
            f"the {wanted} of the reference. Was the machine busy?"
        )
        left = [record for record in left if record.id != best.id]
        best = best_record(goal, left)
        if explain(goal, best, reference, left, choices=choices):
            reason = (
                "when their files were measured again, no variant within delta had less "
                f"{wanted} than the reference"
            )


def explain(
    goal: Goal,
    best: VariantRecord | None,
    reference: Cost,
    records: Sequence[VariantRecord],
    *,
    choices: int,
) -> str:
    """Why the reference itself is the answer; "" where `best` is better.

    Args:
        goal: what counts.
        best: variant within delta, if there is one.
        reference: cost of the reference.
        records: all variants.
        choices: how many were proposed.
    """
    wanted = " and ".join(goal.resources)
    if best is not None and best.cost is not None and len(best.plan):
        if goal.value(best.cost) < goal.value(reference):
            return ""
        return f"no variant within delta has less {wanted} than the reference"
    done = [record for record in records if record.status == "done" and len(record.plan)]
    if not choices:
        return "no technique offers anything on this model and target"
    if not records and goal.limits:
        bounds = ", ".join(f"budget.{name}={bound:g}" for name, bound in goal.limits)
        return (
            f"no plan is predicted to meet {bounds}, or the budget ended before the first variant"
        )
    if not records:
        return (
            f"no plan is predicted to need less {wanted} than the reference, or the budget "
            "ended before the first variant"
        )
    if not done:
        return f"all {len(records)} variants failed; the last: {records[-1].reason}"
    nearest = min(done, key=goal.drop)
    return (
        f"none of {len(done)} variants kept {goal.key!r} within {goal.delta:g} of "
        f"{goal.reference:.4g}; the nearest, {nearest.id}, lost {goal.drop(nearest):.4g}. More "
        "epochs, more data or a larger delta may help"
    )


def conclude(
    goal: Goal, best: VariantRecord | None, records: Sequence[VariantRecord], reason: str
) -> str:
    """What the search came to."""
    if best is None or best.cost is None:
        return f"The reference itself is the answer: {reason}."
    within = sum(goal.holds(record) for record in records)
    return (
        f"Variant {best.id} is taken: of {within} variants within delta, {len(records)} in all, it "
        f"has the least {' and '.join(goal.resources)}."
    )
