"""Segment files and their slots: what lies where is in FORMAT.md, which is the authority.

A slot is a 4096-byte header that says all about the page, then the payload. The header has a digest of each of the
payload's parts (PageLayout.parts). Which slot is used is decided elsewhere.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from pathlib import Path

import xxhash

from .base import PageLayout
from .keys import PACKED_BYTES, TOKEN_BYTES, PageId

SECTOR = 4096
FORMAT_VERSION = 2
SLOT_MAGIC = b"ATLSKVP1"
SEGMENT_MAGIC = b"ATLSKVS1"
# magic, version, kind, tokens, payload bytes, parts, 4 zeros, identity, layout, key, parent; then ids and digests
_SLOT = struct.Struct("<8sIHHQI4x32s32s32s32s")
_SEGMENT = struct.Struct("<8sIIQ")
_CHECKSUM = struct.Struct("<Q")
_CHECKSUM_AT = SECTOR - _CHECKSUM.size
_DIGESTS_AT = _SLOT.size + PACKED_BYTES
DIGEST_BYTES = 8
MAX_PARTS = (_CHECKSUM_AT - _DIGESTS_AT) // DIGEST_BYTES


class SlotDamaged(Exception):
    """A slot's bytes are not the page that the index promises. The message says what differs."""


@dataclasses.dataclass(frozen=True, slots=True)
class SlotHeader:
    """The first 4096 bytes of a slot, decoded."""

    page: PageId
    identity: bytes
    layout: bytes
    payload_bytes: int
    digests: bytes  # one a part


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """A slot: number of the segment file and of the slot in it."""

    segment: int
    slot: int


def round_up(size: int) -> int:
    """To whole sectors."""
    return -(-size // SECTOR) * SECTOR


def slot_size(page_bytes: int) -> int:
    """Bytes of one slot: header and payload, each in whole sectors."""
    return SECTOR + round_up(page_bytes)


def digests(payload: memoryview, layout: PageLayout) -> bytes:
    """The digest of every part of a payload, one after the other."""
    return b"".join([_digest(payload[offset : offset + size]) for offset, size in layout.parts])


def check_parts(data: memoryview, layout: PageLayout, first: int, last: int, table: bytes) -> None:
    """Compares parts [first, last), which `data` begins with, with a page's digests. Raises SlotDamaged."""
    start = layout.span(first, last)[0]
    for number in range(first, last):
        offset, size = layout.parts[number]
        wanted = table[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
        if _digest(data[offset - start : offset - start + size]) != wanted:
            raise SlotDamaged(f"checksum of part {number} differs")


def _digest(part: memoryview) -> bytes:
    return xxhash.xxh3_64_intdigest(part).to_bytes(DIGEST_BYTES, "little")


def checksum(data: bytes | memoryview) -> int:
    """xxh3-64, which guards headers and index records."""
    return int(xxhash.xxh3_64_intdigest(data))


def encode_header(header: SlotHeader, into: memoryview) -> None:
    """Writes the 4096 bytes of a slot header to `into`."""
    page = header.page
    into[:SECTOR] = bytes(SECTOR)
    parts = len(header.digests) // DIGEST_BYTES
    fixed = (SLOT_MAGIC, FORMAT_VERSION, int(page.is_tail), page.count, header.payload_bytes, parts)
    _SLOT.pack_into(into, 0, *fixed, header.identity, header.layout, page.key, page.parent)
    into[_SLOT.size : _SLOT.size + len(page.packed)] = page.packed
    into[_DIGESTS_AT : _DIGESTS_AT + len(header.digests)] = header.digests
    _CHECKSUM.pack_into(into, _CHECKSUM_AT, checksum(into[:_CHECKSUM_AT]))


def decode_header(data: memoryview) -> SlotHeader:
    """Reads a slot header; checks magic, version, checksum, key against parent and tokens. Raises SlotDamaged."""
    if len(data) < SECTOR:
        raise SlotDamaged(f"only {len(data)} bytes of a slot header")
    fields = _SLOT.unpack_from(data)
    magic, version, kind, count, payload_bytes, parts, identity, layout, key, parent = fields
    if magic != SLOT_MAGIC or version != FORMAT_VERSION:
        raise SlotDamaged("no slot header of this format")
    if _CHECKSUM.unpack_from(data, _CHECKSUM_AT)[0] != checksum(data[:_CHECKSUM_AT]):
        raise SlotDamaged("header checksum differs")
    if not 0 < count * TOKEN_BYTES <= PACKED_BYTES:
        raise SlotDamaged(f"{count} tokens in a page")
    if not 0 < parts <= MAX_PARTS:
        raise SlotDamaged(f"{parts} parts in a page")
    page = PageId(key, parent, bytes(data[_SLOT.size : _SLOT.size + count * TOKEN_BYTES]))
    if not page.consistent or kind != page.is_tail:
        raise SlotDamaged("the key does not belong to the tokens")
    table = bytes(data[_DIGESTS_AT : _DIGESTS_AT + parts * DIGEST_BYTES])
    return SlotHeader(page, identity, layout, payload_bytes, table)


class Segment:
    """One preallocated file of equal slots. Thread-safe: every call names its offset."""

    def __init__(self, path: Path, number: int, slots: int, slot_bytes: int) -> None:
        """Opens an existing file, past the page cache where the file system can. Raises OSError."""
        self.path, self.number, self.slots, self.slot_bytes = path, number, slots, slot_bytes
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags | os.O_DIRECT)
            self.direct = True
        except OSError:
            self._fd = os.open(path, flags)
            self.direct = False

    @property
    def file_bytes(self) -> int:
        """What the file takes of the cap."""
        return segment_bytes(self.slots, self.slot_bytes)

    def read(self, slot: int, into: memoryview, start: int = 0) -> int:
        """Reads len(into) bytes from byte `start` of a slot on, of the next slots too (all in whole sectors, aligned);
        returns the bytes it got. Raises OSError."""
        return os.preadv(self._fd, [into], self._offset(slot) + start)

    def write(self, slot: int, data: memoryview, start: int = 0) -> None:
        """Writes from byte `start` of the slot on, over the next slots too. Durable after sync(). Raises OSError."""
        done = 0
        while done < len(data):
            done += os.pwritev(self._fd, [data[done:]], self._offset(slot) + start + done)

    def sync(self) -> None:
        """Returns when all that was written is on the device. Raises OSError."""
        os.fdatasync(self._fd)

    def refill(self) -> None:
        """Allocates the whole file again after something cut it. Raises OSError."""
        os.posix_fallocate(self._fd, 0, self.file_bytes)

    def length(self) -> int:
        """The file's size now."""
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)

    def _offset(self, slot: int) -> int:
        return SECTOR + slot * self.slot_bytes


