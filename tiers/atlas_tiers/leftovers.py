"""What removed pages leave in free slots of segment files: superseded tails, evicted pages. Purging overwrites it."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor

from .keys import PageId
from .memory import aligned_buffer
from .segment import SECTOR, Segment, SlotDamaged, decode_header
from .space import Space

HEADERS = 64  # that a thread reads one after the other


def overwrite(space: Space, pages: Iterable[PageId], threads: Executor) -> int:
    """Writes zeros over the free slots that hold one of `pages`, or a tail that one of them goes through; returns how
    many, when they are zeros on the device. Reads the headers of the free slots that are not known to be blank, several
    at a time. No slot may be taken meanwhile. Raises OSError."""
    chain = {page.parent: page.packed for page in sorted(pages, key=lambda page: page.count)}  # the longest of each
    found = 0
    for number, segment in list(space.segments.items()):
        headers = _headers(segment, space.unknown(number), threads)
        stale = [slot for slot, page in headers.items() if page is not None and _is_part(page, chain)]
        for slot in stale:
            segment.write(slot, aligned_buffer(segment.slot_bytes))
        if stale:
            segment.sync()
        found += len(stale)
        space.blank(number, [*stale, *(slot for slot, page in headers.items() if page is None)])
    return found


def _headers(segment: Segment, slots: list[int], threads: Executor) -> dict[int, PageId | None]:
    """What each slot's header names; None: it is none."""

    def read(some: list[int]) -> list[PageId | None]:
        head = aligned_buffer(SECTOR)
        return [_page(head[: segment.read(slot, head)]) for slot in some]

    shares = [slots[start : start + HEADERS] for start in range(0, len(slots), HEADERS)]
    pages = [page for share in threads.map(read, shares) for page in share]
    return dict(zip(slots, pages, strict=True))


def _page(head: memoryview) -> PageId | None:
    try:
        return decode_header(head).page
    except SlotDamaged:  # zeros, most of all
        return None


def _is_part(page: PageId, chain: dict[bytes, bytes]) -> bool:
    return chain.get(page.parent, b"").startswith(page.packed)
