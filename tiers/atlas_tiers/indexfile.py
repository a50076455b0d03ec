"""The durable index: a small LMDB environment that says which slot holds which page. The one file that imports lmdb.

Written by one thread at a time (the disk tier's writer lock); read only when it is opened. FORMAT.md has the records.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import struct
from pathlib import Path

import lmdb
import lmdb.verify

from .errors import IndexDamaged
from .index import Entry
from .keys import KEY_BYTES, PACKED_BYTES, PageId
from .segment import FORMAT_VERSION, Place, checksum

LMDB_MAJOR = 0  # the engine of LMDB 0.9: py-lmdb also carries 1.0, whose files it can't read
BYTES_PER_PAGE = 1024  # record, B-tree slack and the copies that a transaction makes
BASE_BYTES = 256 << 10
_RECORD = struct.Struct("<32s32sIIQ")
_SEGMENT = struct.Struct("<IQ")
_U64 = struct.Struct("<Q")
_WRITTEN = struct.Struct("<QQ")
_U32 = struct.Struct(">I")  # keys of segments: big-endian sorts by number


@dataclasses.dataclass
class Changes:
    """One transaction."""

    put: list[Entry[Place]] = dataclasses.field(default_factory=list)
    delete: list[bytes] = dataclasses.field(default_factory=list)
    stamps: dict[bytes, int] = dataclasses.field(default_factory=dict)
    add_segments: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)  # number: (slots, slot bytes)
    drop_segments: list[int] = dataclasses.field(default_factory=list)
    written: tuple[int, int] | None = None  # (day, bytes)


@dataclasses.dataclass
class Contents:
    """All that an index file says."""

    segments: dict[int, tuple[int, int]]
    entries: list[Entry[Place]]
    written: tuple[int, int] = (0, 0)  # (day since 1970 in UTC, bytes written to segments on it)


class IndexFile:
    """An open index. Every method may raise OSError (disk full, I/O error), and then changed nothing."""

    def __init__(self, directory: Path) -> None:
        """Opens the index, or makes an empty one. Raises IndexDamaged if it can't be trusted."""
        self.directory = directory
        self._data = directory / "data.mdb"
        self._closed = False  # after a failure, until it is opened anew
        fresh = not self._data.exists()
        if not fresh:
            _verify(directory)
        try:
            self._open()
            self._begin_format(fresh)
        except lmdb.Error as error:
            if getattr(error, "code", 0) < 0:  # LMDB's own codes; the system's are positive
                raise IndexDamaged(f"{directory}: {error}") from None
            raise _os_error(error) from None

    def _open(self) -> None:
        size = max(self._data.stat().st_size if self._data.exists() else 0, BASE_BYTES)
        self._env = lmdb.open(
            str(self.directory), map_size=2 * size, max_dbs=4, mode=0o700, readahead=False, lib_version=LMDB_MAJOR
        )
        names = (b"meta", b"pages", b"segments", b"stamps")
        self._meta, self._pages, self._segments, self._stamps = (self._env.open_db(name) for name in names)

    def _begin_format(self, fresh: bool) -> None:
        with self._env.begin(write=fresh) as txn:
            if fresh:
                txn.put(b"format", _U64.pack(FORMAT_VERSION), db=self._meta)
            elif txn.get(b"format", db=self._meta) != _U64.pack(FORMAT_VERSION):
                self._env.close()
                raise IndexDamaged(f"{self.directory}: not index format {FORMAT_VERSION}")
        if fresh:
            self.reserve(0)

    def load(self) -> tuple[Contents, int]:
        """Everything in the index, and how many records failed their checksum and were dropped. Raises IndexDamaged."""
        if self._closed:
            self._reopen()
        try:
            contents, bad = self._read()
        except lmdb.PanicError:
            self._closed = True
            return self.load()
        except (lmdb.Error, struct.error, IndexDamaged) as error:
            self.close()
            raise IndexDamaged(f"{self.directory}: {error}") from None
        if bad:
            self.apply(Changes(delete=bad))
        return contents, len(bad)

    def _read(self) -> tuple[Contents, list[bytes]]:
        entries: list[Entry[Place]] = []
        bad: list[bytes] = []
        with self._env.begin() as txn:
            stamps = {bytes(k): _U64.unpack(v)[0] for k, v in txn.cursor(self._stamps) if len(v) == _U64.size}
            for key, value in txn.cursor(self._pages):
                if len(key) != KEY_BYTES:  # no record of ours, and LMDB may refuse to delete it
                    raise IndexDamaged(f"a key of {len(key)} bytes")
                entry = _decode(bytes(key), bytes(value))
                if entry is None:
                    bad.append(bytes(key))
                    continue
                entry.stamp = max(entry.stamp, stamps.get(entry.page.key, 0))
                entries.append(entry)
            segments = dict(_decode_segment(key, value) for key, value in txn.cursor(self._segments))
            written = bytes(txn.get(b"written", b"", db=self._meta))
        entries.sort(key=lambda entry: entry.stamp)
        contents = Contents(segments, entries)
        if len(written) == _WRITTEN.size:
            contents.written = _WRITTEN.unpack(written)
        return contents, bad

    def apply(self, changes: Changes) -> None:
        """One durable transaction: all of it or nothing. The map is doubled when it is full."""
        while True:
            if self._closed:
                self._reopen()
            try:
                with self._env.begin(write=True) as txn:
                    self._write(txn, changes)
                return
            except lmdb.MapFullError:
                self._env.set_mapsize(2 * self._env.info()["map_size"])
            except lmdb.PanicError:
                self._closed = True
            except lmdb.Error as error:
                raise _os_error(error) from None

    def _reopen(self) -> None:
        """After a failed write of a meta page LMDB refuses every further transaction until it is opened anew."""
        self._env.close()
        try:
            self._open()
        except lmdb.Error as error:
            raise _os_error(error) from None
        self._closed = False

    def _write(self, txn: lmdb.Transaction, changes: Changes) -> None:
        for key in changes.delete:
            txn.delete(key, db=self._pages)
            txn.delete(key, db=self._stamps)
        for entry in changes.put:
            txn.put(entry.page.key, _encode(entry), db=self._pages)
        for key, stamp in changes.stamps.items():
            txn.put(key, _U64.pack(stamp), db=self._stamps)
        for number, shape in changes.add_segments.items():
            txn.put(_U32.pack(number), _SEGMENT.pack(*shape), db=self._segments)
        for number in changes.drop_segments:
            txn.delete(_U32.pack(number), db=self._segments)
        if changes.written is not None:
            txn.put(b"written", _WRITTEN.pack(*changes.written), db=self._meta)

    def reserve(self, pages: int) -> None:
        """Allocates the file for `pages` records beforehand, so that a full disk can't stop a transaction."""
        descriptor = os.open(self._data, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, 0, budget(pages))
        finally:
            os.close(descriptor)

    def file_bytes(self) -> int:
        """Bytes of the index on disk."""
        return sum(file.stat().st_size for file in self.directory.iterdir())

    def close(self) -> None:
        """Closes the environment."""
        self._env.close()


