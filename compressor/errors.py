"""The exceptions that users meet: one sentence of fact with its value, one of help."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CompressorError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(CompressorError, ValueError):
    """A configuration that cannot be meant: unknown key, contradiction, value out of range."""


class DataError(CompressorError, ValueError):
    """The user's data: a missing split, an empty loader, a batch of another form."""


class ModelError(CompressorError, ValueError):
    """The user's model: it cannot be copied, called or traced."""


class LossError(CompressorError, ValueError):
    """The user's loss: not a scalar, not finite, not differentiable."""


class MetricError(CompressorError, ValueError):
    """The user's evaluation: a missing key, a value that is not a finite number."""


class DeviceError(CompressorError, RuntimeError):
    """A device that was asked for and is not here."""


class SurgeryError(CompressorError, ValueError):
    """An edit of a model that would break it."""


class ExportError(CompressorError, RuntimeError):
    """A model that could not be written for a runtime, or a file that the runtime refuses."""


class CheckpointError(CompressorError, ValueError):
    """A saved file that is truncated, altered, or of another model."""


class StudyError(CompressorError, RuntimeError):
    """A run directory that cannot be written, or that belongs to another run."""


class MissingDependencyError(CompressorError, ImportError):
    """An optional library that is not installed; the message has the `pip install` line."""


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown `name`: the nearest known name and all of them.

    >>> suggest("epoch", ["epochs", "optimizer"])
    "Did you mean 'epochs'? Known: epochs, optimizer."
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    question = f"Did you mean {near[0]!r}? " if near else ""
    return f"{question}Known: {', '.join(names)}."


def first_line(error: BaseException) -> str:
    """Class and first line of an error's message, ended by a full stop.

    >>> first_line(ValueError("no such size"))
    'ValueError: no such size.'
    """
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."
