"""The threads that move pages: readers fill blocks from the host tier or the disk, one writer stores pages on disk.

The engine's thread hands in jobs and takes the finished ones back from `finished`; blocks that a job names are
referenced for as long as it runs, so their bytes belong to the job (fill) or do not change (store).
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from .base import Ticket
from .block import Block
from .catalog import Catalog, Fill
from .counters import Counters
from .disk import DiskTier
from .errors import PageDamaged
from .held import Held
from .host import HostTier
from .index import Entry
from .keys import PageId
from .memory import copy
from .rates import Rates

READ_BATCH = 4  # pages a reader reports together: each report wakes the engine's thread
BATCH_BYTES = 128 << 20  # pages that share one fdatasync and one commit


@dataclasses.dataclass(slots=True, eq=False)
class ReadJob:
    """Fill a block with a page. `sources` are pinned; `wanted` may be cleared by the engine while it waits."""

    block: Block
    page: PageId
    sources: list[tuple[Catalog[Any], Entry[Any]]]
    wanted: bool = True
    ok: bool = False
    reason: str = ""


@dataclasses.dataclass(slots=True, eq=False)
class HoldJob:
    """Make a page of a running sequence ready to be read where it lies: checked in the host tier, brought there from
    the disk if it has room, else left on the disk. `sources` are pinned; one of them, or a new pin, stays in `held`."""

    page: PageId
    sources: list[tuple[Catalog[Any], Entry[Any]]]
    to_host: bool
    wanted: bool = True
    held: Held | None = None
    reason: str = ""


@dataclasses.dataclass(slots=True, eq=False)
class WriteJob:
    """Store a page on disk. `block` is None when the page lies in the host tier."""

    page: PageId
    fill: Fill
    block: Block | None
    release: Callable[[], None] = lambda: None


@dataclasses.dataclass(slots=True, eq=False)
class TicketJob:
    """Settle a ticket once all jobs before it are done. `chain` must be on disk; `superseded`: tails to drop then."""

    ticket: Ticket
    chain: Sequence[PageId]
    superseded: Callable[[DiskTier], list[bytes]]


Job = ReadJob | HoldJob | WriteJob | TicketJob


class Mover:
    """Owns the threads. Methods are for the engine's thread."""

    def __init__(
        self,
        write_block: Callable[[int, memoryview], None],
        host: HostTier | None,
        disk: DiskTier | None,
        counters: Counters,
        rates: Rates,
        readers: int,
        event: threading.Event | None = None,
    ) -> None:
        """`write_block(block, payload)` copies a verified page to the device. `event`: see below, if it is shared."""
        self._write_block, self._host, self._disk = write_block, host, disk
        self._counters, self._rates = counters, rates
        self.finished: deque[Job] = deque()
        self.event = event or threading.Event()  # something is in `finished`
        self._reads: deque[ReadJob | HoldJob] = deque()
        self._writes: deque[WriteJob | TicketJob] = deque()
        self._writing = 0  # jobs taken from _writes, not yet settled
        self._wake = threading.Condition()
        self._closing = False
        self._readers = readers
        self._threads = [threading.Thread(target=self._read_loop, name=f"kv-read-{n}") for n in range(readers)]
        if disk is not None:
            self._threads.append(threading.Thread(target=self._write_loop, name="kv-write"))
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues jobs; reads and writes are each done in order. Write and ticket jobs need a disk."""
        with self._wake:
            for job in jobs:
                if isinstance(job, ReadJob | HoldJob):
                    self._reads.append(job)
                else:
                    self._writes.append(job)
            self._wake.notify_all()

    def drain_writes(self) -> None:
        """Blocks until every queued write and ticket is settled."""
        with self._wake:
            self._wake.wait_for(lambda: not self._writes and not self._writing)

    def close(self) -> None:
        """Drops the reads that wait, finishes all writes, stops the threads."""
        with self._wake:
            for job in self._reads:
                job.wanted = False
            self._closing = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    # --- readers -----------------------------------------------------------------------------------

    def _read_loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._reads or self._closing)
                if not self._reads:
                    return
                share = -(-len(self._reads) // self._readers)
                jobs = [self._reads.popleft() for _ in range(min(READ_BATCH, share))]
            try:
                self._read_neighbours(jobs)
            except Exception as error:  # each page is read by itself then
                self._counters.warn(f"reading several pages at once failed ({error})")
            for job in jobs:
                try:
                    if isinstance(job, ReadJob):
                        self._read(job)
                    else:
                        self._hold(job)
                except Exception as error:  # a lost job would leave its sequence waiting for ever
                    if isinstance(job, ReadJob):
                        job.ok = False
                    job.reason = f"restore failed ({error})"
                    self._counters.warn(job.reason)
            self._finish(jobs)

    def _hold(self, job: HoldJob) -> None:
        try:
            for tier, entry in job.sources:
                if not job.wanted or job.held:
                    return
                try:
                    job.held = self._bring_to_host(job, tier, entry) or self._keep(tier, entry)
                except PageDamaged as error:
                    job.reason = str(error)
        finally:
            for tier, entry in job.sources:
                if job.held is None or job.held.entry is not entry:
                    tier.unpin(entry)

    def _keep(self, tier: Catalog[Any], entry: Entry[Any]) -> Held:
        if isinstance(tier, HostTier):
            tier.verify(entry)  # the disk's pages are verified when they are read
        return Held(tier, entry)

    def _bring_to_host(self, job: HoldJob, tier: Catalog[Any], entry: Entry[Any]) -> Held | None:
        host = self._host
        if not job.to_host or host is None or tier is host:
            return None
        host.store([(job.page, lambda into: tier.load(entry, lambda payload: copy(into, payload)))])
        brought = host.pin(job.page)
        return Held(host, brought) if brought else None

    def _read_neighbours(self, jobs: Sequence[ReadJob | HoldJob]) -> None:
        """Fills blocks with pages that lie on disk alone, several in one read. What fails is left to _read()."""
        fills = [job for job in jobs if isinstance(job, ReadJob) and job.wanted]
        fills = [job for job in fills if [tier for tier, _ in job.sources] == [self._disk]]
        if self._disk is None or len(fills) < 2:
            return
        sinks = [functools.partial(self._write_block, job.block.number) for job in fills]
        entries = [job.sources[0][1] for job in fills]
        with self._rates.restoring(self._disk.name, self._disk.page_bytes, len(fills)):
            errors = self._disk.load_all(list(zip(entries, sinks, strict=True)))
        for job, error in zip(fills, errors, strict=True):
            job.ok = error is None

    def _read(self, job: ReadJob) -> None:
        try:
            for tier, entry in job.sources:
                if not job.wanted or job.ok:
                    return
                try:
                    with self._rates.restoring(tier.name, tier.page_bytes):
                        tier.load(entry, lambda payload: self._write_block(job.block.number, payload))
                    job.ok = True
                except PageDamaged as error:
                    job.reason = str(error)
        finally:
            for tier, entry in job.sources:
                tier.unpin(entry)

    # --- writer ------------------------------------------------------------------------------------

    def _write_loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._writes or self._closing)
                if not self._writes:
                    return
                batch = self._next_batch()
                self._writing = len(batch)
            try:
                self._write(batch)
            finally:
                self._finish(batch)  # first: who waits for the end of the writes takes their blocks back next
                with self._wake:
                    self._writing = 0
                    self._wake.notify_all()

    def _next_batch(self) -> list[WriteJob | TicketJob]:
        page_bytes = self._disk.page_bytes if self._disk else 1
        limit = max(1, BATCH_BYTES // page_bytes)
        batch: list[WriteJob | TicketJob] = []
        while self._writes and limit:
            job = self._writes.popleft()
            limit -= isinstance(job, WriteJob)
            batch.append(job)
        return batch

    def _write(self, batch: list[WriteJob | TicketJob]) -> None:
        disk = self._disk
        if disk is None:
            return
        error = ""
        try:
            disk.store([(job.page, job.fill) for job in batch if isinstance(job, WriteJob)])
        except Exception as failure:  # a dead writer would leave every later ticket unsettled
            error = f"write failed ({failure})"
            self._counters.warn(error)
        for job in batch:
            if isinstance(job, WriteJob):
                job.release()
            else:
                self._settle(disk, job, error)

    def _settle(self, disk: DiskTier, job: TicketJob, error: str) -> None:
        """Asks the index itself, so earlier failures and evictions are seen too."""
        missing = sum(not disk.holds(page) for page in job.chain)
        if missing:
            cause = error or disk.last_error or "evicted under the disk cap"
            job.ticket.error = f"{missing} of {len(job.chain)} pages are not on disk: {cause}"
        else:
            disk.drop_all(job.superseded(disk))
            for page in reversed(job.chain):  # the end of a chain is of no use without its beginning: let it go first
                disk.touch(page)
        job.ticket.pages = len(job.chain)
        job.ticket.durable = not missing
        job.ticket.done = True

    def _finish(self, jobs: Sequence[Job]) -> None:
        self.finished.extend(jobs)
        self.event.set()
