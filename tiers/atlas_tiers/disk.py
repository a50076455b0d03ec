"""The disk tier: pages in slots of segment files, found through a durable index.

Order of every write: slot bytes, fdatasync, index commit. Order of every removal: index commit, then the slot is free.
So at any moment an index record points to a slot whose bytes were complete when the record was committed.

`_io` is held by the one thread that writes, through its disk accesses; `_state` (see Catalog) for moments. Order: _io,
then _state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import threading
import time
from collections.abc import Iterable, Sequence

from . import leftovers, recovery
from .base import PageHeader, PageLayout, TierStats
from .catalog import Catalog, Fill, Sink
from .counters import Counters, DailyBytes, Meter
from .departing import Departing
from .errors import TooManyParts
from .evict import Policy, depths
from .index import Entry
from .indexfile import BYTES_PER_PAGE, Changes
from .keys import PageId
from .memory import Staging, copy
from .reader import SlotReader
from .segment import MAX_PARTS, Place, Segment, slot_size
from .space import MIN_SLOTS, Obstacle, Space
from .space import DiskConfig as DiskConfig
from .writer import SlotWriter

FULL = (errno.ENOSPC, errno.EDQUOT)
CAP_REACHED = "no room under the disk cap"
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
READERS_LEAVE_S = 2.0
CHUNK_BYTES = 2 << 20  # slots side by side that are read or written at once


class DiskTier(Catalog[Place]):
    """PageTier on NVMe. Thread-safe. Pages of other identities count, are never found, and are evicted first."""

    name = "disk"

    def __init__(
        self,
        layout: PageLayout,
        identity: bytes,
        config: DiskConfig,
        counters: Counters,
        policy: Policy | None = None,
    ) -> None:
        """Locks and opens the directory and repairs what a crash left. Raises StoreLocked, FormatNewer, TooManyParts,
        OSError."""
        super().__init__(identity, layout, policy)
        if len(layout.parts) > MAX_PARTS:
            raise TooManyParts(len(layout.parts), MAX_PARTS)
        self._config, self._counters = config, counters
        self._slot_bytes = slot_size(layout.page_bytes)
        self._io = threading.RLock()
        self._staging = Staging(max(1, CHUNK_BYTES // self._slot_bytes) * self._slot_bytes)
        self._touched: dict[bytes, int] = {}  # use stamps that are not in the index file yet
        self._busy: set[Place] = set()  # slots being written
        self._pause_s, self._paused_until, self._grow_after = 0.0, 0.0, 0.0
        self._full_until = 0.0
        self._no_room = CAP_REACHED  # why there was no new segment last time
        self.last_error = ""
        self._storing = Meter(counters, "disk_write_us")
        self._lock_fd = recovery.lock_directory(config.path, config.lock_wait_s)
        try:
            self._adopt(recovery.recover(config.path))
        except BaseException:
            os.close(self._lock_fd)
            raise

    def _adopt(self, found: recovery.Recovered) -> None:
        self._file = found.index
        self._space = Space(self._config, found.index, found.segments, self._slot_bytes)
        self._departing = Departing(self._space)
        parts = (self.layout, self._identity, self._space, self._staging)
        self._reader = SlotReader(*parts, self._counters, self._quarantine)
        self._writer = SlotWriter(*parts)
        self._written = DailyBytes(*found.written)
        self._counters.gauge("disk_bytes_written_today", self._written.today)
        known = depths({entry.page.key: entry.page.parent for entry in found.entries})
        for entry in found.entries:
            entry.page = dataclasses.replace(entry.page, depth=known[entry.page.key])
            self._index.add(entry)
            self._space.occupy(entry.place)
        self._clock = max((entry.stamp for entry in found.entries), default=0)
        self._counters.add("disk_pages_damaged", found.lost)
        for note in found.notes:
            self._counters.warn(f"{self._config.path}: {note}")
        if self.capacity < MIN_SLOTS:
            self._counters.warn(f"{self._config.path}: the disk cap is too small for a single segment; nothing is kept")
        self._shrink()
        self._bytes_used = self._space.used_bytes()

    # --- reading -----------------------------------------------------------------------------------

    def load(self, entry: Entry[Place], sink: Sink) -> None:
        """See Catalog.load. Any read error counts as damage of this page."""
        self._reader.load(entry, sink)

    def load_all(self, wanted: Sequence[tuple[Entry[Place], Sink]]) -> list[Exception | None]:
        """load() for several pinned pages; those that lie side by side are read at once. What went wrong with each."""
        return self._reader.load_all(wanted)

    def load_parts(self, entry: Entry[Place], first: int, last: int, into: memoryview) -> None:
        """See Catalog.load_parts. The slot's header is read with the first parts after pin(), its digests are kept."""
        self._span(first, last, into)
        self._reader.load_parts(entry, first, last, into)

    def unpin(self, entry: Entry[Place]) -> None:
        """Undoes one pin(). The last one forgets the digests: they would be much memory for a full disk."""
        with self._state:
            super().unpin(entry)
            if not entry.pins:
                entry.digests = b""

    def _quarantine(self, entry: Entry[Place], error: Exception) -> None:
        if self._forget([entry]):
            self._counters.add("disk_pages_damaged")
            self._counters.warn(f"{self._config.path}: a page was dropped: {error}")

    def _used(self, entry: Entry[Place]) -> None:
        """Notes a use. It reaches the disk with a later commit; a crash loses the order of use alone."""
        super()._used(entry)
        self._clock += 1
        entry.stamp = self._touched[entry.page.key] = self._clock

    # --- writing -----------------------------------------------------------------------------------

    def put(self, header: PageHeader, payload: memoryview) -> bool:
        """Stores a page durably; see PageTier.put."""
        if len(payload) != self.page_bytes:
            return False
        return self.store([(PageId.from_header(header), lambda into: copy(into, payload))])[0]

    def store(self, pages: Sequence[tuple[PageId, Fill]]) -> list[bool]:
        """Stores pages with one fdatasync a segment and one commit; each `fill` writes one payload.
        One bool a page: it is on disk now. After a failure writes are refused for a while (see last_error)."""
        with self._io:
            wanted = {page.key: (page, fill) for page, fill in pages if page.consistent and not self.holds(page)}
            if wanted and time.monotonic() >= self._paused_until:
                try:
                    with self._storing:
                        complete = self._store(list(wanted.values()))
                    self._pause_s, self.last_error = 0.0, "" if complete else self._no_room
                    self._full_until = 0.0 if complete else time.monotonic() + FIRST_PAUSE_S
                except OSError as error:
                    self._pause(error)
            done = [self.holds(page) for page, _ in pages]
            self._counters.add("disk_writes_dropped", done.count(False))
            return done

    @property
    def refuses(self) -> bool:
        """Whether a write would be in vain now: one failed, or found no room, a moment ago."""
        return time.monotonic() < max(self._paused_until, self._full_until)

    def _pause(self, error: OSError) -> None:
        self._pause_s = min(2 * self._pause_s or FIRST_PAUSE_S, LONGEST_PAUSE_S)
        self._paused_until = time.monotonic() + self._pause_s
        self.last_error = error.strerror or str(error)
        self._counters.add("disk_write_errors")
        self._counters.warn(f"{self._config.path}: write failed: {self.last_error}")

    def _store(self, pages: list[tuple[PageId, Fill]]) -> bool:
        """Writes what there is room for. False: not all of it."""
        places = self._allocate(len(pages))  # fewer than pages: the cap is too small
        try:
            written, error = self._writer.write(pages[: len(places)], places)
            self._publish(written)  # what was written before a failure is worth keeping
        finally:
            self._settle(places)
        if error is not None:
            raise error
        return len(places) == len(pages)

    def _publish(self, entries: list[Entry[Place]]) -> None:
        for number in {entry.place.segment for entry in entries}:
            self._space.segments[number].sync()
        self._written.add(len(entries) * self._slot_bytes)
        with self._state:
            for entry in entries:
                self._clock += 1
                entry.stamp = self._clock
        self._commit(Changes(put=entries))
        with self._state:
            for entry in entries:
                self._busy.discard(entry.place)
                self._index.add(entry)
        self._counters.add("disk_pages_written", len(entries))
        self._counters.add("disk_bytes_written", len(entries) * self._slot_bytes)

    def _settle(self, places: list[Place]) -> None:
        """Slots that were taken and have no record go back."""
        with self._state:
            for place in places:
                if place in self._busy:
                    self._busy.remove(place)
                    self._space.give_back(place)

    def _commit(self, changes: Changes) -> None:
        """One transaction, with the deletions and stamps that wait for one. Raises OSError; then they go on waiting."""
        with self._state:
            leaving, touched = self._departing.waiting, dict(self._touched)
            changes.add_segments |= self._space.unrecorded
        changes.delete += [entry.page.key for entry in leaving]
        own = {key: stamp for key, stamp in touched.items() if self.find(key)}
        changes.stamps.update(own)
        changes.written = self._written.record()
        self._file.apply(changes)
        bytes_used = self._space.used_bytes()
        with self._state:
            self._bytes_used = bytes_used
            self._space.unrecorded.clear()  # segments are made under _io, as is this
            self._touched = {key: stamp for key, stamp in self._touched.items() if touched.get(key) != stamp}
            self._departing.committed(leaving)

    # --- room --------------------------------------------------------------------------------------

    def _allocate(self, count: int) -> list[Place]:
        """Up to `count` slots, marked busy: free ones, a new segment's, those of evicted pages. Raises OSError."""
        self._shrink()
        places: list[Place] = []
        try:
            while len(places) < count:
                with self._state:
                    taken = self._space.take(count - len(places))
                    self._busy.update(taken)
                    places += taken
                if not taken and not self._grow() and not self._evict(count - len(places)):
                    break
        except OSError:
            self._settle(places)
            raise
        return places

    def _grow(self) -> bool:
        """One more segment, in the room of one of another size if need be."""
        if time.monotonic() < self._grow_after:
            return False
        try:
            while (obstacle := self._space.obstacle()) is not None:
                misfit = self._space.misfit()
                if misfit is not None and self._remove_segment(misfit):
                    continue
                if obstacle is Obstacle.CAP:
                    self._no_room = CAP_REACHED
                    return False
                floor = self._config.free_floor_bytes >> 20
                raise OSError(errno.ENOSPC, f"less than the free-space floor of {floor} MiB would be left on its disk")
            segment = self._space.make_segment()
            with self._state:
                self._space.add(segment)
            return True
        except OSError as error:
            if error.errno not in FULL:  # a disk that fails is no reason to give pages up
                raise
            self._grow_after = time.monotonic() + LONGEST_PAUSE_S
            self._no_room = error.strerror or str(error)
            if not any(segment.slot_bytes == self._slot_bytes for segment in self._space.segments.values()):
                raise
            self._counters.warn(f"{self._config.path}: no room for a new segment: {error.strerror}")
            return False

    def _evict(self, count: int) -> bool:
        """Removes up to `count` pages, in order of eviction, durably. False: none could go."""
        with self._state:
            victims = self._index.victims(count, self._space.fits)
        try:
            removed = self._remove(victims)
        except OSError:
            self._restore(victims)
            raise
        self._counters.add("disk_pages_evicted", removed)
        return removed > 0

    def _restore(self, entries: list[Entry[Place]]) -> None:
        """Takes entries back whose removal could not be committed: their records and slots are as they were."""
        with self._state:
            self._departing.take_back(entries)
            for entry in entries:
                entry.gone = False
                self._index.add(entry)

    def _shrink(self) -> None:
        """Removes whole segments until the cap holds: other sizes first, then the longest unused. Raises OSError."""
        while self._space.segments and self._space.used_bytes() > self._config.cap_bytes:
            if not any(self._remove_segment(segment) for segment in self._by_age()):
                return

    def _by_age(self) -> list[Segment]:
        newest = dict.fromkeys(self._space.segments, 0)
        with self._state:
            for entry in self._index:
                if entry.identity == self._identity:
                    newest[entry.place.segment] = max(newest[entry.place.segment], entry.stamp)
        same = self._slot_bytes
        return sorted(self._space.segments.values(), key=lambda s: (s.slot_bytes == same, newest[s.number], s.number))

    def _remove_segment(self, segment: Segment) -> bool:
        """Deletes a segment with its pages. False: some page in it is being read."""
        with self._state:
            inside = [entry for entry in self._index if entry.place.segment == segment.number]
            in_use = any(entry.pins for entry in inside) or self._departing.read_in(segment.number)
            if in_use or any(place.segment == segment.number for place in self._busy):
                return False
        removed = self._remove(inside)
        self._commit(Changes(drop_segments=[segment.number]))
        with self._state:
            self._space.remove(segment)
        self._counters.add("disk_pages_evicted", removed)
        return True

    # --- removal -----------------------------------------------------------------------------------

    def drop(self, key: bytes, *, erase: bool = False) -> bool:
        """Forgets a page durably; see PageTier.drop."""
        return self.drop_all([key], erase=erase) == 1

    def drop_all(self, keys: Iterable[bytes], *, erase: bool = False) -> int:
        """Forgets pages with one commit; with `erase` their slots are zeros on disk before. Returns how many there
        were. When the disk refuses, the pages are forgotten now and their records with the next commit that works;
        erasing raises OSError instead."""
        with self._state:
            entries = [entry for key in dict.fromkeys(keys) if (entry := self._index.find(key)) is not None]
        return self._remove(entries, erase=True) if erase else self._forget(entries)

    def _forget(self, entries: list[Entry[Place]]) -> int:
        with self._io:  # several readers may find one page damaged: it is dropped, and counted, once
            before = sum(not entry.gone for entry in entries)
            with contextlib.suppress(OSError):  # the records go with the next commit
                self._remove(entries)
            return before

    def _remove(self, entries: list[Entry[Place]], *, erase: bool = False) -> int:
        with self._io:
            with self._state:
                going = [entry for entry in entries if not entry.gone]
                for entry in going:
                    self._index.remove(entry)
                    entry.gone = True
                self._departing.add(going)
            if erase:
                self._erase(going)
            if going:
                self._commit(Changes())
            return len(going)

    def _erase(self, entries: list[Entry[Place]]) -> None:
        with self._state:
            self._state.wait_for(lambda: not any(entry.pins for entry in entries), READERS_LEAVE_S)
        self._writer.erase(entries)
        self._written.add(sum(self._space.segment(entry.place).slot_bytes for entry in entries))
        for number in {entry.place.segment for entry in entries}:
            self._space.segments[number].sync()
            self._space.blank(number, (entry.place.slot for entry in entries if entry.place.segment == number))

    def scrub(self, pages: Iterable[PageId]) -> int:
        """Overwrites what removed pages left of these in free slots; see leftovers.overwrite. Raises OSError."""
        with self._io:
            return leftovers.overwrite(self._space, pages, self._writer.threads)

    def _vacate(self, entry: Entry[Place]) -> None:
        self._departing.vacate(entry)

    @property
    def capacity(self) -> int:
        """Pages that its cap has room for, roughly, whatever else lies there now."""
        return max(0, self._config.cap_bytes // (self._slot_bytes + BYTES_PER_PAGE))

    # --- accounts ----------------------------------------------------------------------------------

    def stats(self) -> TierStats:
        """Slots of all segments; bytes of all files."""
        with self._state:
            moving = len(self._busy) + len(self._departing)
            counts = (self._space.slots, self._space.free_slots, moving, len(self._index))
            return TierStats(self.name, *counts, self.page_bytes, self._bytes_used, self._config.cap_bytes)

    def check(self) -> None:
        """Raises AssertionError unless every slot is free, used once or being moved, as the index file says too."""
        with self._io, self._state:
            self._index.check()
            used = [*(entry.place for entry in self._index), *self._busy, *self._departing.places]
            free = [Place(number, slot) for number, slots in self._space.free.items() for slot in slots]
            if len(set(used + free)) != len(used + free) or len(used + free) != self._space.slots:
                raise AssertionError(f"disk tier: {len(used)} used + {len(free)} free slots, {self._space.slots} there")
            recorded = {e.page.key: e.place for e in self._file.load()[0].entries}
            if recorded != {e.page.key: e.place for e in [*self._index, *self._departing.waiting]}:
                raise AssertionError("disk tier: index file and memory differ")
            if self._space.segments and self._space.used_bytes() > self._config.cap_bytes:
                raise AssertionError("disk tier: over its cap")

    def close(self) -> None:
        """Writes the stamps that wait, closes the files and lets the directory go. Idempotent."""
        with self._io:
            if self._lock_fd < 0:
                return
            with contextlib.suppress(OSError):
                self._commit(Changes())
            self._writer.close()
            self._file.close()
            self._space.close()
            os.close(self._lock_fd)
            self._lock_fd = -1
