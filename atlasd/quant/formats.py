"""The 8-bit float formats, the recipe that says how a model is quantized, and the errors of this package.

    QuantizationError
    ├── BadRecipe            a setting that can't be used
    ├── NonFiniteWeight      NaN or infinity in a weight
    ├── NothingQuantized     no layer of the model can be replaced
    ├── IncompleteWeights    the checkpoint lacks weights, or has them in another shape
    └── OffloadRefused       a device map that would give wrong weights

No torch is imported here.
"""

from __future__ import annotations

import dataclasses
import math


class QuantizationError(Exception):
    """Base of every error this package raises. `next_step` says what would do."""

    def __init__(self, message: str, next_step: str) -> None:
        super().__init__(f"{message}; {next_step}")
        self.message = message
        self.next_step = next_step


class BadRecipe(QuantizationError):
    """A setting that can't be used."""


class NonFiniteWeight(QuantizationError):
    """A weight holds NaN or infinity: the checkpoint is damaged or its training diverged."""


class NothingQuantized(QuantizationError):
    """No layer of the model can be replaced."""


class IncompleteWeights(QuantizationError):
    """The checkpoint lacks weights, or has them in another shape."""


class OffloadRefused(QuantizationError):
    """A device map with which quantization on load would give wrong weights."""


@dataclasses.dataclass(frozen=True)
class FloatFormat:
    """One sign bit, `exponent_bits`, then `mantissa_bits`: eight together. Subnormals as in IEEE 754, no infinities."""

    name: str
    mantissa_bits: int
    max_code: int  # largest code of a finite value, sign aside

    @property
    def exponent_bits(self) -> int:
        return 7 - self.mantissa_bits

    @property
    def bias(self) -> int:
        return int(2 ** (self.exponent_bits - 1)) - 1

    @property
    def max_value(self) -> float:
        """Value of max_code."""
        exponent, mantissa = divmod(self.max_code, 1 << self.mantissa_bits)
        return math.ldexp(1 + mantissa / (1 << self.mantissa_bits), exponent - self.bias)


# E4M3 is the OCP format ("OFP8"): its largest code is NaN and is never produced. The other two use every code.
E4M3 = FloatFormat("e4m3", 3, 0x7E)
E3M4 = FloatFormat("e3m4", 4, 0x7F)
E2M5 = FloatFormat("e2m5", 5, 0x7F)
FORMATS = {fmt.name: fmt for fmt in (E2M5, E3M4, E4M3)}
AUTO = "auto"


def format_of(mantissa_bits: int) -> FloatFormat:
    """The format with that many mantissa bits. Raises BadRecipe."""
    for fmt in FORMATS.values():
        if fmt.mantissa_bits == mantissa_bits:
            return fmt
    raise BadRecipe(
        f"no 8-bit float has {mantissa_bits} mantissa bits", "the saved model is damaged: quantize it again"
    )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one weight matrix is quantized. Raises BadRecipe."""

    format: str = AUTO  # a key of FORMATS, or AUTO: the one with the least squared error
    block_size: int = 128  # weights along the input dimension that share a scale
    z_threshold: float = 3.0  # weights further from the mean than this many standard deviations stay FP16; 0: none

    def __post_init__(self) -> None:
        allowed = ", ".join((AUTO, *FORMATS))
        if self.format not in (AUTO, *FORMATS):
            raise BadRecipe(f"unknown format {self.format!r}", f"use one of {allowed}")
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise BadRecipe(f"block size {self.block_size!r} is not a positive number", "use 128")
        if not math.isfinite(self.z_threshold) or self.z_threshold < 0:
            raise BadRecipe(f"z threshold {self.z_threshold!r} is not a number of at least 0", "use 3.0, or 0 for none")

    @property
    def candidates(self) -> tuple[FloatFormat, ...]:
        """The formats to choose from."""
        return tuple(FORMATS.values()) if self.format == AUTO else (FORMATS[self.format],)

    def blocks(self, in_features: int) -> int:
        """Scales a row."""
        return -(-in_features // self.block_size)

    def outlier_slots(self, in_features: int) -> int:
        """FP16 slots a row: the outliers expected of Gaussian weights, erfc(z / √2) · in_features, rounded up.

        It depends on the shape alone, so that tensors have known shapes before the weights are read.
        """
        if self.z_threshold == 0:
            return 0
        expected = math.erfc(self.z_threshold / math.sqrt(2)) * in_features
        return max(1, min(in_features, math.ceil(expected)))
