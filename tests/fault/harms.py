"""What a fault can do to the files of a KV directory, as data: made from a closed directory, applied whenever.

The places of fields are tiers/FORMAT.md's; this is the one file of the fault tests that knows them.
"""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import lmdb
import xxhash

SECTOR = 4096
Fields = dict[str, tuple[int, int]]  # name: [first byte, end)

SEGMENT_FIELDS: Fields = {
    "magic": (0, 8), "version": (8, 12), "slots": (12, 16), "slot size": (16, 24), "zeros": (24, 4088),
    "checksum": (4088, 4096),
}  # fmt: skip
SLOT_FIELDS: Fields = {
    "magic": (0, 8), "version": (8, 12), "kind": (12, 14), "count": (14, 16), "length": (16, 24), "parts": (24, 28),
    "reserved": (28, 32), "identity": (32, 64), "layout": (64, 96), "key": (96, 128), "parent": (128, 160),
    "tokens": (160, 416), "digests": (416, 4088), "zeros": (416, 4088), "checksum": (4088, 4096),
}  # fmt: skip
DIGEST_BYTES = 8  # of each part of the payload
RECORD = struct.Struct("<32s32sIIQ")  # identity, parent, segment, slot, stamp; then token ids and a checksum
WAYS = ("bit", "byte", "sector")
INDEX = "index/data.mdb"


@dataclasses.dataclass(frozen=True)
class Write:
    """Other bytes in a file."""

    file: str
    offset: int
    data: bytes

    def apply(self, directory: Path) -> None:
        descriptor = os.open(directory / self.file, os.O_RDWR)
        try:
            os.pwrite(descriptor, self.data, self.offset)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@dataclasses.dataclass(frozen=True)
class Cut:
    """A file that ends early."""

    file: str
    length: int

    def apply(self, directory: Path) -> None:
        os.truncate(directory / self.file, self.length)


@dataclasses.dataclass(frozen=True)
class Remove:
    """A file or directory that is gone."""

    file: str

    def apply(self, directory: Path) -> None:
        path = directory / self.file
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@dataclasses.dataclass(frozen=True)
class Swap:
    """Two files under each other's names."""

    first: str
    second: str

    def apply(self, directory: Path) -> None:
        aside = directory / "aside"
        (directory / self.first).rename(aside)
        (directory / self.second).rename(directory / self.first)
        aside.rename(directory / self.second)


@dataclasses.dataclass(frozen=True)
class Repoint:
    """An index record that names another slot or carries another record's text, with a right checksum."""

    key: bytes
    value: bytes

    def apply(self, directory: Path) -> None:
        with lmdb.open(str(directory / "index"), max_dbs=4, lib_version=0) as env:
            pages = env.open_db(b"pages")
            with env.begin(write=True) as txn:
                txn.put(self.key, self.value, db=pages)


Change = Write | Cut | Remove | Swap | Repoint


@dataclasses.dataclass(frozen=True)
class Record:
    """One page as the index has it."""

    key: bytes
    identity: bytes
    parent: bytes
    segment: int
    slot: int
    stamp: int
    tokens: bytes

    @property
    def file(self) -> str:
        return f"seg-{self.segment:08d}.kv"

    def slot_in(self, directory: Path) -> bool:
        """Whether its slot is there in another state of the directory."""
        path = directory / self.file
        return path.exists() and slot_offset(directory, self) + slot_bytes(directory, self) <= path.stat().st_size

    @property
    def value(self) -> bytes:
        body = RECORD.pack(self.identity, self.parent, self.segment, self.slot, self.stamp) + self.tokens
        return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(self.key + body))


def records(directory: Path) -> list[Record]:
    """All pages, least recently used first. The directory must be closed."""
    found = []
    with lmdb.open(str(directory / "index"), max_dbs=4, lib_version=0, readonly=True, lock=False) as env:
        pages, stamps = env.open_db(b"pages"), env.open_db(b"stamps")
        with env.begin() as txn:
            for key, value in txn.cursor(pages):
                identity, parent, segment, slot, stamp = RECORD.unpack_from(value)
                later = txn.get(key, db=stamps)
                stamp = max(stamp, int.from_bytes(later, "little")) if later else stamp
                tokens = bytes(value[RECORD.size : -8])
                found.append(Record(bytes(key), identity, parent, segment, slot, stamp, tokens))
    return sorted(found, key=lambda record: record.stamp)


def slot_bytes(directory: Path, record: Record) -> int:
    """Size of the slots of the record's segment."""
    with (directory / record.file).open("rb") as file:
        head = file.read(SECTOR)
    return int.from_bytes(head[slice(*SEGMENT_FIELDS["slot size"])], "little")


def slot_offset(directory: Path, record: Record) -> int:
    return SECTOR + record.slot * slot_bytes(directory, record)


def slot(directory: Path, record: Record) -> bytes:
    """The whole slot as it is."""
    size = slot_bytes(directory, record)
    return read(directory / record.file, SECTOR + record.slot * size, size)


def read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def spoil(directory: Path, file: str, offset: int, way: str, draw: random.Random) -> Write:
    """One bit, one byte, or the 512 bytes around an offset, changed for sure."""
    if way == "sector":
        start = offset // 512 * 512
        old = read(directory / file, start, 512)
        return Write(file, start, bytes(512) if any(old) else draw.randbytes(512))
    old = read(directory / file, offset, 1)
    mask = 1 << draw.randrange(8) if way == "bit" else draw.randrange(1, 256)
    return Write(file, offset, bytes([old[0] ^ mask]))


