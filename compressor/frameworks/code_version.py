"""What computes damage: our own code, as far as it decides it, and torch's version.

Another version, another damage.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch

# Packages and modules; what only reads damages, writes files or tells of them is not among them.
DECIDING = (
    "structure",
    "techniques",
    "quantization",
    "frameworks",
    "interfaces",
    "training",
    "export",
    "targets",
    "seeding.py",
)


@cache
def damage_version() -> str:
    """Digest of the source files that decide damage, and of the version of torch."""
    return version_of(Path(__file__).resolve().parents[1], torch.__version__)


def version_of(package: Path, torch_version: str) -> str:
    """Digest of the deciding files in the folder `package`, by their names and contents."""
    found = hashlib.sha256(torch_version.encode())
    parts = [package / name for name in DECIDING]
    files = [path for part in parts for path in (part, *part.rglob("*.py")) if path.is_file()]
    for path in sorted(files):
        found.update(path.relative_to(package).as_posix().encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:16]
