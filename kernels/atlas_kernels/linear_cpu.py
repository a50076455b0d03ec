"""The quantized linear layer on the CPU by the compiled kernels, for few rows of activations.

Math: y[m, n] = Σ_k x[m, k] · decode(codes[n, k]) · scales[n, k // B]
              + Σ_s x[m, outlier_index[n, s]] · outlier_value[n, s] + bias[n]
in float32 (reference.linear is the specification). A row's result does not depend on the other rows.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from atlas_kernels.cpu.library import Level, library
from atlas_kernels.errors import KernelInputError
from atlas_kernels.reference import PackedWeight

MAX_ROWS = 24  # from 32 on, decoding a panel once and multiplying by torch is faster (README: measurements)


class _Linear(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "block", "slots")),
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "index", "outliers", "bias", "out")),
        *((name, ctypes.c_int32) for name in ("mantissa", "wide_index", "level", "threads")),
    ]


@functools.cache
def _function() -> tuple[Callable[..., int], Level]:
    loaded = library()
    return loaded.function("atlas_linear", ctypes.c_int, ctypes.POINTER(_Linear)), loaded.best


def linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, *, threads: int = 1, level: Level | None = None
) -> Tensor:
    """As reference.linear for x [..., K] on the CPU with any number of rows; `weight` as dispatch.check wants it.

    Raises KernelInputError for parts that are not contiguous, Unavailable where there is no compiled library.
    """
    outputs = weight.codes.shape[0]
    plain = x.dtype == torch.float32
    rows = x if plain and x.is_contiguous() else x.to(torch.float32).contiguous()
    out = torch.empty(*x.shape[:-1], outputs, dtype=torch.float32)
    count = out.numel() // outputs
    if count:
        _run(rows, count, weight, bias, out, threads, level)
    return out if plain else out.to(x.dtype)


def _run(
    rows: Tensor, count: int, weight: PackedWeight, bias: Tensor | None, out: Tensor, threads: int, level: Level | None
) -> None:
    outputs, inputs = weight.codes.shape
    parts = (weight.codes, weight.scales, weight.outlier_index, weight.outlier_value)
    if not all(part.is_contiguous() for part in parts):
        raise KernelInputError("a part of the weight is not contiguous")
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    function, best = _function()
    status = function(
        _Linear(
            rows.data_ptr(), count, inputs, outputs, weight.block_size, weight.outlier_index.shape[1],
            *[part.data_ptr() for part in parts], 0 if bias is None else bias.data_ptr(), out.data_ptr(),
            weight.mantissa_bits, weight.outlier_index.dtype == torch.int32, best if level is None else level, threads,
        )
    )  # fmt: skip
    if status == -1:
        raise KernelInputError("this processor does not have that instruction set")
    if status:
        raise MemoryError("scratch memory for a linear layer")