# --- places ---------------------------------------------------------------------------------------------------


def slot_places(directory: Path, record: Record) -> Fields:
    """Where the byte classes of a page lie in its segment file."""
    start = slot_offset(directory, record)
    head = read(directory / record.file, start, SECTOR)
    parts, size = (int.from_bytes(head[slice(*SLOT_FIELDS[name])], "little") for name in ("parts", "length"))
    first_token, first_digest = SLOT_FIELDS["tokens"][0], SLOT_FIELDS["digests"][0]
    ends = first_digest + parts * DIGEST_BYTES
    fields = {
        **SLOT_FIELDS, "tokens": (first_token, first_token + len(record.tokens)), "digests": (first_digest, ends),
        "zeros": (ends, SLOT_FIELDS["checksum"][0]),
    }  # fmt: skip
    fields |= {
        "first payload byte": (SECTOR, SECTOR + 1), "payload": (SECTOR, SECTOR + size),
        "last payload byte": (SECTOR + size - 1, SECTOR + size),
        "after the payload": (SECTOR + size, slot_bytes(directory, record)),
    }  # fmt: skip
    return {name: (start + first, start + end) for name, (first, end) in fields.items() if first < end}


INDEX_CLASSES = ("meta pages", "page heads", "node offsets", "page records", "anywhere")
_HEAD = struct.Struct("<QHHHH")  # page number, pad, flags, lower, upper: the head of an LMDB page


def index_place(directory: Path, kind: str, draw: random.Random) -> int:
    """An offset of that class in the index file."""
    data = (directory / INDEX).read_bytes()
    used = len(data.rstrip(b"\0"))
    live = list(_tree_pages(data))
    match kind:
        case "meta pages":
            return draw.randrange(2) * SECTOR + draw.randrange(160)
        case "page heads":
            return draw.choice(live) + draw.randrange(_HEAD.size)
        case "node offsets":
            at = draw.choice(live)
            return at + draw.randrange(_HEAD.size, max(_HEAD.size + 1, _HEAD.unpack_from(data, at)[3]))
        case "page records":
            record = draw.choice(records(directory))
            at = draw.choice([at for at in _all(data, record.key) if at not in range(2 * SECTOR)])
            return at + draw.randrange(len(record.key) + len(record.value))
    return draw.randrange(used)


def _tree_pages(data: bytes) -> Iterator[int]:
    for at in range(2 * SECTOR, len(data), SECTOR):
        number, _, flags, lower, upper = _HEAD.unpack_from(data, at)
        if number == at // SECTOR and flags & 3 and _HEAD.size <= lower <= upper <= SECTOR:
            yield at


def _all(data: bytes, key: bytes) -> Iterator[int]:
    at = data.find(key)
    while at >= 0:
        yield at
        at = data.find(key, at + 1)


def segment_files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("seg-*.kv"))


def forged(directory: Path, record: Record, part_bytes: int) -> list[Change]:
    """Another first part (of that size) with all checksums made to fit: no fault does it, a test of the judges does."""
    data = bytearray(slot(directory, record))
    data[SECTOR] ^= 1
    at = SLOT_FIELDS["digests"][0]
    part = data[SECTOR : SECTOR + part_bytes]
    data[at : at + DIGEST_BYTES] = xxhash.xxh3_64_intdigest(part).to_bytes(DIGEST_BYTES, "little")
    body, end = SLOT_FIELDS["checksum"]
    data[body:end] = xxhash.xxh3_64_intdigest(data[:body]).to_bytes(end - body, "little")
    return [Write(record.file, slot_offset(directory, record), bytes(data))]


# --- what a fault can plant -------------------------------------------------------------------------------------


def copied(directory: Path, source: Record, target: Record) -> list[Change]:
    """The slot of one page over another's, whole."""
    return [Write(target.file, slot_offset(directory, target), slot(directory, source))]


def exchanged(directory: Path, first: Record, second: Record) -> list[Change]:
    """Two slots in each other's place."""
    return [*copied(directory, first, second), *copied(directory, second, first)]


def crossed(directory: Path, source: Record, target: Record) -> list[Change]:
    """A page's own header before another page's payload."""
    return [Write(target.file, slot_offset(directory, target) + SECTOR, slot(directory, source)[SECTOR:])]


def repointed(source: Record, target: Record) -> list[Change]:
    """The target's record names the source's slot, with a right checksum."""
    moved = dataclasses.replace(target, segment=source.segment, slot=source.slot)
    return [Repoint(target.key, moved.value)]


def renamed(source: Record, target: Record) -> list[Change]:
    """The target's key over the source's record, with a right checksum for that key."""
    moved = dataclasses.replace(source, key=target.key)
    return [Repoint(target.key, moved.value)]


def older(before: Path) -> list[Change]:
    """The index as an earlier copy of the directory had it."""
    return [Write(INDEX, 0, (before / INDEX).read_bytes())]


def apply(directory: Path, changes: Sequence[Change]) -> None:
    for change in changes:
        change.apply(directory)
