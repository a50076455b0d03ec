"""Which pages a RAM or disk tier holds: by key, by parent, by worth. Pure; the caller holds the tier's lock.

Order of eviction: pages of other identities first, oldest first; then own ones as the policy says (see evict). A pinned
page is being read and is passed over.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from .evict import EvictionOrder, Lru, Policy
from .keys import PageId

Place = TypeVar("Place")


@dataclasses.dataclass(slots=True)
class Entry(Generic[Place]):
    """One page and where it lies. `gone` entries left the index while a reader still held them."""

    page: PageId
    place: Place
    identity: bytes = b""
    digests: bytes = b""  # of each part; a disk page's only while it is pinned and was read from
    stamp: int = 0
    pins: int = 0
    gone: bool = False


class PageIndex(Generic[Place]):
    """Entries of one tier. `identity` tells own pages from those of other models."""

    def __init__(self, identity: bytes = b"", policy: Policy | None = None) -> None:
        self._identity = identity
        self._own: dict[bytes, Entry[Place]] = {}
        self._order = EvictionOrder(policy or Lru())
        self._foreign: OrderedDict[bytes, Entry[Place]] = OrderedDict()
        self._followers: dict[bytes, dict[bytes, PageId]] = {}

    def __len__(self) -> int:
        return len(self._own) + len(self._foreign)

    def __iter__(self) -> Iterator[Entry[Place]]:
        """All, in no order."""
        yield from self._foreign.values()
        yield from self._own.values()

    def find(self, key: bytes) -> Entry[Place] | None:
        """The own entry under `key`, if any. Pages of other identities are never found."""
        return self._own.get(key)

    def holds(self, page: PageId) -> bool:
        """Whether exactly this page is here: key, parent and every token."""
        entry = self._own.get(page.key)
        return entry is not None and entry.page == page

    def followers(self, parent: bytes) -> list[PageId]:
        """Own pages, full or tails, that come right after `parent`."""
        return list(self._followers.get(parent, {}).values())

    def add(self, entry: Entry[Place]) -> None:
        """Takes in a page that is not here yet, as the most recently used."""
        if entry.identity != self._identity:
            self._foreign[entry.page.key] = entry
            return
        if entry.page.key in self._own:
            self._order.remove(entry.page.key)
        self._own[entry.page.key] = entry
        self._order.add(entry.page)
        self._followers.setdefault(entry.page.parent, {})[entry.page.key] = entry.page

    def touch(self, key: bytes) -> None:
        """Makes an own page the most recently used."""
        if key in self._own:
            self._order.use(key)

    def remove(self, entry: Entry[Place]) -> None:
        """Takes an entry out. The caller frees its place when `pins` is 0 (see `gone`)."""
        key = entry.page.key
        if self._foreign.get(key) is entry:
            del self._foreign[key]
            return
        del self._own[key]
        self._order.remove(key)
        family = self._followers[entry.page.parent]
        del family[key]
        if not family:
            del self._followers[entry.page.parent]

    def victims(self, count: int, usable: Callable[[Place], bool]) -> list[Entry[Place]]:
        """The first `count` entries in order of eviction that nobody reads and whose place is `usable`, for the caller
        to remove."""

        def held(entry: Entry[Place]) -> bool:
            return entry.pins > 0 or not usable(entry.place)

        foreign = (entry for entry in self._foreign.values() if not held(entry))
        chosen = list(itertools.islice(foreign, count))
        keys = self._order.victims(count - len(chosen), lambda key: held(self._own[key]))
        return [*chosen, *(self._own[key] for key in keys)]

    def check(self) -> None:
        """Raises AssertionError when a page could not be found for eviction."""
        if len(self._order) != len(self._own):
            raise AssertionError(f"index: {len(self._order)} pages in the eviction order, {len(self._own)} there")
        self._order.check()
