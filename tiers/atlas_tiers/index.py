"""Which pages a RAM or disk tier holds: by key, by parent, by age. Pure; the caller holds the tier's lock.

Order of eviction: pages of other identities first, then the least recently used. A pinned page is being read
and is passed over.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

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

    def __init__(self, identity: bytes = b"") -> None:
        self._identity = identity
        self._own: OrderedDict[bytes, Entry[Place]] = OrderedDict()
        self._foreign: OrderedDict[bytes, Entry[Place]] = OrderedDict()
        self._followers: dict[bytes, dict[bytes, PageId]] = {}

    def __len__(self) -> int:
        return len(self._own) + len(self._foreign)

    def __iter__(self) -> Iterator[Entry[Place]]:
        """In order of eviction."""
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
        self._own[entry.page.key] = entry
        self._followers.setdefault(entry.page.parent, {})[entry.page.key] = entry.page

    def touch(self, key: bytes) -> None:
        """Makes an own page the most recently used."""
        if key in self._own:
            self._own.move_to_end(key)

    def remove(self, entry: Entry[Place]) -> None:
        """Takes an entry out. The caller frees its place when `pins` is 0 (see `gone`)."""
        key = entry.page.key
        if self._foreign.get(key) is entry:
            del self._foreign[key]
            return
        del self._own[key]
        family = self._followers[entry.page.parent]
        del family[key]
        if not family:
            del self._followers[entry.page.parent]

    def victim(self) -> Entry[Place] | None:
        """The first entry in order of eviction that nobody reads."""
        return next((entry for entry in self if entry.pins == 0), None)
