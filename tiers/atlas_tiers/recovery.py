"""Opening a KV directory: the lock, the index, the segments, and what to do when one does not fit the other.

The index is authoritative. When it can't be trusted it is made again from the slot headers; every page is verified when
it is read anyway, so a wrong guess here costs a miss, never a wrong page.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
import time
from pathlib import Path

from .errors import FormatNewer, IndexDamaged, StoreLocked
from .index import Entry
from .indexfile import Changes, Contents, IndexFile
from .segment import (
    FORMAT_VERSION,
    SECTOR,
    Place,
    Segment,
    SlotDamaged,
    decode_header,
    read_header,
    read_shape,
    segment_bytes,
    segment_path,
    sync_directory,
)


@dataclasses.dataclass
class Recovered:
    """An open directory. `lost` pages were promised by the index and are not there; `notes` say what was odd."""

    index: IndexFile
    segments: dict[int, Segment]
    entries: list[Entry[Place]]
    written: tuple[int, int]  # (day, bytes), see Contents
    lost: int
    notes: list[str]


def lock_directory(directory: Path, wait_s: float) -> int:
    """Makes the directory (0700) and locks it; returns the descriptor to keep. A dying predecessor is waited for.
    Raises StoreLocked, OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise StoreLocked(directory) from None
            time.sleep(0.02)


def recover(directory: Path) -> Recovered:
    """Opens index and segments and makes them agree, durably. Raises OSError; FormatNewer, having changed nothing."""
    notes: list[str] = []
    _leave_old_formats(directory, notes)
    _make_private(directory)
    index, contents, bad = _open_index(directory, notes)
    if bad:
        notes.append(f"{bad} damaged index records dropped")
    segments = _open_segments(directory, contents)
    entries, lost = _fit(contents.entries, segments)
    gone = [number for number in contents.segments if number not in segments]
    if lost or gone:
        index.apply(Changes(delete=[entry.page.key for entry in lost], drop_segments=gone))
    if lost:
        notes.append(f"{len(lost)} pages lost with missing or shortened segment files")
    _remove_strays(directory, segments)
    for name in (directory / "index", directory, directory.parent):  # LMDB syncs its file, not the file's name
        sync_directory(name)
    return Recovered(index, segments, entries, contents.written, len(lost) + bad, notes)


def _make_private(directory: Path) -> None:
    """Directories 0700, files 0600, whoever made them: copied or unpacked ones have other modes. Raises OSError."""
    index = directory / "index"
    for path in [directory / "lock", index, *index.glob("*.mdb"), *_segment_files(directory).values()]:
        if path.exists() and not path.is_symlink():  # a link may lead to something that is not ours
            path.chmod(0o700 if path.is_dir() else 0o600)


def _leave_old_formats(directory: Path, notes: list[str]) -> None:
    """Pages of an older format are removed, with their index: they are computed again when they are needed. The
    segments' headers decide, as they have a checksum. Raises FormatNewer."""
    versions: dict[int, list[Path]] = {}
    for path in _segment_files(directory).values():
        with contextlib.suppress(OSError):
            header = read_header(path)
            if header is not None:
                versions.setdefault(header.version, []).append(path)
    if (newest := max(versions, default=0)) > FORMAT_VERSION:
        raise FormatNewer(newest, FORMAT_VERSION)
    for version, paths in sorted(versions.items()):
        if version == FORMAT_VERSION:
            continue
        count = f"{len(paths)} segment file{'s' if len(paths) > 1 else ''}"
        notes.append(
            f"pages of format {version} dropped ({count}): this version reads and writes format {FORMAT_VERSION}"
        )
        for path in paths:
            path.unlink()
        if FORMAT_VERSION not in versions:  # else it is this format's, or is found damaged and rebuilt
            shutil.rmtree(directory / "index", ignore_errors=True)


def _open_index(directory: Path, notes: list[str]) -> tuple[IndexFile, Contents, int]:
    path = directory / "index"
    known = path.exists()
    if not known and not _segment_files(directory):
        return IndexFile(path), Contents({}, []), 0
    try:
        if not known:
            raise IndexDamaged(f"{path}: missing")
        index = IndexFile(path)
        contents, bad = index.load()
        return index, contents, bad
    except IndexDamaged as error:
        contents = _rebuild(directory)
        notes.append(f"index rebuilt from {len(contents.entries)} slot headers ({error})")
        return IndexFile(path), contents, 0


def _rebuild(directory: Path) -> Contents:
    """Makes a new index from what the slots say of themselves; it takes the old one's place in one rename."""
    building = directory / "index.new"
    shutil.rmtree(building, ignore_errors=True)
    contents = _scan(directory)
    index = IndexFile(building)
    index.reserve(sum(slots for slots, _ in contents.segments.values()))
    index.apply(Changes(put=contents.entries, add_segments=contents.segments))
    index.close()
    shutil.rmtree(directory / "index", ignore_errors=True)
    building.rename(directory / "index")
    return contents


def _scan(directory: Path) -> Contents:
    contents = Contents({}, [])
    seen: set[bytes] = set()
    for number, path in sorted(_segment_files(directory).items()):
        shape = read_shape(path)
        if shape is None:
            continue
        contents.segments[number] = shape
        with path.open("rb", buffering=0) as file:
            for slot in range(shape[0]):
                entry = _scan_slot(os.pread(file.fileno(), SECTOR, SECTOR + slot * shape[1]), Place(number, slot))
                if entry is not None and entry.page.key not in seen:
                    seen.add(entry.page.key)
                    contents.entries.append(entry)
    return contents


def _scan_slot(data: bytes, place: Place) -> Entry[Place] | None:
    with contextlib.suppress(SlotDamaged):
        header = decode_header(memoryview(data))
        return Entry(header.page, place, identity=header.identity)
    return None


def _open_segments(directory: Path, contents: Contents) -> dict[int, Segment]:
    """The segments whose file is there and has the shape that the index names."""
    segments: dict[int, Segment] = {}
    for number, shape in contents.segments.items():
        path = segment_path(directory, number)
        with contextlib.suppress(OSError):
            if read_shape(path) == shape:
                segments[number] = Segment(path, number, *shape)
    return segments


def _fit(entries: list[Entry[Place]], segments: dict[int, Segment]) -> tuple[list[Entry[Place]], list[Entry[Place]]]:
    """(kept, lost): lost pages lie outside their file, or in a slot that another page has."""
    ends = {number: _usable_slots(segment) for number, segment in segments.items()}
    kept: list[Entry[Place]] = []
    lost: list[Entry[Place]] = []
    taken: set[Place] = set()
    for entry in entries:
        place = entry.place
        fits = place.slot < ends.get(place.segment, 0) and place not in taken
        taken.add(place)
        (kept if fits else lost).append(entry)
    return kept, lost


def _usable_slots(segment: Segment) -> int:
    """Slots that lie in the file as it is now. What was cut off is allocated again, if there is room."""
    length = segment.length()
    if length < segment_bytes(segment.slots, segment.slot_bytes):
        with contextlib.suppress(OSError):
            segment.refill()
    return max(0, min(segment.slots, (length - SECTOR) // segment.slot_bytes))


def _segment_files(directory: Path) -> dict[int, Path]:
    names = (path for path in directory.glob("seg-*.kv") if path.stem[4:].isdigit())
    return {int(path.stem[4:]): path for path in names}


def _remove_strays(directory: Path, segments: dict[int, Segment]) -> None:
    """Segment files without a record: made just before a crash, or no longer wanted."""
    for number, path in _segment_files(directory).items():
        if number not in segments:
            path.unlink(missing_ok=True)
