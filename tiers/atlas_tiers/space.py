"""The segments of a directory as room: which slots are free, when a new file may be made, what counts as used."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
from collections.abc import Iterable
from pathlib import Path

from .indexfile import IndexFile, budget
from .segment import Place, Segment, create_segment, segment_bytes, sync_directory

MIN_SLOTS = 8


@dataclasses.dataclass(frozen=True)
class DiskConfig:
    """Where KV pages lie and how much they may take. `cap_bytes` counts every byte in `path`."""

    path: Path
    cap_bytes: int
    free_floor_bytes: int = 1 << 30  # no new segment when the file system would have less than this left
    segment_bytes: int = 128 << 20  # about; at least MIN_SLOTS slots, and small against the cap
    lock_wait_s: float = 5.0  # how long a predecessor may take to die


class Obstacle(enum.Enum):
    """Why there is no new segment."""

    CAP = "cap"
    FREE_SPACE = "free space"


class Space:
    """Segments by number and their free slots. The disk tier calls it under its locks."""

    def __init__(self, config: DiskConfig, index: IndexFile, segments: dict[int, Segment], slot_bytes: int) -> None:
        self._config, self._index, self._slot_bytes = config, index, slot_bytes
        self.segments = segments
        self.free: dict[int, set[int]] = {n: set(range(segment.slots)) for n, segment in segments.items()}
        self._blank: dict[int, set[int]] = {n: set() for n in segments}  # slots not written to since they were zeros
        self.unrecorded: dict[int, tuple[int, int]] = {}  # (slots, slot bytes) of segments that wait for a commit

    @property
    def slots(self) -> int:
        """Of all segments, those of other layouts included."""
        return sum(segment.slots for segment in self.segments.values())

    @property
    def free_slots(self) -> int:
        """Of all segments."""
        return sum(len(free) for free in self.free.values())

    def segment(self, place: Place) -> Segment:
        """The file that a slot is in."""
        return self.segments[place.segment]

    def fits(self, place: Place) -> bool:
        """Whether a slot has this layout's size."""
        return self.segment(place).slot_bytes == self._slot_bytes

    def occupy(self, place: Place) -> None:
        """Marks a slot as used."""
        self.free[place.segment].remove(place.slot)

    def give_back(self, place: Place) -> None:
        """Marks a slot as free. Only when no committed index record points to it."""
        if place.segment in self.free:
            self.free[place.segment].add(place.slot)

    def take(self, count: int) -> list[Place]:
        """Up to `count` free slots of this layout's size, now used, in the order in which they lie."""
        taken: list[Place] = []
        for number, free in self.free.items():
            if len(taken) < count and self.segments[number].slot_bytes == self._slot_bytes:
                slots = sorted(free)[: count - len(taken)]
                free.difference_update(slots)
                self._blank[number].difference_update(slots)
                taken += [Place(number, slot) for slot in slots]
        return taken

    def blank(self, number: int, slots: Iterable[int]) -> None:
        """Notes that these slots of a segment are zeros on the device, until they are taken."""
        self._blank[number].update(slots)

    def unknown(self, number: int) -> list[int]:
        """Free slots of a segment that may hold what a removed page left."""
        return sorted(self.free[number] - self._blank[number])

    def misfit(self) -> Segment | None:
        """The oldest segment whose slots have another size: only whole can its room be used."""
        return next((s for _, s in sorted(self.segments.items()) if s.slot_bytes != self._slot_bytes), None)

    @property
    def new_slots(self) -> int:
        """Slots that the next segment would have."""
        size = min(self._config.segment_bytes, self._config.cap_bytes // 8)
        return max(MIN_SLOTS, size // self._slot_bytes)

    def used_bytes(self) -> int:
        """Every byte in the directory."""
        index = self._index.file_bytes()
        return index + sum(segment.file_bytes for segment in self.segments.values())

    def obstacle(self) -> Obstacle | None:
        """What forbids one more segment with its index records, if anything."""
        new = segment_bytes(self.new_slots, self._slot_bytes)
        planned = max(budget(self.slots + self.new_slots), self._index.file_bytes()) + budget(0)  # and LMDB's lock file
        files = sum(segment.file_bytes for segment in self.segments.values())
        if planned + files + new > self._config.cap_bytes:
            return Obstacle.CAP
        status = os.statvfs(self._config.path)
        enough = status.f_bavail * status.f_frsize >= new + self._config.free_floor_bytes
        return None if enough else Obstacle.FREE_SPACE

    def make_segment(self) -> Segment:
        """Makes one more segment file, durably; add() takes it in. Raises OSError, leaving nothing behind."""
        number = max(self.segments, default=0) + 1
        self._index.reserve(self.slots + self.new_slots)
        return create_segment(self._config.path, number, self.new_slots, self._slot_bytes)

    def add(self, segment: Segment) -> None:
        """Takes in a new segment: all its slots are free, its record goes with the first pages' commit."""
        self.unrecorded[segment.number] = (segment.slots, segment.slot_bytes)
        self.segments[segment.number] = segment
        self.free[segment.number] = set(range(segment.slots))
        self._blank[segment.number] = set(range(segment.slots))

    def remove(self, segment: Segment) -> None:
        """Deletes a segment's file. Only after its record and its pages' records were deleted durably."""
        del self.segments[segment.number]
        del self.free[segment.number]
        del self._blank[segment.number]
        self.unrecorded.pop(segment.number, None)
        segment.close()
        with contextlib.suppress(OSError):
            segment.path.unlink(missing_ok=True)
            sync_directory(self._config.path)

    def close(self) -> None:
        """Closes the files."""
        for segment in self.segments.values():
            segment.close()
