"""Raw O_DIRECT I/O: the limit that reads and writes of pages are set against."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from atlas_tiers.memory import aligned_buffer

BLOCK = 4 << 20
MOST_DEPTH = 8


class Raw:
    """A file of whole blocks, read and written with O_DIRECT. Seconds are scaled to `size` bytes."""

    def __init__(self, path: Path, size: int) -> None:
        self._path, self._blocks = path, -(-size // BLOCK)
        self._scale = size / (self._blocks * BLOCK)
        self._small = [memoryview(mmap.mmap(-1, BLOCK)) for _ in range(MOST_DEPTH)]
        self._huge = [aligned_buffer(BLOCK) for _ in range(MOST_DEPTH)]
        for buffer in self._small + self._huge:
            buffer[:] = os.urandom(BLOCK)

    def __enter__(self) -> Raw:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        self._path.unlink()

    def allocate(self) -> None:
        """Makes the file anew, unwritten."""
        os.ftruncate(self._fd, 0)
        os.posix_fallocate(self._fd, 0, self._blocks * BLOCK)
        os.fsync(self._fd)

    def write(self, depth: int, *, huge: bool = False) -> float:
        """Seconds, with `depth` writes at a time, from buffers in `huge` pages of memory if wanted."""
        return self._timed(depth, huge, lambda buffer, offset: os.pwritev(self._fd, [buffer], offset))

    def read(self, depth: int, *, huge: bool = False) -> float:
        """Seconds, with `depth` reads at a time."""
        return self._timed(depth, huge, lambda buffer, offset: os.preadv(self._fd, [buffer], offset))

    def _timed(self, depth: int, huge: bool, operation: Callable[[memoryview, int], int]) -> float:
        offsets = iter(range(0, self._blocks * BLOCK, BLOCK))  # next() of a range's iterator is atomic

        def work(buffer: memoryview) -> None:
            for offset in offsets:
                operation(buffer, offset)

        buffers = (self._huge if huge else self._small)[:depth]
        threads = [threading.Thread(target=work, args=(buffer,)) for buffer in buffers]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.fdatasync(self._fd)
        return (time.perf_counter() - start) * self._scale
