"""Room in the device pool: cached pages are evicted, then running sequences' pages are sent away to RAM or disk.

A page that is sent away stays part of its sequence and is read where it lies. The sequence with most pages in the pool
gives first, its last pages before its first: what stays of a long context is a fixed beginning, since attention scans
all pages in every step and any order of recent use would send away just what is wanted next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .base import BlocksComing
from .block import Block, BlockPool, State
from .catalog import Catalog
from .counters import Counters
from .device import DeviceMemory
from .disk import DiskTier
from .errors import PageDamaged
from .held import Held
from .host import HostTier
from .keys import PageId
from .prefix import Hit
from .sequence import Sequence as Running


class Room:
    """Engine thread only. `write` queues a block's page to be written to disk; `coming` says whether reads or writes
    are queued whose end may set blocks free."""

    def __init__(
        self,
        pool: BlockPool,
        memory: DeviceMemory,
        host: HostTier | None,
        disk: DiskTier | None,
        counters: Counters,
        write: Callable[[Block, PageId], None],
        coming: Callable[[], bool],
    ) -> None:
        self._pool, self._memory, self._host, self._disk = pool, memory, host, disk
        self._counters, self._write, self._coming = counters, write, coming
        self.running: list[Running] = []

    def take(self, count: int) -> list[Block]:
        """`count` OPEN blocks. Raises BlocksComing when they will be free once queued reads or writes are done, else
        OutOfBlocks; pages may have been sent away then."""
        if count > self._pool.available:
            self._make(count)
        if count > self._pool.available and self._coming():
            raise BlocksComing(f"{count} blocks wanted, {self._pool.available} free until pages are written")
        return self._pool.take(count)

    def spare(self, hits: Sequence[Hit], count: int) -> None:
        """Of a prefix that was found: makes its last pages in the pool stay away, as far as `count` blocks want it."""
        movable = (hit for hit in reversed(hits) if hit.block is not None)
        for hit in movable:
            block = hit.block
            if self._pool.available >= count:
                return
            if block is None or block.refs > 1 or block.state is not State.SEALED:
                continue
            held = self._hold(hit.page, block)
            if held is not None:
                hit.block, hit.sources = None, [(held.tier, held.entry)]
                self._pool.release(block)
            else:
                self._write_if_possible(block, hit.page)

    def _make(self, count: int) -> None:
        to_write: list[tuple[Block, PageId]] = []
        for block, page, holders in self._candidates():
            missing = count - self._pool.available
            if missing <= 0:
                return
            held = self._hold(page, block)
            if held is not None:
                self._send_away(held, page, holders)
            elif len(to_write) < missing:
                to_write.append((block, page))
        for block, page in to_write:
            self._write_if_possible(block, page)

    def _send_away(self, held: Held, page: PageId, holders: list[tuple[Running, int]]) -> None:
        """Each sequence that has the block has the page away from now on, with a pin of its own."""
        for sequence, position in holders[1:]:
            entry = held.tier.pin(page)
            if entry is not None:
                self._pool.release(sequence.send_away(position, Held(held.tier, entry)))
        sequence, position = holders[0]
        self._pool.release(sequence.send_away(position, held))
        self._counters.add("device_pages_sent_away")

    def _write_if_possible(self, block: Block, page: PageId) -> None:
        if self._disk is not None and not self._disk.refuses:
            self._write(block, page)

    def _candidates(self) -> Iterator[tuple[Block, PageId, list[tuple[Running, int]]]]:
        """Full pages that running sequences alone refer to, with those sequences: of the one with most pages in the
        pool first, its last page before its first."""
        owned = [(sequence, sequence.in_pool()) for sequence in self.running]
        holders: dict[int, list[tuple[Running, int]]] = {}
        for sequence, positions in owned:
            for position in positions:
                holders.setdefault(sequence.number_at(position), []).append((sequence, position))
        for sequence, positions in sorted(owned, key=lambda pair: -len(pair[1])):
            for position in positions:
                block = sequence.blocks[position]
                if block is None:  # sent away with another sequence's
                    continue
                found = holders[block.number]
                if block.refs == len(found):
                    yield block, sequence.pages[position], found

    def _hold(self, page: PageId, block: Block | None) -> Held | None:
        """The page pinned in RAM, copied there if there is room, or on disk. None: it is nowhere but in its block."""
        host, disk = self._host, self._disk
        if host is not None and block is not None and host.unheld > 0:
            host.store([(page, lambda into: self._memory.read(block.number, into))])
        tiers: list[Catalog[Any]] = [tier for tier in (host, disk) if tier is not None]
        for tier in tiers:
            entry = tier.pin(page)
            if entry is None:
                continue
            try:
                if tier is host:
                    tier.verify(entry)
                return Held(tier, entry)
            except PageDamaged:
                tier.unpin(entry)
        return None
