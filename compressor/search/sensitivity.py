"""The damage map: what each choice costs alone, measured once and kept on disk.

Damages are kept under the digest of what they depend on (reference, data subset, way of
measuring), so that a run with another budget, target or technique list measures only what is new.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from compressor.files import write_text
from compressor.logs import get_logger
from compressor.progress import Progress
from compressor.result import Choice

logger = get_logger(__name__)

HOPELESS = 1e6  # stands for a choice whose outputs are not finite
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

    Choices for which there is no time are left out, with a warning.

    Args:
        choices: what to measure.
        damage_of: measures one choice applied alone; 0 is no damage, nan or inf is hopeless.
        path: the map on disk, JSON.
        key: digest of what damages depend on; maps under other keys stay as they are.
        has_time: asked before each measurement.
        progress: shows how far it is.
    """
    maps: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    known = maps.setdefault(key, {})
    missing = [choice for choice in choices if choice.key not in known]
    if missing and len(missing) < len(choices):
        logger.info("%d of %d damages are known already", len(choices) - len(missing), len(choices))
    with progress.task("sense", total=len(missing)) as advance:
        for count, choice in enumerate(missing, start=1):
            if not has_time():
                left = len(missing) - count + 1
                logger.warning("%d choices are left out: the minutes are needed for others", left)
                break
            damage = damage_of(choice)
            known[choice.key] = damage if math.isfinite(damage) else HOPELESS
            logger.debug("%s at %s, %s: %.5f", choice.technique, choice.site, choice.label, damage)
            if count % SAVE_EVERY == 0:
                write_text(path, json.dumps(maps))
            advance()
    if missing:
        write_text(path, json.dumps(maps))
    return {choice.key: known[choice.key] for choice in choices if choice.key in known}
