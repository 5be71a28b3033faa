"""The damage map: what each choice costs alone, measured once and kept on disk.

Damages are kept under the digest of what they depend on (reference, data subset, way of
measuring), so that a run with another budget, target or technique list measures only what is new.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from compressor.evidence import HOPELESS
from compressor.files import write_text
from compressor.logs import get_logger
from compressor.progress import Progress
from compressor.result import Choice

logger = get_logger(__name__)

MOST_DAMAGE = 5.0  # outputs that have nothing to do with the reference's any more
MILD_FIRST = frozenset({"channel_pruning", "low_rank"})  # whose choices at a site come so
SAVE_EVERY = 20


def sense(
    choices: Sequence[Choice],
    damage_of: Callable[[Choice], float],
    *,
    path: Path,
    key: str,
    has_time: Callable[[], bool] = lambda: True,
    progress: Progress,
) -> dict[str, float]:
    """Damage of every choice, by choice key; what `path` already knows is not measured again.

    Widths and ranks of a site come mild to severe: once one is hopeless, those behind it are not
    measured, and count as much. Choices for which there is no time are left out, with a warning.

    Args:
        choices: what to measure.
        damage_of: measures one choice applied alone; 0 is no damage, nan or inf is hopeless.
        path: the map on disk, JSON.
        key: digest of what damages depend on; maps under other keys stay as they are.
        has_time: asked before each measurement.
        progress: shows how far it is.
    """
    maps = _read(path)
    known = maps.setdefault(key, {})
    missing = [choice for choice in choices if choice.key not in known]
    if missing and len(missing) < len(choices):
        logger.info("%d of %d damages are known already", len(choices) - len(missing), len(choices))
    worst: dict[tuple[str, str], float] = {}  # of a technique at a site, so far
    count = 0
    with progress.task("sense", total=len(missing)) as advance:
        for choice in choices:
            place = (choice.technique, choice.site)
            if choice.key not in known:
                if not has_time():
                    left = len(missing) - count
                    logger.warning("%d choices are left out: time is needed for others", left)
                    break
                milder = worst.get(place, 0.0)
                damage = milder if milder >= MOST_DAMAGE else damage_of(choice)
                known[choice.key] = damage if math.isfinite(damage) else HOPELESS
                logger.debug("%s at %s, %s: %.5f", *place, choice.label, damage)
                count += 1
                if count % SAVE_EVERY == 0:
                    write_text(path, json.dumps(maps))
                advance()
            if choice.technique in MILD_FIRST:
                worst[place] = max(worst.get(place, 0.0), known[choice.key])
    if missing:
        write_text(path, json.dumps(maps))
    return {choice.key: known[choice.key] for choice in choices if choice.key in known}


def _read(path: Path) -> dict[str, dict[str, float]]:
    """The maps on disk; none where the file is damaged."""
    if not path.exists():
        return {}
    try:
        maps: dict[str, dict[str, float]] = json.loads(path.read_text())
    except ValueError:
        logger.warning("%s cannot be read: damages are measured anew", path)
        return {}
    return maps
