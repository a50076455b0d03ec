"""What the tests of the CPU kernels share: levels to force, memory between guard pages, poisoned outputs."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator

import pytest
import torch
from atlas_kernels.cpu.library import Level, Unavailable, library

PROT_NONE, PROT_READ_WRITE = 0, 3


def levels() -> list[Level]:
    """The instruction sets of this processor; none without a compiler."""
    try:
        return [level for level in Level if level <= library().best]
    except Unavailable:
        return []


LEVELS = levels()
compiled = pytest.mark.skipif(not LEVELS, reason="no compiled kernels: no C++ compiler here")
each_level = pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name.lower())


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within it, torch.empty gives NaN (and the largest integers): an output that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert bool(torch.empty(3).isnan().all())
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Guarded:
    """Copies of tensors whose first or last byte lies against a page that cannot be touched: reading on is a crash."""

    def __init__(self) -> None:
        self._maps: list[tuple[int, int]] = []
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def copy(self, tensor: torch.Tensor, *, at_end: bool) -> torch.Tensor:
        """A contiguous copy, at the end or at the beginning of its own pages."""
        size = tensor.numel() * tensor.element_size()
        inner = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        base = self._libc.mmap(None, inner + 2 * mmap.PAGESIZE, PROT_NONE, flags, -1, 0)
        assert base not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
        self._maps.append((base, inner + 2 * mmap.PAGESIZE))
        start = base + mmap.PAGESIZE
        assert self._libc.mprotect(start, inner, PROT_READ_WRITE) == 0
        memory = (ctypes.c_char * size).from_address(start + (inner - size if at_end else 0))
        placed = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)
        return placed.copy_(tensor)

    def close(self) -> None:
        for base, size in self._maps:
            self._libc.munmap(base, size)
