"""Reads pages, whole or in parts, out of slots, and hands on nothing that was not checked. Thread-safe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .base import PageLayout
from .index import Entry
from .keys import layout_hash
from .memory import address, aligned_buffer, copy
from .segment import DIGEST_BYTES, SECTOR, Place, SlotDamaged, check_parts, decode_header, round_up, slot_size
from .space import Space


class SlotReader:
    """Knows what a page of this layout and identity must look like. Slots that are read are pinned by the caller."""

    def __init__(self, layout: PageLayout, identity: bytes, space: Space) -> None:
        self._layout, self._identity, self._space = layout, identity, space
        self._layout_hash = layout_hash(layout)
        self._spare: list[memoryview] = []  # staging buffers not in use

    @contextlib.contextmanager
    def buffer(self) -> Iterator[memoryview]:
        """Staging for one slot, aligned."""
        try:
            buffer = self._spare.pop()
        except IndexError:
            buffer = aligned_buffer(slot_size(self._layout.page_bytes))
        try:
            yield buffer
        finally:
            self._spare.append(buffer)

    def page(self, entry: Entry[Place], buffer: memoryview) -> memoryview:
        """The whole payload, in `buffer` (one slot). Raises SlotDamaged, OSError."""
        got = self._space.segment(entry.place).read(entry.place.slot, buffer)
        table = self._digests(entry, buffer[:got])
        if got < SECTOR + self._layout.page_bytes:
            raise SlotDamaged(f"{got - SECTOR} bytes of a page of {self._layout.page_bytes}")
        payload = buffer[SECTOR : SECTOR + self._layout.page_bytes]
        check_parts(payload, self._layout, 0, len(self._layout.parts), table)
        return payload

    def parts(self, entry: Entry[Place], first: int, last: int, into: memoryview) -> int:
        """Parts [first, last) into `into` (their size); returns the bytes read. Raises SlotDamaged, OSError."""
        read = 0
        table = entry.digests
        with self.buffer() as buffer:
            if not table:
                read = self._space.segment(entry.place).read(entry.place.slot, buffer[:SECTOR])
                table = entry.digests = self._digests(entry, buffer[:read])
            read += self._read_span(entry, *self._layout.span(first, last), buffer, into)
        check_parts(into, self._layout, first, last, table)
        return read

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
