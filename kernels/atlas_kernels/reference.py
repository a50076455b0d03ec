"""The specification in plain torch: the 8-bit float and the linear layer whose weights are stored in it.

Every faster implementation must agree with these functions. Symbols: N output features, K input features, B block size,
G = ceil(K / B) blocks a row (the last one may be shorter), S outlier slots a row, M rows of activations.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A weight matrix [N, K] as codes, block scales and outliers. The codes are zero where an outlier is."""

    codes: Tensor  # uint8 [N, K]: sign, exponent, mantissa
    scales: Tensor  # bfloat16 [N, G]
    outlier_index: Tensor  # int16 or int32 [N, S]: column; 0 in an unused slot
    outlier_value: Tensor  # float16 [N, S]; 0 in an unused slot
    mantissa_bits: int  # 3 (E4M3), 4 (E3M4) or 5 (E2M5)
    block_size: int


def exponent_bias(mantissa_bits: int) -> int:
    """Bias of the format with 1 sign, 7 - M exponent and M mantissa bits: 2^(E-1) - 1."""
    return int(2 ** (6 - mantissa_bits)) - 1


def decode(codes: Tensor, mantissa_bits: int) -> Tensor:
    """The float32 values of uint8 `codes`, exactly; any shape.

    The 7 low bits, moved so that the mantissa ends at bit 9, read as an IEEE half: its exponent field then holds the
    code's exponent e, and 2^(15 - bias) corrects the bias. Subnormals come out right: the half's are at e = 0 too.
    Source: the bit layout of IEEE 754 binary16.
    """
    wide = codes.to(torch.int32)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << (10 - mantissa_bits))
    signed = torch.where(bits >= 1 << 15, bits - (1 << 16), bits).to(torch.int16)
    return signed.view(torch.float16).to(torch.float32) * 2.0 ** (15 - exponent_bias(mantissa_bits))


def dequantize(weight: PackedWeight) -> Tensor:
    """The float32 matrix [N, K]: decode(code) · scale of its block, plus the outliers at their columns."""
    values = decode(weight.codes, weight.mantissa_bits)
    scales = weight.scales.to(torch.float32).repeat_interleave(weight.block_size, dim=1)[:, : values.shape[1]]
    return (values * scales).scatter_add(1, weight.outlier_index.long(), weight.outlier_value.to(torch.float32))


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x [..., K] times the transposed matrix plus bias [N], computed in float32, as x's dtype: [..., N]."""
    product = x.to(torch.float32) @ dequantize(weight).T
    return (product if bias is None else product + bias.to(torch.float32)).to(x.dtype)
