"""The RAM tier: pages in one slab."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from .base import PageHeader, PageLayout, TierStats
from .catalog import Catalog, Fill, Sink
from .counters import Counters, Meter
from .errors import PageDamaged
from .evict import Policy
from .index import Entry
from .keys import PageId
from .memory import aligned_buffer, copy
from .segment import SlotDamaged, check_parts, digests


class HostTier(Catalog[int]):
    """PageTier in RAM. Thread-safe. A place is the page's number in the slab."""

    name = "host"

    def __init__(self, layout: PageLayout, limit_bytes: int, counters: Counters, policy: Policy | None = None) -> None:
        """A slab of limit_bytes // page_bytes pages; memory is committed as pages are first stored. Raises OSError."""
        super().__init__(b"", layout, policy)
        self.limit_bytes = limit_bytes
        self._counters = counters
        self._reading, self._storing = Meter(counters, "host_read_us"), Meter(counters, "host_write_us")
        self._total = limit_bytes // layout.page_bytes
        self._slab = aligned_buffer(self._total * layout.page_bytes)
        self._free = list(range(self._total - 1, -1, -1))
        self._open: set[int] = set()  # being filled, or gone with a reader still in it
        self._writing = threading.Lock()

    def put(self, header: PageHeader, payload: memoryview) -> bool:
        """Stores a page; see PageTier.put."""
        if len(payload) != self.page_bytes:
            return False
        return self.store([(PageId.from_header(header), lambda into: copy(into, payload))])[0]

    def store(self, pages: Sequence[tuple[PageId, Fill]]) -> list[bool]:
        """Stores pages; each `fill` writes one payload. One bool a page: it is there now."""
        with self._writing, self._storing:
            return [self._store(page, fill) for page, fill in pages]

    def _store(self, page: PageId, fill: Fill) -> bool:
        with self._state:
            if self._index.holds(page):
                self._index.touch(page.key)
                return True
            place = self._take() if page.consistent else None
            if place is None:
                self._counters.add("host_writes_dropped")
                return False
            self._open.add(place)
        view = self._view(place)
        try:
            fill(view)
        except BaseException:
            with self._state:
                self._vacate(Entry(page, place))
            raise
        entry = Entry(page, place, digests=digests(view, self.layout))
        with self._state:
            self._open.remove(place)
            self._index.add(entry)
        self._counters.add("host_pages_written")
        self._counters.add("host_bytes_written", self.page_bytes)
        return True

    def load(self, entry: Entry[int], sink: Sink) -> None:
        """See Catalog.load. RAM is checked too: a stray write must not become a wrong token."""
        view = self._view(entry.place)
        with self._reading:
            self._check(entry, view, 0, len(self.layout.parts))
            sink(view)
        self._counters.add("host_pages_read")
        self._counters.add("host_bytes_read", self.page_bytes)

    def load_parts(self, entry: Entry[int], first: int, last: int, into: memoryview) -> None:
        """See Catalog.load_parts. The copy is what is checked."""
        offset, size = self._span(first, last, into)
        with self._reading:
            copy(into, self._view(entry.place)[offset : offset + size])
            self._check(entry, into, first, last)
        self._counters.add("host_bytes_read", size)

    def view(self, entry: Entry[int], part: int) -> memoryview:
        """A part of a pinned page where it lies, unchecked (see verify), until unpin(). Not to be written to."""
        offset, size = self.layout.span(part, part + 1)
        return self._view(entry.place)[offset : offset + size]

    def _check(self, entry: Entry[int], data: memoryview, first: int, last: int) -> None:
        try:
            check_parts(data, self.layout, first, last, entry.digests)
        except SlotDamaged as error:
            if self._remove(entry):
                self._counters.add("host_pages_damaged")
            raise PageDamaged(f"page damaged in RAM: {error}") from error

    def drop(self, key: bytes, *, erase: bool = False) -> bool:
        """Forgets a page; `erase` overwrites its bytes first (readers are waited for)."""
        with self._state:
            entry = self._index.find(key)
            if entry is None:
                return False
            if erase:
                self._state.wait_for(lambda: entry.pins == 0)
                self._view(entry.place)[:] = bytes(self.page_bytes)
            return self._remove(entry)

    @property
    def slab(self) -> memoryview:
        """All places, one payload after the other. A pinned page's bytes do not change."""
        return self._slab

    @property
    def capacity(self) -> int:
        """Pages that it can hold."""
        return self._total

    @property
    def unheld(self) -> int:
        """Places that are free or hold pages nobody reads."""
        with self._state:
            return self._total - len(self._open) - self._pinned

    def stats(self) -> TierStats:
        """Pages and bytes now."""
        with self._state:
            used = len(self._index) + len(self._open)
            counts = (self._total, len(self._free), len(self._open), len(self._index))
            return TierStats(self.name, *counts, self.page_bytes, used * self.page_bytes, self.limit_bytes)

    def check(self) -> None:
        """Raises AssertionError unless every place of the slab is free, open, or holds one page."""
        with self._state:
            places = [*self._free, *self._open, *(entry.place for entry in self._index)]
            self._index.check()
            if sorted(places) != list(range(self._total)):
                raise AssertionError(f"host tier: {len(places)} places accounted for, {self._total} there")

    def close(self) -> None:
        """Nothing to settle: the memory goes with the object."""

    def _take(self) -> int | None:
        if self._free:
            return self._free.pop()
        for victim in self._index.victims(1, lambda place: True):
            self._index.remove(victim)
            self._counters.add("host_pages_evicted")
            return victim.place
        return None

    def _remove(self, entry: Entry[int]) -> bool:
        with self._state:
            if entry.gone or self._index.find(entry.page.key) is not entry:
                return False
            self._index.remove(entry)
            entry.gone = True
            if entry.pins:
                self._open.add(entry.place)
            else:
                self._free.append(entry.place)
            return True

    def _vacate(self, entry: Entry[int]) -> None:
        self._open.remove(entry.place)
        self._free.append(entry.place)

    def _view(self, place: int) -> memoryview:
        return self._slab[place * self.page_bytes : (place + 1) * self.page_bytes]
