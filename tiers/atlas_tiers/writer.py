"""Writes pages to slots: neighbours in one write, several writes at once, so that copying and hashing overlap with I/O.

Nothing here makes a page durable or lets it be found: fdatasync and the index commit follow (see disk).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from .base import PageLayout
from .catalog import Fill
from .errors import PageDamaged
from .index import Entry
from .keys import PageId, layout_hash
from .memory import Staging
from .reader import runs
from .segment import SECTOR, Place, SlotHeader, digests, encode_header, slot_size
from .space import Space

WRITERS = 4  # most of what they do is wait: for the device, and for the journal when a slot is written the first time


class SlotWriter:
    """Called by one thread at a time. Fills run on several threads, `threads`, which others may use meanwhile."""

    def __init__(self, layout: PageLayout, identity: bytes, space: Space, staging: Staging) -> None:
        self._layout, self._identity, self._space, self._staging = layout, identity, space, staging
        self._layout_hash = layout_hash(layout)
        self._slot_bytes = slot_size(layout.page_bytes)
        self.threads = ThreadPoolExecutor(WRITERS, "kv-pwrite")  # they start with the first writes

    def write(
        self, pages: Sequence[tuple[PageId, Fill]], places: Sequence[Place]
    ) -> tuple[list[Entry[Place]], Exception | None]:
        """Writes each page to its place; (those that were written, the first error). A page whose source turns out to
        be damaged is left out; after an error no further write is begun."""
        stop = threading.Event()
        chunks = runs(places, self._staging.size // self._slot_bytes)

        def work(chunk: range) -> tuple[list[Entry[Place]], Exception | None]:
            if stop.is_set():
                return [], None
            try:
                return self._chunk([pages[n] for n in chunk], [places[n] for n in chunk]), None
            except Exception as error:
                stop.set()
                return [], error

        outcomes = list(self.threads.map(work, chunks)) if len(chunks) > 1 else [work(chunk) for chunk in chunks]
        written = [entry for entries, _ in outcomes for entry in entries]
        return written, next((error for _, error in outcomes if error is not None), None)

    def erase(self, entries: Sequence[Entry[Place]]) -> None:
        """Zeros over whole slots, of other layouts too; not yet durable. Raises OSError."""
        with self._staging.lend() as buffer:
            buffer[:] = bytes(len(buffer))
            for entry in entries:
                segment = self._space.segment(entry.place)
                for start in range(0, segment.slot_bytes, len(buffer)):
                    segment.write(entry.place.slot, buffer[: segment.slot_bytes - start], start)

    def close(self) -> None:
        """Stops the threads."""
        self.threads.shutdown()

    def _chunk(self, pages: list[tuple[PageId, Fill]], places: list[Place]) -> list[Entry[Place]]:
        written: list[Entry[Place]] = []
        with self._staging.lend() as buffer:
            for number, ((page, fill), place) in enumerate(zip(pages, places, strict=True)):
                slot = buffer[number * self._slot_bytes : (number + 1) * self._slot_bytes]
                try:
                    self._encode(page, fill, slot)
                except PageDamaged:  # the page's source in RAM is bad: its slot gets no header and no record
                    slot[:SECTOR] = bytes(SECTOR)
                else:
                    written.append(Entry(page, place, identity=self._identity))
            if written:
                self._space.segment(places[0]).write(places[0].slot, buffer[: len(places) * self._slot_bytes])
        return written

    def _encode(self, page: PageId, fill: Fill, slot: memoryview) -> None:
        end = SECTOR + self._layout.page_bytes
        payload = slot[SECTOR:end]
        fill(payload)
        slot[end:] = bytes(len(slot) - end)  # nothing of another page goes to disk
        table = digests(payload, self._layout)
        encode_header(SlotHeader(page, self._identity, self._layout_hash, self._layout.page_bytes, table), slot)
