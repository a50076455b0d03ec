"""Plain memory: page-aligned buffers and copies that leave the interpreter lock alone."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Iterator

HUGE_PAGE = 2 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14; older kernels refuse it, which costs nothing


def aligned_buffer(size: int) -> memoryview:
    """`size` zero bytes at the start of a memory page, as O_DIRECT wants it. Committed by the kernel when touched;
    large ones in huge pages, where there are any, so that 2 MiB of a transfer are one piece to pin and map, not 512."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if size < HUGE_PAGE // 2:
        return memoryview(mmap.mmap(-1, max(size, 1), flags=flags))[:size]
    whole = -(-size // HUGE_PAGE) * HUGE_PAGE
    region = mmap.mmap(-1, whole + HUGE_PAGE, flags=flags)
    with contextlib.suppress(OSError):  # a kernel without them
        region.madvise(mmap.MADV_HUGEPAGE)
    skip = -address(memoryview(region)) % HUGE_PAGE
    return memoryview(region)[skip : skip + size]


class Staging:
    """Aligned buffers of one size, lent out and used again. Thread-safe."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._spare: list[memoryview] = []

    @contextlib.contextmanager
    def lend(self) -> Iterator[memoryview]:
        """A buffer of `size` bytes; what is in it has no meaning."""
        try:
            buffer = self._spare.pop()
        except IndexError:
            buffer = aligned_buffer(self.size)
        try:
            yield buffer
        finally:
            self._spare.append(buffer)


def prefault(view: memoryview) -> None:
    """Has the kernel commit a buffer's memory now, on a thread of its own: first touches would cost a restore more than
    the copies do. `view` must begin a memory page."""
    library = ctypes.CDLL(None)
    arguments = (ctypes.c_void_p(address(view)), ctypes.c_size_t(view.nbytes), _MADV_POPULATE_WRITE)
    keep = (library.madvise, *arguments, view)  # the buffer lives at least as long as the call
    threading.Thread(target=lambda: keep[0](*keep[1:4]), name="kv-prefault", daemon=True).start()


def address(view: memoryview) -> int:
    """Where a writable, contiguous buffer begins. Valid while the buffer lives."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) if len(view) else 0


def copy(target: memoryview, source: memoryview) -> None:
    """target[:] = source for byte buffers of one length. Other threads run meanwhile; a slice assignment would stop
    them. Raises ValueError when the lengths differ."""
    if target.nbytes != source.nbytes:
        raise ValueError(f"{source.nbytes} bytes into a buffer of {target.nbytes}")
    if source.readonly or not target.nbytes:
        target[:] = source
    else:
        ctypes.memmove(address(target), address(source), target.nbytes)
