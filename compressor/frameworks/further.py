"""What can still be done to a variant whose structure was changed already."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.result import Choice, Plan


def further(choices: Sequence[Choice], made: Plan) -> list[Choice]:
    """Those of `choices` that go on from a variant of the plan `made`.

    Where a group was pruned, only what keeps fewer of the same channels; where another technique
    acted, nothing of that technique; nothing in a block that was removed.

    Args:
        choices: of structure, of the reference.
        made: what the variant has, numbers left out.
    """
    gone = {name for c in made if c.setting.get("removed") for name in (c.site, *c.modules)}
    before = {(choice.technique, choice.site): choice for choice in made}
    return [
        choice
        for choice in choices
        if choice.site not in gone
        and not gone >= set(choice.modules or (choice.site,))
        and _goes_further(choice, before.get((choice.technique, choice.site)))
    ]


def _goes_further(choice: Choice, before: Choice | None) -> bool:
    if before is None:
        return True
    kept = "kept"  # of channel pruning
    is_pruned = kept in choice.setting and kept in before.setting
    return is_pruned and set(choice.setting[kept]) < set(before.setting[kept])