def budget(pages: int) -> int:
    """Bytes an index of that many pages is given."""
    return BASE_BYTES + pages * BYTES_PER_PAGE


def _verify(directory: Path) -> None:
    """Walks the file without LMDB, which may crash on a damaged one."""
    try:
        problems: list[str] = lmdb.verify.verify(str(directory))  # type: ignore[no-untyped-call]
    except (lmdb.verify.VerifyError, ValueError, IndexError, struct.error) as error:
        raise IndexDamaged(f"{directory}: {error}") from None
    if problems:
        raise IndexDamaged(f"{directory}: {problems[0]}")


def _encode(entry: Entry[Place]) -> bytes:
    page, place = entry.page, entry.place
    record = _RECORD.pack(entry.identity, page.parent, place.segment, place.slot, entry.stamp) + page.packed
    return record + _U64.pack(checksum(page.key + record))


def _decode(key: bytes, value: bytes) -> Entry[Place] | None:
    record, check = value[: -_U64.size], value[-_U64.size :]
    if not 0 < len(record) - _RECORD.size <= PACKED_BYTES or check != _U64.pack(checksum(key + record)):
        return None
    identity, parent, segment, slot, stamp = _RECORD.unpack_from(record)
    return Entry(PageId(key, parent, record[_RECORD.size :]), Place(segment, slot), identity=identity, stamp=stamp)


def _decode_segment(key: bytes, value: bytes) -> tuple[int, tuple[int, int]]:
    slots, slot_bytes = _SEGMENT.unpack(value)
    return _U32.unpack(key)[0], (slots, slot_bytes)


def _os_error(error: lmdb.Error) -> OSError:
    """LMDB reports a full disk and I/O errors by their errno in the exception's code."""
    code = getattr(error, "code", 0)
    return OSError(code if code > 0 else errno.EIO, f"index: {error}")
