"""The compiled CPU kernels against the speed at which the same bytes can be read, in turn in one process.

Linear layers of 8-bit floats at 1 to 16 rows, in the shapes of a 1.1B model and of the bundled one; paged attention
over a long context. A reading and a computation alternate, and the ratio is the median over the pairs.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from atlas_kernels import linear_cpu, linear_torch
from atlas_kernels.attention_cpu import Call, Pages, attend
from atlas_kernels.cpu.library import Unavailable, library
from atlas_kernels.dispatch import quantized_linear
from atlas_kernels.reference import PackedWeight
from report import row

from atlasd.quant.formats import Recipe
from atlasd.quant.quantize import quantize

ROUNDS = 15
LARGE = ((5632, 2048), (2048, 5632))
SMALL = ((384, 1024), (1024, 384))
ROWS = (1, 2, 4, 8, 16)
COLD_BYTES = 192 * 2**20  # of weights in turn, so that no cache holds them
THREADS = min(2, os.cpu_count() or 1)
BAR = 0.90  # of the read rate, at one row
CONTEXT, HEADS, KV_HEADS, HEAD_DIM = 16384, 32, 4, 64


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def pairs(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float, float]:
    """Medians of both times, and the median of first / second over pairs made one after the other."""
    first(), second()
    times = [(seconds(first), seconds(second)) for _ in range(ROUNDS)]
    a, b = (statistics.median(pair[i] for pair in times) for i in (0, 1))
    return a, b, statistics.median(one / two for one, two in times)


def reader(size: int) -> Callable[[], object]:
    """Reads `size` bytes of its own with all threads."""
    held, loaded = torch.zeros(size // 4), library()
    read = loaded.function("atlas_read", ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int)
    return lambda: read(held.data_ptr(), held.numel(), loaded.best, THREADS)


def weight_bytes(weight: PackedWeight) -> int:
    parts = (weight.codes, weight.scales, weight.outlier_index, weight.outlier_value)
    return sum(part.numel() * part.element_size() for part in parts)


def linears(outputs: int, inputs: int) -> None:
    """Cold weights of one shape, one after the other."""
    one = quantize(torch.randn(outputs, inputs) * 0.02, Recipe("e2m5")).weight
    count = -(-COLD_BYTES // weight_bytes(one))
    weights = [dataclasses.replace(one, codes=one.codes.clone()) for _ in range(count)]
    size = count * weight_bytes(one)
    for rows in ROWS:
        x = torch.randn(rows, inputs)
        limit, took, ratio = pairs(
            reader(size), lambda x=x: [linear_cpu.linear(x, w, None, threads=THREADS) for w in weights]
        )
        name = f"linear {outputs} x {inputs}, {rows} rows, {THREADS} threads"
        against = f"reading the same bytes: {size / limit / 1e9:.1f} GB/s"
        bar = BAR if rows == 1 else None
        row("kernels", name, size / took / 1e9, "GB/s", against=against, ratio=ratio, bar=bar, higher_is_better=True)


def small_linears(outputs: int, inputs: int) -> None:
    """A small layer in cache, one thread, against the plain torch path. The ratio is torch's time to this one's."""
    weight = quantize(torch.randn(outputs, inputs) * 0.02, Recipe("e2m5")).weight
    for rows in (*ROWS, 17, 64):
        x = torch.randn(rows, inputs)
        torch_s, took, ratio = pairs(
            lambda x=x: [linear_torch.linear(x, weight, None) for _ in range(20)],
            lambda x=x: [quantized_linear(x, weight, None) for _ in range(20)],
        )
        name, against = (
            f"linear {outputs} x {inputs}, {rows} rows, 1 thread",
            f"plain torch: {torch_s / 20 * 1e6:.0f} us",
        )
        row("kernels", name, took / 20 * 1e6, "us", against=against, ratio=ratio, higher_is_better=True)


def attention(dtype: torch.dtype) -> None:
    """One row against a long context, blocks in shuffled places."""
    blocks = CONTEXT // 64
    slab = torch.randn(blocks, 4, 2, KV_HEADS, 64, HEAD_DIM).to(dtype)
    pages, q = Pages.of_slab(slab, torch.randperm(blocks)), torch.randn(HEADS, 1, HEAD_DIM)
    size = 4 * blocks * pages.slice_bytes
    call = Call(HEAD_DIM**-0.5, threads=THREADS)
    limit, took, ratio = pairs(reader(size), lambda: [attend(q, pages.layer(n), [CONTEXT - 1], call) for n in range(4)])
    name = f"attention, 1 row of {HEADS}/{KV_HEADS} heads, {CONTEXT} tokens of {str(dtype).removeprefix('torch.')}"
    against = f"reading the same bytes: {size / limit / 1e9:.1f} GB/s"
    row("kernels", name, size / took / 1e9, "GB/s", against=against, ratio=ratio, higher_is_better=True)


def main() -> None:
    try:
        print(f"instruction set: {library().best.name.lower()}")
    except Unavailable as error:
        sys.exit(f"nothing to measure: {error}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        for shape in LARGE:
            linears(*shape)
        for shape in SMALL:
            small_linears(*shape)
        for dtype in (torch.float32, torch.bfloat16):
            attention(dtype)


if __name__ == "__main__":
    main()
