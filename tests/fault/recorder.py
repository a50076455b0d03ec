"""An nbdkit plugin: a disk in a file (IMAGE) whose writes and flushes are all noted, in order, in another (JOURNAL).

A note is kind (W write, F write with forced unit access, B barrier: a flush), offset and length, then the bytes.
nbdkit loads this file; the tests read the journal with cuts.py.
"""

from __future__ import annotations

import os
import struct

import nbdkit  # type: ignore[import-not-found]  # inside nbdkit only

API_VERSION = 2
NOTE = struct.Struct("<cQQ")
_files: dict[str, int] = {}


def thread_model() -> int:
    """One request at a time: the journal's order is the disk's."""
    return int(nbdkit.THREAD_MODEL_SERIALIZE_ALL_REQUESTS)


def get_ready() -> None:
    """Opens both files before nbdkit serves."""
    for name, flags in (("IMAGE", os.O_RDWR), ("JOURNAL", os.O_WRONLY | os.O_APPEND)):
        _files[name] = os.open(os.environ[name], flags)


def open(readonly: bool) -> int:
    """A connection; they share the files."""
    return 0


def get_size(handle: int) -> int:
    """Bytes of the disk."""
    return os.fstat(_files["IMAGE"]).st_size


def can_flush(handle: int) -> bool:
    """Flushes are what a power cut is measured by."""
    return True


def can_fua(handle: int) -> int:
    """Forced writes come to pwrite() with their flag."""
    return int(nbdkit.FUA_NATIVE)


def pread(handle: int, buffer: bytearray, offset: int, flags: int) -> None:
    """Reads from the image."""
    data = os.pread(_files["IMAGE"], len(buffer), offset)
    buffer[:] = data.ljust(len(buffer), b"\0")


def pwrite(handle: int, buffer: bytearray, offset: int, flags: int) -> None:
    """Writes to the image, then notes it."""
    os.pwrite(_files["IMAGE"], buffer, offset)
    kind = b"F" if flags & nbdkit.FLAG_FUA else b"W"
    os.write(_files["JOURNAL"], NOTE.pack(kind, offset, len(buffer)) + bytes(buffer))


def flush(handle: int, flags: int) -> None:
    """All that was noted before is on the disk for good."""
    os.write(_files["JOURNAL"], NOTE.pack(b"B", 0, 0))
