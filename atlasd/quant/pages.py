"""Gives back the memory of checkpoint pages that were read through a mapping and are not needed any more.

The loader maps whole files; every page read stays in this process's resident set until the kernel is short of memory.
For a model larger than RAM that means reclaim in the middle of loading, so pages are handed back as they are used.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

MAPS = "/proc/self/maps"


class PageReleaser:
    """Drops mapped pages of `files` from the resident set after every `interval` bytes. Without /proc: does nothing.

    Safe only while the mappings are clean: nothing may have been written through them (the pages are read again on the
    next access). The loader only reads them.
    """

    def __init__(self, files: Sequence[str], interval: int = 32 << 20) -> None:
        self._files = {os.path.realpath(file) for file in files}
        self._interval = interval
        self._read = 0
        self._madvise = _madvise() if os.path.exists(MAPS) else None

    def consumed(self, count: int) -> None:
        """Says that `count` more bytes of the files were read and are not needed now."""
        self._read += count
        if self._read >= self._interval:
            self.release()

    def release(self) -> None:
        """Drops what is resident now."""
        self._read = 0
        if self._madvise is None:
            return
        with open(MAPS, encoding="utf-8", errors="surrogateescape") as maps:
            for line in maps:
                fields = line.rstrip("\n").split(maxsplit=5)  # range, permissions, offset, device, inode, path
                if len(fields) == 6 and fields[5] in self._files:
                    start, end = (int(part, 16) for part in fields[0].split("-"))  # [start, end)
                    self._madvise(start, end - start, mmap.MADV_DONTNEED)


def _madvise() -> ctypes._NamedFuncPointer:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    return function
