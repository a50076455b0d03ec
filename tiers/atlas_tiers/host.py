"""The RAM tier: pages in one slab."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from .base import PageHeader, PageLayout, TierStats
from .catalog import Catalog, Fill, Sink
from .counters import Counters
from .errors import PageDamaged
from .evict import Policy
from .index import Entry
from .keys import PageId
from .memory import aligned_buffer, copy
from .segment import digest


class HostTier(Catalog[int]):
    """PageTier in RAM. Thread-safe. A place is the page's number in the slab."""

    name = "host"

    def __init__(self, layout: PageLayout, limit_bytes: int, counters: Counters, policy: Policy | None = None) -> None:
        """A slab of limit_bytes // page_bytes pages; memory is committed as pages are first stored. Raises OSError."""
        super().__init__(b"", policy)
        self.page_bytes = layout.page_bytes
        self.limit_bytes = limit_bytes
        self._counters = counters
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
        with self._writing:
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
        fill(view)
        entry = Entry(page, place, digest=digest(view))
        with self._state:
            self._open.remove(place)
            self._index.add(entry)
        self._counters.add("host_pages_written")
        return True

    def load(self, entry: Entry[int], sink: Sink) -> None:
        """See Catalog.load. RAM is checked too: a stray write must not become a wrong token."""
        view = self._view(entry.place)
        if digest(view) != entry.digest:
            self._counters.add("host_pages_damaged")
            self._remove(entry)
            raise PageDamaged("page damaged in RAM")
        sink(view)
        self._counters.add("host_pages_read")

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
