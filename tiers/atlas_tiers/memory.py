"""Plain memory: page-aligned buffers and copies that leave the interpreter lock alone."""

from __future__ import annotations

import ctypes
import mmap
import threading

_MADV_POPULATE_WRITE = 23  # Linux 5.14; older kernels refuse it, which costs nothing


def aligned_buffer(size: int) -> memoryview:
    """`size` zero bytes at the start of a memory page, as O_DIRECT wants it. Committed by the kernel when touched."""
    return memoryview(mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))[:size]


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