def segment_bytes(slots: int, slot_bytes: int) -> int:
    """Size of a segment file: one sector of its own header, then the slots."""
    return SECTOR + slots * slot_bytes


def segment_path(directory: Path, number: int) -> Path:
    """Where segment `number` lies."""
    return directory / f"seg-{number:08d}.kv"


def create_segment(directory: Path, number: int, slots: int, slot_bytes: int) -> Segment:
    """Allocates a new segment file and makes it and its name durable. Raises OSError, leaving nothing behind."""
    path = segment_path(directory, number)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, segment_bytes(slots, slot_bytes))
        os.pwrite(descriptor, _segment_header(slots, slot_bytes), 0)
        os.fsync(descriptor)
        sync_directory(directory)
        return Segment(path, number, slots, slot_bytes)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


@dataclasses.dataclass(frozen=True, slots=True)
class SegmentHeader:
    """A segment file's own header. Other versions may mean something else by all but `version`."""

    version: int
    slots: int
    slot_bytes: int


def read_header(path: Path) -> SegmentHeader | None:
    """A segment file's own header, of whatever version; None if it can't be trusted. Raises OSError."""
    with path.open("rb") as file:
        head = file.read(SECTOR)
    if len(head) < SECTOR or _CHECKSUM.unpack_from(head, _CHECKSUM_AT)[0] != checksum(head[:_CHECKSUM_AT]):
        return None
    magic, *fields = _SEGMENT.unpack_from(head)
    return SegmentHeader(*fields) if magic == SEGMENT_MAGIC else None


def read_shape(path: Path) -> tuple[int, int] | None:
    """(slots, slot_bytes) of a segment file of this format; None if it is none. Raises OSError."""
    header = read_header(path)
    return (header.slots, header.slot_bytes) if header is not None and header.version == FORMAT_VERSION else None


def sync_directory(directory: Path) -> None:
    """Makes created and removed names durable. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _segment_header(slots: int, slot_bytes: int) -> bytes:
    head = bytearray(SECTOR)
    _SEGMENT.pack_into(head, 0, SEGMENT_MAGIC, FORMAT_VERSION, slots, slot_bytes)
    _CHECKSUM.pack_into(head, _CHECKSUM_AT, checksum(bytes(head[:_CHECKSUM_AT])))
    return bytes(head)
