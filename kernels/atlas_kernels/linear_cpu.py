"""The quantized linear layer on the CPU by the compiled kernels.

Math: y[m, n] = Σ_k x[m, k] · decode(codes[n, k]) · scales[n, k // B]
              + Σ_s x[m, outlier_index[n, s]] · outlier_value[n, s] + bias[n]
in float32 (reference.linear is the specification). A row's result does not depend on the other rows.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor
from torch.nn import functional

from atlas_kernels.cpu.library import Level, library
from atlas_kernels.errors import KernelInputError
from atlas_kernels.linear_torch import PANEL_WEIGHTS
from atlas_kernels.reference import PackedWeight

MAX_ROWS = 16  # from 20 on, panels are as fast or faster (README: measurements)


class _Linear(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "block", "slots")),
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "index", "outliers", "bias", "out")),
        *((name, ctypes.c_int32) for name in ("mantissa", "wide_index", "level", "threads")),
    ]


class _Functions:
    """The library's functions for linear layers with their types."""

    def __init__(self) -> None:
        loaded, call = library(), ctypes.POINTER(_Linear)
        self.best = loaded.best
        self.linear = loaded.function("atlas_linear", ctypes.c_int, call)
        self.panel = loaded.function("atlas_panel", ctypes.c_int, call, ctypes.c_int64, ctypes.c_int64)


@functools.cache
def _functions() -> _Functions:
    return _Functions()


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
        bias = None if bias is None else bias.to(torch.float32).contiguous()
        places = (rows.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr())
        _done(_functions().linear(_arguments(weight, places, count, threads, level)))
    return out if plain else out.to(x.dtype)


def linear_by_panels(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, *, threads: int = 1, level: Level | None = None
) -> Tensor:
    """As `linear`, for many rows: runs of outputs are decoded to float32 and multiplied by torch while in cache.

    Bitwise what linear_torch gives, whose panels hold the same numbers and are as large.
    """
    outputs, inputs = weight.codes.shape
    rows = x.reshape(-1, inputs).to(torch.float32)
    bias = None if bias is None else bias.to(torch.float32)
    step = min(outputs, max(1, PANEL_WEIGHTS // inputs))
    panel = torch.empty(step, inputs, dtype=torch.float32)
    arguments = _arguments(weight, (0, 0, panel.data_ptr()), 0, threads, level)
    out = torch.empty(rows.shape[0], outputs, dtype=torch.float32)
    for start in range(0, outputs, step):
        stop = min(start + step, outputs)
        _done(_functions().panel(arguments, start, stop))
        part = None if bias is None else bias[start:stop]
        out[:, start:stop] = functional.linear(rows, panel[: stop - start], part)
    return out.to(x.dtype).view(*x.shape[:-1], outputs)


def _arguments(
    weight: PackedWeight, places: tuple[int, int, int], count: int, threads: int, level: Level | None
) -> _Linear:
    """`places`: where the activations, the bias and the output lie."""
    outputs, inputs = weight.codes.shape
    x, bias, out = places
    parts = (weight.codes, weight.scales, weight.outlier_index, weight.outlier_value)
    if not all(part.is_contiguous() for part in parts):
        raise KernelInputError("a part of the weight is not contiguous")
    return _Linear(
        x, count, inputs, outputs, weight.block_size, weight.outlier_index.shape[1],
        *[part.data_ptr() for part in parts], bias, out,
        weight.mantissa_bits, weight.outlier_index.dtype == torch.int32,
        _functions().best if level is None else level, threads,
    )  # fmt: skip


def _done(status: int) -> None:
    if status == -1:
        raise KernelInputError("this processor does not have that instruction set")
    if status:
        raise MemoryError("scratch memory for a linear layer")
