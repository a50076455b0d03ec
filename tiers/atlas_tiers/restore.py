"""Bringing a prefix back: pages are read into blocks, or made ready to be read where they lie. Engine thread only; the
mover's threads do the reading.
"""

from __future__ import annotations

import dataclasses

from .block import Block, BlockPool
from .device import DeviceMemory
from .held import Held
from .host import HostTier
from .keys import TOKEN_BYTES
from .mover import HoldJob, Job, Mover, ReadJob
from .prefix import Prefix
from .sequence import Sequence


@dataclasses.dataclass(slots=True)
class _Filling:
    job: ReadJob
    waiters: list[Sequence]


class Restore:
    """What is being read, for whom."""

    def __init__(self, pool: BlockPool, memory: DeviceMemory, host: HostTier | None, mover: Mover) -> None:
        self._pool, self._memory, self._host, self._mover = pool, memory, host, mover
        self._fills: dict[int, _Filling] = {}  # by block number
        self._holds: dict[HoldJob, tuple[Sequence, int]] = {}  # the sequence and position that wait for it

    @property
    def busy(self) -> bool:
        """Whether reads are under way, wanted or not."""
        return bool(self._fills or self._holds)

    def held_keys(self) -> set[bytes]:
        """Of pages that will be held in lower tiers."""
        return {job.page.key for job in self._holds}

    def begin(self, sequence: Sequence, found: Prefix, fresh: list[Block]) -> None:
        """Gives each page its block, as far as `fresh` goes, and starts the reads. The others stay away: in the host
        tier as far as that has room nobody holds, else on disk."""
        jobs: list[Job] = []
        tail = self._tail(found, fresh, jobs) if found.tail is not None else None
        blocks: list[Block | None] = []
        waiting: set[int] = set()
        host_room = (self._host.unheld if self._host is not None else 0) - sum(job.to_host for job in self._holds)
        for position, hit in enumerate(found.hits):
            block = hit.block
            if block is None and fresh and not hit.past:
                block = fresh.pop()
                self._pool.register(block, hit.page)
                jobs.append(self._fill(block, ReadJob(block, hit.page, hit.sources)))
            elif block is None and not hit.past:
                job = HoldJob(hit.page, hit.sources, to_host=host_room > 0)
                self._holds[job] = (sequence, position)
                host_room -= 1
                jobs.append(job)
                waiting.add(position)
            blocks.append(block)
        rest = b""
        if tail is not None and found.tail is not None:
            blocks.append(tail)
            rest = found.tail.hit.page.packed[: found.tail.used * TOKEN_BYTES]
        for position, block in enumerate(blocks):
            if block is not None and block.number in self._fills:
                waiting.add(position)
                self._fills[block.number].waiters.append(sequence)
        sequence.begin(blocks, [hit.page for hit in found.hits], rest, waiting)
        self._mover.submit(jobs)

    def _tail(self, found: Prefix, fresh: list[Block], jobs: list[Job]) -> Block:
        """The block that the sequence appends to: taken over, copied, or being read."""
        tail = found.tail
        if tail is None:
            raise ValueError("no tail was found")
        source = tail.hit.block
        if tail.owned and source is not None:
            return source
        block = fresh.pop()
        if source is None:
            jobs.append(self._fill(block, ReadJob(block, tail.hit.page, tail.hit.sources)))
        else:
            self._memory.duplicate(source.number, block.number)
            self._pool.release(source)
        return block

    def _fill(self, block: Block, job: ReadJob) -> ReadJob:
        self._pool.acquire(block)
        block.filling = True
        self._fills[block.number] = _Filling(job, [])
        return job

    def filled(self, job: ReadJob) -> None:
        """A read into a block has ended."""
        waiters = self._fills.pop(job.block.number).waiters
        job.block.filling = False
        if not job.ok:
            self._pool.abandon(job.block)
        elif job.block.registered:
            self._pool.seal(job.block, job.page)
        reason = "" if job.ok else job.reason or "restore was stopped"
        for sequence in waiters:
            sequence.filled(job.block, reason)
        self._pool.release(job.block)

    def held(self, job: HoldJob) -> None:
        """A page that stays away is ready, or can't be read."""
        sequence, position = self._holds.pop(job)
        if job.wanted:
            sequence.held(position, job.held, "" if job.held else job.reason or "restore was stopped")
        elif job.held is not None:
            job.held.let_go()

    def let_go(self, sequence: Sequence, blocks: list[Block | None], away: list[Held]) -> None:
        """Drops a sequence's references, the end of its chain first: it is to be evicted before the beginning. What is
        still being read for it, and for nobody else, is not wanted any more."""
        for held in away:
            held.let_go()
        first = len(sequence.blocks) if not sequence.released else 0
        for job, (waiting, position) in self._holds.items():
            job.wanted = job.wanted and not (waiting is sequence and position >= first)
        for block in reversed(blocks):
            if block is None:
                continue
            filling = self._fills.get(block.number)
            if filling is not None and sequence in filling.waiters:
                filling.waiters.remove(sequence)
                if not filling.waiters:
                    filling.job.wanted = False
                    self._pool.abandon(block)
            self._pool.release(block)
