"""Room in the device pool: cached pages are evicted, then running sequences' pages are sent away to RAM or disk.

A page that is sent away stays part of its sequence and is read where it lies. The sequence with most pages in the pool
gives first, its last pages before its first: what stays of a long context is a fixed beginning, since attention scans
all pages in every step and any order of recent use would send away just what is wanted next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .base import BlocksComing
from .block import Block, BlockPool
from .catalog import Catalog
from .counters import Counters
from .device import DeviceMemory
from .disk import DiskTier
from .errors import PageDamaged
from .held import Held
from .host import HostTier
from .keys import PageId
from .sequence import Sequence


class Room:
    """Engine thread only. `write` queues a block's page to be written to disk; `coming` says whether writes are queued
    whose end will set blocks free."""

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
        self.running: list[Sequence] = []

    def take(self, count: int) -> list[Block]:
        """`count` OPEN blocks. Raises BlocksComing when they will be free once queued writes are done, else
        OutOfBlocks; pages may have been sent away then."""
        if count > self._pool.available:
            self._make(count)
        if count > self._pool.available and self._coming():
            raise BlocksComing(f"{count} blocks wanted, {self._pool.available} free until pages are written")
        return self._pool.take(count)

    def _make(self, count: int) -> None:
        to_write: list[tuple[Block, PageId]] = []
        for sequence, position in self._candidates():
            missing = count - self._pool.available
            if missing <= 0:
                return
            block, page = sequence.blocks[position], sequence.pages[position]
            held = self._hold(page, block)
            if held is not None:
                self._pool.release(sequence.send_away(position, held))
                self._counters.add("device_pages_sent_away")
            elif block is not None and len(to_write) < missing:
                to_write.append((block, page))
        if self._disk is not None and not self._disk.last_error:
            for block, page in to_write:
                self._write(block, page)

    def _candidates(self) -> Iterator[tuple[Sequence, int]]:
        movable = [(sequence, sequence.movable()) for sequence in self.running]
        for sequence, positions in sorted(movable, key=lambda pair: -len(pair[1])):
            for position in positions:
                yield sequence, position

    def _hold(self, page: PageId, block: Block | None) -> Held | None:
        """The page pinned in RAM, or on disk; copied to RAM if it is in neither. None: neither can be."""
        tiers: list[Catalog[Any]] = [tier for tier in (self._host, self._disk) if tier is not None]
        for tier in tiers:
            entry = tier.pin(page)
            if entry is None:
                continue
            try:
                if tier is self._host:
                    tier.verify(entry)
                return Held(tier, entry)
            except PageDamaged:
                tier.unpin(entry)
        if self._host is None or block is None:
            return None
        self._host.store([(page, lambda into: self._memory.read(block.number, into))])
        entry = self._host.pin(page)
        return Held(self._host, entry) if entry else None

