"""What removed pages leave in free slots of segment files: superseded tails, evicted pages. Purging overwrites it."""

from __future__ import annotations

from collections.abc import Iterable

from .keys import PageId
from .memory import aligned_buffer
from .segment import SECTOR, Segment, SlotDamaged, decode_header
from .space import Space


def overwrite(space: Space, pages: Iterable[PageId]) -> int:
    """Writes zeros over the free slots that hold one of `pages`, or a tail that one of them goes through; returns how
    many, when they are zeros on the device. Reads the header of every free slot. No slot may be taken meanwhile.
    Raises OSError."""
    chain = {page.parent: page.packed for page in sorted(pages, key=lambda page: page.count)}  # the longest of each
    head = aligned_buffer(SECTOR)
    found = 0
    for number, free in list(space.free.items()):
        segment = space.segments[number]
        stale = [slot for slot in list(free) if _holds_part(segment, slot, head, chain)]
        for slot in stale:
            segment.write(slot, aligned_buffer(segment.slot_bytes))
        if stale:
            segment.sync()
        found += len(stale)
    return found


def _holds_part(segment: Segment, slot: int, head: memoryview, chain: dict[bytes, bytes]) -> bool:
    try:
        page = decode_header(head[: segment.read(slot, head)]).page
    except SlotDamaged:  # zeros, most of all
        return False
    return chain.get(page.parent, b"").startswith(page.packed)
