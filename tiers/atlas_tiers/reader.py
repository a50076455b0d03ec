"""Reads pages, whole or in parts, out of slots, and hands on nothing that was not checked. Thread-safe."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from .base import PageLayout
from .catalog import Sink
from .counters import Counters, Meter
from .errors import PageDamaged
from .index import Entry
from .keys import layout_hash
from .memory import Staging, address, copy
from .segment import DIGEST_BYTES, SECTOR, Place, SlotDamaged, check_parts, decode_header, round_up, slot_size
from .space import Space


class SlotReader:
    """Knows what a page of this layout and identity must look like. Slots that are read are pinned by the caller."""

    def __init__(
        self,
        layout: PageLayout,
        identity: bytes,
        space: Space,
        staging: Staging,
        counters: Counters,
        on_damage: Callable[[Entry[Place], Exception], None],
    ) -> None:
        """`on_damage` is to drop a page whose bytes differ or can't be read; PageDamaged is raised after it."""
        self._layout, self._identity, self._space, self._staging = layout, identity, space, staging
        self._counters, self._on_damage = counters, on_damage
        self._meter = Meter(counters, "disk_read_us")
        self._layout_hash = layout_hash(layout)
        self._slot_bytes = slot_size(layout.page_bytes)

    def load(self, entry: Entry[Place], sink: Sink) -> None:
        """See Catalog.load."""
        with self._meter, self._staging.lend() as buffer:
            with self._damage(entry):
                got = self._space.segment(entry.place).read(entry.place.slot, buffer[: self._slot_bytes])
            self._hand_on(entry, buffer[:got], sink)

    def load_all(self, wanted: Sequence[tuple[Entry[Place], Sink]]) -> list[Exception | None]:
        """load() for several pages; those that lie side by side are read at once. What went wrong with each."""
        outcomes: list[Exception | None] = []
        for run in runs([entry.place for entry, _ in wanted], self._staging.size // self._slot_bytes):
            with self._meter:
                outcomes += self._load_run([wanted[n] for n in run])
        return outcomes

    def load_parts(self, entry: Entry[Place], first: int, last: int, into: memoryview) -> None:
        """See Catalog.load_parts. The slot's header is read and checked first if the entry has no digests yet."""
        with self._meter, self._damage(entry), self._staging.lend() as buffer:
            table = entry.digests  # the last unpin() clears it: whoever reads on for a moment is not to see damage
            if not table:
                got = self._space.segment(entry.place).read(entry.place.slot, buffer[:SECTOR])
                table = entry.digests = self._digests(entry, buffer[:got])
                self._counters.add("disk_bytes_read", SECTOR)
            read = self._read_span(entry, *self._layout.span(first, last), buffer, into)
            check_parts(into, self._layout, first, last, table)
        self._counters.add("disk_bytes_read", read)

    def _load_run(self, wanted: list[tuple[Entry[Place], Sink]]) -> list[Exception | None]:
        size = len(wanted) * self._slot_bytes
        place = wanted[0][0].place
        with self._staging.lend() as buffer:
            got = 0
            with contextlib.suppress(OSError):
                got = self._space.segment(place).read(place.slot, buffer[:size])
            if got < size:  # which page is to blame, the pages say one by one
                return [_outcome(self.load, entry, sink) for entry, sink in wanted]
            slots = [buffer[start : start + self._slot_bytes] for start in range(0, size, self._slot_bytes)]
            pairs = zip(wanted, slots, strict=True)
            return [_outcome(self._hand_on, entry, slot, sink) for (entry, sink), slot in pairs]

    def _hand_on(self, entry: Entry[Place], slot: memoryview, sink: Sink) -> None:
        with self._damage(entry):
            payload = self._payload(entry, slot)
        sink(payload)
        self._counters.add("disk_pages_read")
        self._counters.add("disk_bytes_read", self._slot_bytes)

    @contextlib.contextmanager
    def _damage(self, entry: Entry[Place]) -> Iterator[None]:
        try:
            yield
        except (OSError, SlotDamaged) as error:
            self._on_damage(entry, error)
            raise PageDamaged("page damaged on disk") from error

    def _payload(self, entry: Entry[Place], slot: memoryview) -> memoryview:
        """The payload in a slot's bytes, all of it checked. Raises SlotDamaged."""
        table = self._digests(entry, slot)
        if len(slot) < SECTOR + self._layout.page_bytes:
            raise SlotDamaged(f"{len(slot) - SECTOR} bytes of a page of {self._layout.page_bytes}")
        payload = slot[SECTOR : SECTOR + self._layout.page_bytes]
        check_parts(payload, self._layout, 0, len(self._layout.parts), table)
        return payload

    def _digests(self, entry: Entry[Place], data: memoryview) -> bytes:
        """Checks a slot's header, all of it; returns the digests of the page's parts."""
        header = decode_header(data)
        if header.page != entry.page or header.identity != self._identity or header.layout != self._layout_hash:
            raise SlotDamaged("another page lies in the slot")
        parts = len(header.digests) // DIGEST_BYTES
        if header.payload_bytes != self._layout.page_bytes or parts != len(self._layout.parts):
            raise SlotDamaged(f"{header.payload_bytes} bytes in {parts} parts")
        return header.digests

    def _read_span(self, entry: Entry[Place], offset: int, size: int, buffer: memoryview, into: memoryview) -> int:
        """Payload bytes [offset, offset + size): straight to where they are wanted if all is aligned as O_DIRECT
        wants it, else the sectors around them into staging."""
        segment, slot = self._space.segment(entry.place), entry.place.slot
        if offset % SECTOR == size % SECTOR == address(into) % SECTOR == 0:
            got = segment.read(slot, into, SECTOR + offset)
            skip, read = 0, size
        else:
            begin = offset // SECTOR * SECTOR
            skip, read = offset - begin, round_up(offset + size) - begin
            got = segment.read(slot, buffer[:read], SECTOR + begin)
            copy(into, buffer[skip : skip + size])
        if got < skip + size:
            raise SlotDamaged(f"{max(0, got - skip)} of {size} bytes of a page's parts")
        return read


def runs(places: Sequence[Place], most: int) -> list[range]:
    """Positions of `places` in ranges of at most `most` slots that lie one after the other in one file."""
    found: list[range] = []
    start = 0
    for end in range(1, len(places) + 1):
        follows = end < len(places) and places[end] == Place(places[end - 1].segment, places[end - 1].slot + 1)
        if not follows or end - start == most:
            found.append(range(start, end))
            start = end
    return found


def _outcome(load: Callable[..., None], *arguments: object) -> Exception | None:
    try:
        load(*arguments)
    except Exception as error:  # a sink's, too: the other pages are not to suffer from it
        return error
    return None
