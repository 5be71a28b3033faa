"""What ends a fit without being anybody's bug."""

from __future__ import annotations

from compressor.errors import CompressorError


class DivergedError(CompressorError, ArithmeticError):
    """The training loss became infinite or not a number; the message says when."""


class OutOfMemoryError(CompressorError, MemoryError):
    """Not even one sample of a batch fits into memory."""
