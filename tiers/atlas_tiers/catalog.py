"""What host and disk tier share: a guarded index, pins, and the answers that come from memory alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from .base import PageHeader, PageLayout
from .errors import PageDamaged
from .evict import Policy
from .index import Entry, PageIndex
from .keys import PageId
from .memory import copy

Place = TypeVar("Place")
Fill = Callable[[memoryview], None]  # writes a page's payload into the buffer
Sink = Callable[[memoryview], None]  # takes a verified payload


class Catalog(Generic[Place]):
    """Base of the tiers below the device. `_state` guards the index and is never held across a disk access."""

    name: str
    page_bytes: int

    def __init__(self, identity: bytes, layout: PageLayout, policy: Policy | None = None) -> None:
        self._identity = identity
        self.layout = layout
        self.page_bytes = layout.page_bytes
        self._state = threading.Condition()
        self._index: PageIndex[Place] = PageIndex(identity, policy)
        self._pinned = 0  # entries with pins

    def find(self, key: bytes) -> bool:
        """Whether an own page is there under `key`."""
        with self._state:
            return self._index.find(key) is not None

    def holds(self, page: PageId) -> bool:
        """Whether exactly this page is there: key, parent and every token."""
        with self._state:
            return self._index.holds(page)

    def followers(self, parent: bytes) -> list[PageId]:
        """Pages, full or tails, right after `parent`."""
        with self._state:
            return self._index.followers(parent)

    def tails(self, parent: bytes) -> Sequence[PageHeader]:
        """The tails that follow `parent`, longest first."""
        found = sorted((page for page in self.followers(parent) if page.is_tail), key=lambda page: -page.count)
        return [page.header for page in found]

    def pin(self, page: PageId) -> Entry[Place] | None:
        """Exactly this page, kept from being evicted until unpin(); None: not there. Counts as a use."""
        with self._state:
            if not self._index.holds(page):
                return None
            return self._hold(page.key)

    def touch(self, page: PageId) -> None:
        """Counts as a use."""
        with self._state:
            entry = self._index.find(page.key)
            if entry is not None:
                self._used(entry)

    def unpin(self, entry: Entry[Place]) -> None:
        """Undoes one pin()."""
        with self._state:
            entry.pins -= 1
            if entry.pins == 0:
                self._pinned -= 1
                self._state.notify_all()
                if entry.gone:
                    self._vacate(entry)

    def get(self, key: bytes, into: memoryview) -> PageHeader | None:
        """Copies the page into `into` (page_bytes) after it was verified. None: not there, or damaged and dropped."""
        with self._state:
            entry = self._hold(key)
        if entry is None:
            return None
        try:
            self.load(entry, lambda payload: copy(into, payload))
        except PageDamaged:
            return None
        finally:
            self.unpin(entry)
        return entry.page.header

    @property
    def capacity(self) -> int:
        """Pages that it can hold."""
        raise RuntimeError("a catalog has no places")  # pragma: no cover - the tiers say how

    def load(self, entry: Entry[Place], sink: Sink) -> None:
        """Verifies a pinned page and hands its payload to `sink`, valid during the call.
        Raises PageDamaged; the page is then dropped and `sink` was not called."""
        raise PageDamaged("a catalog holds no bytes")  # pragma: no cover - the tiers say how

    def verify(self, entry: Entry[Place]) -> None:
        """Checks every part of a pinned page. Raises PageDamaged; the page is then dropped."""
        self.load(entry, lambda payload: None)

    def load_parts(self, entry: Entry[Place], first: int, last: int, into: memoryview) -> None:
        """Copies parts [first, last) of a pinned page, end to end, into `into`, which has exactly their size, and
        verifies them; the others are neither read nor checked. From several threads at once, for one entry too.
        Raises PageDamaged: the page is dropped and `into` undefined. Raises ValueError when something does not fit."""
        raise PageDamaged("a catalog holds no bytes")  # pragma: no cover - the tiers say how

    def _span(self, first: int, last: int, into: memoryview) -> tuple[int, int]:
        offset, size = self.layout.span(first, last)
        if into.nbytes != size:
            raise ValueError(f"a buffer of {into.nbytes} bytes for parts of {size}")
        return offset, size

    def _hold(self, key: bytes) -> Entry[Place] | None:
        entry = self._index.find(key)
        if entry is not None:
            self._pinned += not entry.pins
            entry.pins += 1
            self._used(entry)
        return entry

    def _used(self, entry: Entry[Place]) -> None:
        self._index.touch(entry.page.key)

    def _vacate(self, entry: Entry[Place]) -> None:
        """The last reader left an entry that is gone from the index: its place may be used again."""
        raise RuntimeError("a catalog has no places")  # pragma: no cover - the tiers say how
