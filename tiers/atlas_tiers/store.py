"""All tiers behind one handle: what the engine's main loop calls. Engine thread only; the mover's threads do the I/O.

A page leaves the device pool when no one references it and its block is wanted (`room`); it goes to the host tier if
there is one. `writebehind` brings pages to disk, `restore` brings them back.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Sequence as Tokens
from typing import Any

from .base import BLOCK_TOKENS, PageLayout, PageTier, Ticket, TierStats
from .block import Block, BlockPool
from .catalog import Catalog
from .counters import Counters
from .device import DeviceMemory
from .disk import DiskTier
from .evict import Uses, make_policy
from .held import Held
from .host import HostTier
from .keys import PACKED_BYTES, PageId, chain, identity_hash, pack, root_key
from .mover import HoldJob, Mover, ReadJob, WriteJob
from .pool import DeviceTier
from .prefix import Prefix, longest_prefix
from .rates import Rates
from .restore import Restore
from .room import Room
from .sequence import Sequence
from .space import DiskConfig
from .stream import Pass, Ring, Want
from .tensors import payload_layers, slab_tensor
from .whereabouts import count_by_tier
from .writebehind import WriteBehind

READERS = 3
STREAM_READERS = 3
SPLIT_PAGES = 16  # most pages of a context that attention asks for at a time
WORKING_BLOCKS = 10  # left free when a long context is opened, for the first tokens it computes
UNLIMITED = 1 << 40  # tokens


class TieredStore:
    """See KVStore. `identity` is the engine's fingerprint of all that K and V depend on besides tokens."""

    def __init__(
        self,
        layout: PageLayout,
        identity: bytes,
        *,
        device_blocks: int,
        host_bytes: int,
        disk: DiskConfig | None,
        device: str = "cpu",
        policy: str = "lru",
        event: threading.Event | None = None,
    ) -> None:
        """Raises StoreLocked when another engine has the directory, OSError or torch's error when memory is short.
        A directory that can't be used for another reason is a warning: the store then runs without the disk.
        `policy`: how each tier chooses what to evict, one of evict.POLICIES; ValueError for another. `event`: what
        wait() waits for, if another store shares it."""
        self.layout = layout
        self._identity = identity_hash(identity, layout)
        self._counters = Counters()
        self._memory = DeviceMemory(layout, device_blocks, device)
        self.pages = self._memory.layers
        self.lanes = dict.fromkeys(self.pages, 0)
        self._uses = Uses()
        self._rates = Rates(time.monotonic)
        chained = layout.window is None
        self._policy = functools.partial(make_policy, policy, self._uses, self._rates.page_cost, chained=chained)
        self.pool = BlockPool(device_blocks, self._demote, self._policy())
        self._device = DeviceTier(layout, self.pool, self._memory)
        self._host = self._make_host(host_bytes) if host_bytes >= layout.page_bytes else None
        self._disk = self._open_disk(disk)
        self._tiers: list[Catalog[Any]] = [tier for tier in (self._host, self._disk) if tier is not None]
        self._mover = Mover(self._memory.write, self._host, self._disk, self._counters, self._rates, READERS, event)
        lower = (self._host, self._disk)
        self._restore = Restore(self.pool, self._memory, self._host, self._mover)
        self._writes = WriteBehind(self.pool, self._memory, *lower, self._mover, self._counters, layout.page_bytes)
        self._room = Room(self.pool, self._memory, *lower, self._counters, self._writes.write, lambda: self.writing)
        self._ring = Ring(layout, self._counters, most=SPLIT_PAGES, readers=STREAM_READERS)
        on_cpu = device == "cpu"  # there attention reads the host tier in place
        in_place = self._host if on_cpu else None
        self.host_pages = payload_layers(layout, slab_tensor(in_place.slab, layout.page_bytes)) if in_place else {}

    def _make_host(self, limit_bytes: int) -> HostTier:
        return HostTier(self.layout, limit_bytes, self._counters, self._policy())

    def _open_disk(self, config: DiskConfig | None) -> DiskTier | None:
        if config is None:
            return None
        try:
            return DiskTier(self.layout, self._identity, config, self._counters, self._policy())
        except OSError as error:
            self._counters.warn(f"{config.path}: no KV pages are kept on disk: {error.strerror or error}")
            return None

    # --- sequences ---------------------------------------------------------------------------------

    def usable(self, tokens: Tokens[int], owner: str) -> int:
        """How many of tokens[:-1] open() would find now."""
        self.poll()
        found = self._search(tokens[:-1], owner)
        found.give_up(self.pool)
        return found.length

    def _search(self, tokens: Tokens[int], owner: str) -> Prefix:
        needed = self.layout.first_needed if self.layout.window is not None else None
        return longest_prefix(root_key(self._identity, owner), pack(tokens), self.pool, self._tiers, needed)

    def open(self, tokens: Tokens[int], owner: str, *, durable: bool, limit: int | None = None) -> Sequence:
        """Begins a sequence with the longest usable prefix of tokens[:-1]; see KVStore.open. Raises OutOfBlocks.
        `limit`: take just so many tokens of it, whatever reading them costs; usable() said that it can be done."""
        root = root_key(self._identity, owner)
        self.poll()  # not between search and placing: a fill that fails then would be taken for a page that is there
        found = self._search(tokens[:-1][:limit], owner)
        hits = [(hit.tier, hit.page.key) for hit in found.pages]
        missing = -(-(len(tokens) - 1) // BLOCK_TOKENS) - len(found.hits) - int(found.tail is not None)
        free = limit is None and self.layout.window is None
        reason = found.leave_out_slow(self._rates, self.layout.page_bytes, self.pool) if free else ""
        try:
            count = self._fresh_blocks(found, len(tokens))
            self._room.spare(found.hits, count)
            fresh = self._room.take(count)
        except BaseException:
            found.give_up(self.pool)
            raise
        self._count(hits, missing)
        sequence = Sequence(self, root, durable=durable)
        self._room.running.append(sequence)
        self._restore.begin(sequence, found, fresh)
        sequence.reset_reason = reason
        if self._disk is not None:
            self._writes.used_again(hit.page for hit in found.hits if not hit.past)
            for hit in reversed(found.hits):
                if not hit.past:
                    self._disk.touch(hit.page)
        return sequence

    def _fresh_blocks(self, found: Prefix, total: int) -> int:
        """Blocks for the pages to be read: all of them, or as many as leave room to work; the others stay away."""
        wanted = found.blocks_needed
        own = int(wanted > found.pages_needed)  # the tail's can't be away
        to_compute = -(-(total + 1) // BLOCK_TOKENS) - len(found.hits) - int(found.tail is not None)
        room = self.pool.available - min(to_compute, WORKING_BLOCKS)
        return wanted if wanted <= room else max(own, room)

    def note_prefill(self, tokens: int, position: int, seconds: float) -> None:
        """See KVStore.note_prefill."""
        if tokens >= BLOCK_TOKENS:
            self._rates.prefill.note(tokens, position, seconds)

    def _count(self, hits: list[tuple[str, bytes]], missing: int) -> None:
        """Pages by where they were found, each is a use; those before the window are neither found nor missing."""
        for tier, _ in hits:
            self._counters.add(f"{tier}_hit_pages")
        self._uses.add(key for _, key in hits)
        self._counters.add("miss_pages", max(0, missing))

    # --- called by sequences -----------------------------------------------------------------------

    def take(self, count: int) -> list[Block]:
        """`count` OPEN blocks. Raises OutOfBlocks, changing nothing."""
        if count > self.pool.available:
            self.poll()  # finished writes give up their blocks
        return self._room.take(count)

    def let_go(self, sequence: Sequence, blocks: list[Block | None], away: list[Held]) -> None:
        """Drops a sequence's references; those of a released one are all it had."""
        if sequence.released:
            self._room.running.remove(sequence)
        self._restore.let_go(sequence, blocks, away)

    def let_past(self, block: Block | None, held: Held | None) -> None:
        """Drops a sequence's reference to a page that it does not need any more."""
        if block is not None:
            self.pool.release(block)
        if held is not None:
            held.let_go()

    def seal(self, sequence: Sequence, block: Block, page: PageId) -> None:
        """A block is full. A durable sequence's is queued to be written, unless the queue is full."""
        self.pool.seal(block, page)
        if sequence.durable:
            self._writes.sealed(block, page)

    def persist_sequence(self, sequence: Sequence) -> Ticket:
        """See KVSequence.persist. Raises ValueError for a sequence that is not ready."""
        if not sequence.ready:
            raise ValueError("only a ready sequence can be persisted")
        if not sequence.durable:
            return Ticket(done=True)
        first = min(sequence.first_needed, len(sequence.pages))
        pages = [*sequence.pages[first:], *([sequence.tail] if sequence.tail else [])]
        blocks = zip(pages, sequence.blocks[first:], strict=False)  # reserved blocks may follow
        return self._writes.ticket(list(blocks), sequence.new_parts())

    def _demote(self, number: int, page: PageId) -> None:
        """A page is about to leave the device pool."""
        self._counters.add("device_pages_evicted")
        if self._host is not None:
            self._host.store([(page, functools.partial(self._memory.read, number))])

    # --- progress ----------------------------------------------------------------------------------

    def poll(self) -> None:
        """Takes in finished reads and writes; never blocks."""
        self._mover.event.clear()
        while self._mover.finished:
            job = self._mover.finished.popleft()
            if isinstance(job, ReadJob):
                self._restore.filled(job)
            elif isinstance(job, HoldJob):
                self._restore.held(job)
            elif isinstance(job, WriteJob):
                self._writes.written(job)

    def read_ahead(self, wants: Tokens[Want]) -> Pass:
        """Starts bringing layer slices of away pages for one forward pass; see KVStore.read_ahead."""
        return self._ring.begin(wants)

    def wait(self, timeout: float) -> None:
        """Blocks until poll() has something to do, or `timeout` seconds."""
        self._mover.event.wait(timeout)

    @property
    def writing(self) -> bool:
        """Whether queued writes, or reads that nobody wants any more, hold blocks: OutOfBlocks may pass by itself."""
        return self._writes.busy or self._restore.busy

    @property
    def pool_blocks(self) -> int:
        """Blocks of the device pool that a chunk of new tokens may take."""
        window = -(-self.layout.window // BLOCK_TOKENS) if self.layout.window else 0
        return max(len(self.pool.blocks) - window, min(3, len(self.pool.blocks)))

    @property
    def capacity(self) -> int:
        """Tokens that one sequence can have at most, over all tiers."""
        if self.layout.window is not None:
            fits = len(self.pool.blocks) >= -(-self.layout.window // BLOCK_TOKENS) + WORKING_BLOCKS
            if fits:
                return UNLIMITED
        lower = sum(tier.capacity for tier in self._tiers)
        return BLOCK_TOKENS * (len(self.pool.blocks) + lower)

    # --- chains without a sequence -----------------------------------------------------------------

    def persist(self, tokens: Tokens[int], owner: str) -> Ticket:
        """Writes those pages of the chain that are in memory but not on disk. The ticket covers the pages that are in
        any tier."""
        return self._writes.checkpoint(self._chain(tokens, owner))

    def purge(self, tokens: Tokens[int], owner: str, *, keep: int = 0) -> int:
        """Erases the chain's pages and tails that no running sequence holds, on every tier, but for those that end
        within the first `keep` tokens; returns how many. Waits for the disk: when it returns, the bytes are zeros
        there. Raises OSError if they could not be overwritten."""
        self._mover.drain_writes()
        self.poll()
        related = self._related(tokens, owner)
        kept = {page.key for page in self._related(tokens[:keep], owner)} | self._held_keys()
        free = [page for page in related if page.key not in kept and self._unused(page)]
        keys = [page.key for page in free]
        erased = {key for key in keys if self._device.drop(key, erase=True)}
        if self._host is not None:
            erased |= {key for key in keys if self._host.drop(key, erase=True)}
        if self._disk is not None:
            erased |= {key for key in keys if self._disk.find(key)}
            self._disk.drop_all(keys, erase=True)
            self._disk.scrub(related)
        return len(erased)

    def _held_keys(self) -> set[bytes]:
        """Pages of running sequences that lie in lower tiers: erasing one would wait for this very thread."""
        held = {page.entry.page.key for sequence in self._room.running for page in sequence.away.values()}
        return held | self._restore.held_keys()

    def _unused(self, page: PageId) -> bool:
        block = self.pool.find(page)
        return block is None or block.refs == 0

    def _related(self, tokens: Tokens[int], owner: str) -> list[PageId]:
        """The chain of `tokens` and every tail, old ones too, that `tokens` goes through."""
        pages = self._chain(tokens, owner)
        tails: dict[bytes, PageId] = {}
        for page in pages:
            blocks = [block.page for block in self.pool.followers(page.parent) if block.page is not None]
            lower = [follower for tier in self._tiers for follower in tier.followers(page.parent)]
            tails |= {f.key: f for f in [*blocks, *lower] if f.is_tail and page.packed.startswith(f.packed)}
        return [*(page for page in pages if page.key not in tails), *tails.values()]

    # --- accounts ----------------------------------------------------------------------------------

    @property
    def _all(self) -> list[PageTier]:
        return [self._device, *(tier for tier in (self._host, self._disk) if tier is not None)]

    def locate(self, tokens: Tokens[int], owner: str) -> dict[str, int]:
        """How many of `tokens` have their K/V in which tier; see KVStore.locate."""
        growing = [sequence.tail for sequence in self._room.running if sequence.ready]
        return count_by_tier(
            self._chain(tokens, owner), self.pool,
            [tail for tail in growing if tail is not None], self._tiers,
        )  # fmt: skip

    def stats(self) -> list[TierStats]:
        """Each tier's pages and bytes, fastest first."""
        return [tier.stats() for tier in self._all]

    def counters(self) -> dict[str, int]:
        """Monotonic counts by name; a name appears with its first count."""
        return self._counters.counts()

    @property
    def warnings(self) -> list[str]:
        """What went wrong since the start, as sentences for a person; the latest few."""
        return self._counters.warnings()

    def check(self) -> None:
        """Raises AssertionError when the accounting identity fails on any tier. Call when idle."""
        for tier in self._all:
            tier.check()

    def close(self) -> None:
        """Finishes the write queue, stops the threads, lets the directory go."""
        self._ring.close()
        self._mover.close()
        self.poll()
        for tier in self._all:
            tier.close()

    # --- names of pages ----------------------------------------------------------------------------

    def _chain(self, tokens: Tokens[int], owner: str) -> list[PageId]:
        """Full pages of `tokens`, then the exact tail."""
        root, packed = root_key(self._identity, owner), pack(tokens)
        pages = chain(root, packed)
        rest = packed[len(pages) * PACKED_BYTES :]
        return [*pages, PageId.of(pages[-1].key if pages else root, rest, len(pages))] if rest else pages
