"""How a tensor is said in few bits: integers, with what one step and their zero mean; or floats."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from compressor.errors import suggest

FLOAT_BITS = 32
MIN_BITS = 2
HALF_BITS = 16

FloatType = Literal["float16", "bfloat16"]


@dataclass(frozen=True)
class Scheme:
    """The form of a quantized tensor; scale and zero point are numbers of the tensor itself.

    Attributes:
        bits: 2 to 16; 32 leaves the tensor as it is.
        signed: the integers have a sign.
        symmetric: the zero point is 0, in the middle of unsigned integers, and no integer lacks its
            opposite: -127 to 127.
        axis: dimension with a scale for each index; None is one scale for the tensor.
        block: with `axis=0`, so many neighbours along dimension 1 have a scale of their own.
        full: of symmetric signed integers the least is used as well, as QuantizeLinear does with
            what lies below the range: -128 to 127.
        reduced: one bit less is used than stored, for CPUs whose sums of products of 8 bits
            saturate.
        float_type: of 16 bits, in place of integers; the scale is 1 and the zero point 0.

    Raises:
        ValueError: for bits out of range, blocks without axis 0, or floats of another type, with
            other bits, or with scales for parts.
    """

    bits: int = 8
    signed: bool = False
    symmetric: bool = False
    axis: int | None = None
    block: int | None = None
    reduced: bool = False
    full: bool = False
    float_type: FloatType | None = None

    def __post_init__(self) -> None:
        if self.bits != FLOAT_BITS and not MIN_BITS <= self.bits <= 16:
            raise ValueError(
                f"bits={self.bits} is not 2 to 16, nor 32 for float. Write one of them."
            )
        if self.block is not None and (self.block < 1 or self.axis != 0):
            raise ValueError(
                f"block={self.block} with axis={self.axis}: blocks are 1 or more entries along "
                "dimension 1 of a tensor with axis=0."
            )
        if self.float_type is not None:
            self._check_float(self.float_type)

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized."""
        return self.bits == FLOAT_BITS

    @property
    def has_integers(self) -> bool:
        """Whether it has steps that a rounding could choose between."""
        return not self.is_float and self.float_type is None

    @property
    def qmin(self) -> int:
        """The least integer.

        >>> Scheme(8).qmin, Scheme(8, signed=True).qmin, Scheme(8, signed=True, symmetric=True).qmin
        (0, -128, -127)
        """
        if not self.signed:
            return 1 if self.symmetric else 0
        return -self.qmax if self.symmetric and not self.full else -self.qmax - 1

    @property
    def qmax(self) -> int:
        """The greatest integer.

        >>> Scheme(8).qmax, Scheme(8, signed=True).qmax, Scheme(8, reduced=True).qmax
        (255, 127, 127)
        """
        used = self.bits - self.reduced
        return int(2 ** (used - 1) - 1 if self.signed else 2**used - 1)

    @property
    def middle(self) -> int:
        """The zero point of a symmetric tensor."""
        return 0 if self.signed else (self.qmax + 1) // 2

    @property
    def storage(self) -> str:
        """The ONNX type that holds the numbers: "uint8", "int4", "float16", ….

        >>> Scheme(3, signed=True).storage
        'int4'
        """
        if self.float_type is not None:
            return self.float_type
        stored = next(bits for bits in (2, 4, 8, 16) if bits >= self.bits)
        # 2 bits came to ONNX with opset 25, which few runtimes read
        return f"{'' if self.signed else 'u'}int{max(stored, 4)}"

    def with_bits(self, bits: int) -> Scheme:
        """The same with another number of bits."""
        return replace(self, bits=bits)

    def to_json(self) -> dict[str, Any]:
        """What differs from the defaults."""
        default = Scheme()
        return {key: value for key, value in vars(self).items() if value != vars(default)[key]}

    def _check_float(self, float_type: str) -> None:
        known = get_args(FloatType)
        if float_type not in known:
            raise ValueError(f"float_type={float_type!r} is unknown. {suggest(float_type, known)}")
        if self.bits != HALF_BITS or self.axis is not None:
            raise ValueError(
                f"{float_type} with bits={self.bits} and axis={self.axis}: it has 16 bits and no "
                f"scales. Write Scheme(16, float_type={float_type!r})."
            )


ACTIVATION = Scheme(bits=8)
WEIGHT = Scheme(bits=8, signed=True, symmetric=True, axis=0)
FLOAT = Scheme(bits=FLOAT_BITS)
FLOAT16 = Scheme(bits=HALF_BITS, float_type="float16")
BFLOAT16 = Scheme(bits=HALF_BITS, float_type="bfloat16")


def torch_dtype(scheme: Scheme) -> torch.dtype:
    """The smallest type of torch that holds the integers, or floats, of `scheme`.

    >>> torch_dtype(WEIGHT), torch_dtype(BFLOAT16)
    (torch.int8, torch.bfloat16)
    """
    if scheme.float_type is not None:
        return {"float16": torch.float16, "bfloat16": torch.bfloat16}[scheme.float_type]
    if scheme.bits <= 8:
        return torch.int8 if scheme.signed else torch.uint8
    return torch.int16 if scheme.signed else torch.uint16
