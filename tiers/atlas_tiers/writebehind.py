"""Pages on their way to disk: what is queued, what is left out, and tickets that say when a chain is durable.

A durable sequence's pages are queued as they fill, an anonymous one's when they are used a second time. Beyond a full
queue a page is left out; a ticket asks the disk what it lacks and queues that too. Engine thread only.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from .base import Ticket
from .block import Block, BlockPool
from .counters import Counters
from .device import DeviceMemory
from .disk import DiskTier
from .host import HostTier
from .keys import PageId
from .memory import copy
from .mover import Job, Mover, TicketJob, WriteJob

QUEUE_BYTES = 256 << 20  # of pages waiting to be written; each keeps its block


class WriteBehind:
    """Without a disk everything counts as written."""

    def __init__(
        self,
        pool: BlockPool,
        memory: DeviceMemory,
        host: HostTier | None,
        disk: DiskTier | None,
        mover: Mover,
        counters: Counters,
        page_bytes: int,
    ) -> None:
        self._pool, self._memory, self._host, self._disk = pool, memory, host, disk
        self._mover, self._counters = mover, counters
        self._queued: set[bytes] = set()
        self._most = max(4, min(QUEUE_BYTES // page_bytes, len(pool.blocks) // 4))

    @property
    def busy(self) -> bool:
        """Whether queued writes hold blocks."""
        return bool(self._queued)

    def on_disk(self, page: PageId) -> bool:
        """On disk or on its way there. A ticket finds out whether it arrived."""
        return self._disk is None or page.key in self._queued or self._disk.holds(page)

    def write(self, block: Block, page: PageId) -> None:
        """Queues a block's page, however many there are."""
        if page.key not in self._queued:
            self._mover.submit([self._from_block(block, page)])

    def sealed(self, block: Block, page: PageId) -> None:
        """A durable sequence's block is full: it is queued, unless the queue is full."""
        if not self.on_disk(page) and self._room():
            self._mover.submit([self._from_block(block, page)])

    def used_again(self, pages: Iterable[PageId]) -> None:
        """Queues those that are not on disk: an anonymous sequence computed them, and another one uses them now."""
        for page in pages:
            if self.on_disk(page):
                continue
            if not self._room():
                return
            job = self.from_memory(page)
            if job is not None:
                self._counters.add("disk_second_use_pages")
                self._mover.submit([job])

    def _room(self) -> bool:
        if len(self._queued) < self._most:
            return True
        self._counters.add("disk_writes_deferred")
        return False

    def ticket(self, pages: list[tuple[PageId, Block | None]], superseded: list[PageId]) -> Ticket:
        """Writes what is missing of a chain, and says when all of it is on disk. Pages without a block are looked for
        in memory. Tails on disk that end where `superseded` go on are dropped then."""
        ticket = Ticket()
        if self._disk is None:
            ticket.done = True
            return ticket
        jobs: list[Job] = []
        for page, block in pages:
            if not self.on_disk(page):
                job = self._from_block(block, page) if block is not None else self.from_memory(page)
                jobs += [job] if job is not None else []
        chain = [page for page, _ in pages]
        self._mover.submit([*jobs, TicketJob(ticket, chain, functools.partial(_superseded, superseded))])
        return ticket

    def checkpoint(self, chain: list[PageId]) -> Ticket:
        """The same for those pages of a chain that are in any tier."""
        there = [page for page in chain if self.on_disk(page) or self._in_memory(page)]
        return self.ticket([(page, None) for page in there], [])

    def _in_memory(self, page: PageId) -> bool:
        return self._readable(page) is not None or (self._host is not None and self._host.holds(page))

    def _readable(self, page: PageId) -> Block | None:
        block = self._pool.find(page)
        return block if block is not None and not block.filling else None

    def _from_block(self, block: Block, page: PageId) -> WriteJob:
        self._pool.acquire(block)
        self._queued.add(page.key)
        return WriteJob(page, functools.partial(self._memory.read, block.number), block)

    def from_memory(self, page: PageId) -> WriteJob | None:
        """A job for a page that is in a block or in the host tier."""
        block = self._readable(page)
        if block is not None:
            return self._from_block(block, page)
        entry = self._host.pin(page) if self._host is not None else None
        if self._host is None or entry is None:
            return None
        host = self._host
        self._queued.add(page.key)
        return WriteJob(
            page,
            lambda into: host.load(entry, lambda payload: copy(into, payload)),
            None,
            functools.partial(host.unpin, entry),
        )

    def written(self, job: WriteJob) -> None:
        """The writer is done with it, whether or not it worked."""
        self._queued.discard(job.page.key)
        if job.block is not None:
            self._pool.release(job.block)


def _superseded(parts: list[PageId], disk: DiskTier) -> list[bytes]:
    """Keys of tails on disk that end where `parts` go on."""
    return [
        tail.key
        for part in parts
        for tail in disk.followers(part.parent)
        if tail.is_tail and tail.count < part.count and part.packed.startswith(tail.packed)
    ]
