"""Keeps this process small while a checkpoint is read: gives back memory that the loader has done with.

Two things pile up. The loader maps whole files, and every page read stays in the resident set until the kernel is short
of memory. And the allocator keeps what the temporaries leave: holes between the quantized weights, measured at up to
twice the size of the weights themselves.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

MAPS = "/proc/self/maps"


class PageReleaser:
    """Gives memory back after every `interval` bytes of `files` that were read. Without Linux or glibc it does nothing.

    Safe only while the mappings of `files` are clean: nothing may have been written through them, since dropped pages
    are read again on the next access. The loader only reads them.
    """

    def __init__(self, files: Sequence[str], interval: int = 32 << 20) -> None:
        self._files = {os.path.realpath(file) for file in files}
        self._interval = interval
        self._read = 0
        self._libc = ctypes.CDLL(None) if os.path.exists(MAPS) else None

    def consumed(self, count: int) -> None:
        """Says that `count` more bytes were read and are not needed now."""
        self._read += count
        if self._read >= self._interval:
            self.release()

    def release(self) -> None:
        """Gives back what can be given back now."""
        self._read = 0
        if self._libc is None:
            return
        self._drop_pages(self._libc)
        if hasattr(self._libc, "malloc_trim"):  # glibc's own: musl has none and keeps less
            self._libc.malloc_trim(ctypes.c_size_t(0))

    def _drop_pages(self, libc: ctypes.CDLL) -> None:
        with open(MAPS, encoding="utf-8", errors="surrogateescape") as maps:
            for line in maps:
                fields = line.rstrip("\n").split(maxsplit=5)  # range, permissions, offset, device, inode, path
                if len(fields) == 6 and fields[5] in self._files:
                    start, end = (int(part, 16) for part in fields[0].split("-"))  # [start, end)
                    length = ctypes.c_size_t(end - start)
                    libc.madvise(ctypes.c_void_p(start), length, ctypes.c_int(mmap.MADV_DONTNEED))
