"""The device pool as a tier like the others: BlockPool's bookkeeping and the slabs behind the contract of PageTier."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from .base import OutOfBlocks, PageHeader, PageLayout, TierStats
from .block import Block, BlockPool, State
from .index import Entry
from .keys import PageId
from .memory import aligned_buffer, copy


class Slabs(Protocol):
    """The blocks' memory; see DeviceMemory."""

    def read(self, block: int, into: memoryview) -> None: ...
    def write(self, block: int, payload: memoryview) -> None: ...
    def erase(self, block: int) -> None: ...


class DeviceTier:
    """PageTier over the device pool. Its own calls exclude each other; the engine's thread, which also uses the pool
    itself, is the only caller in a store. Blocks carry no checksum: attention reads them in place anyway."""

    name = "device"

    def __init__(self, layout: PageLayout, pool: BlockPool, memory: Slabs) -> None:
        self._layout = layout
        self.page_bytes = layout.page_bytes
        self._pool, self._memory = pool, memory
        self._lock = threading.Lock()

    def put(self, header: PageHeader, payload: memoryview) -> bool:
        """Stores a page as a cache entry; see PageTier.put. False also when running sequences hold every block."""
        page = PageId.from_header(header)
        if len(payload) != self.page_bytes or not page.consistent:
            return False
        with self._lock:
            block = self._pool.find(page)
            if block is not None:
                self._use(block)
                return True
            try:
                (block,) = self._pool.take(1)
            except OutOfBlocks:
                return False
            writable = memoryview(bytearray(payload)) if payload.readonly else payload  # a copy needs an address
            self._memory.write(block.number, writable)
            stored = self._pool.seal(block, page, supersede=False)
            self._pool.release(block)
            return stored

    def get(self, key: bytes, into: memoryview) -> PageHeader | None:
        """Copies a sealed page into `into` (page_bytes). None: not there, or still being filled."""
        with self._lock:
            block = self._sealed(key)
            if block is None or block.page is None:
                return None
            self._memory.read(block.number, into)
            self._use(block)
            return block.page.header

    def pin(self, page: PageId) -> Entry[Block] | None:
        """Exactly this page, sealed, its block referenced until unpin(). None: not there."""
        with self._lock:
            block = self._pool.find(page)
            if block is None or block.state is not State.SEALED:
                return None
            self._pool.acquire(block)
            return Entry(page, block, pins=1)

    def unpin(self, entry: Entry[Block]) -> None:
        """Undoes one pin()."""
        with self._lock:
            entry.pins -= 1
            self._pool.release(entry.place)

    def verify(self, entry: Entry[Block]) -> None:
        """Nothing to check: see above."""

    def load_parts(self, entry: Entry[Block], first: int, last: int, into: memoryview) -> None:
        """Copies parts [first, last) of a pinned page into `into`. Raises ValueError for parts or a buffer that don't
        fit. Attention does not come here: it reads the blocks themselves."""
        offset, size = self._layout.span(first, last)
        if into.nbytes != size:
            raise ValueError(f"a buffer of {into.nbytes} bytes for parts of {size}")
        whole = aligned_buffer(self.page_bytes)
        self._memory.read(entry.place.number, whole)
        copy(into, whole[offset : offset + size])

    def find(self, key: bytes) -> bool:
        """Whether a sealed block holds the page."""
        with self._lock:
            return self._sealed(key) is not None

    def tails(self, parent: bytes) -> Sequence[PageHeader]:
        """The tails that follow `parent`, longest first."""
        with self._lock:
            pages = [block.page for block in self._pool.followers(parent)]
        tails = [page for page in pages if page is not None and page.is_tail]
        return [page.header for page in sorted(tails, key=lambda page: -page.count)]

    def drop(self, key: bytes, *, erase: bool = False) -> bool:
        """Frees a page's block, zeros in it with `erase`. False: not there, or a running sequence or a write holds
        it."""
        with self._lock:
            block = self._sealed(key)
            if block is None or block.refs:
                return False
            if erase:
                self._memory.erase(block.number)
            return self._pool.forget(block)

    def stats(self) -> TierStats:
        """Blocks by state; open and sealed ones count as used."""
        with self._lock:
            total, free, open_, sealed = self._pool.counts()
        size = self.page_bytes
        return TierStats(self.name, total, free, open_, sealed, size, (open_ + sealed) * size, total * size)

    def check(self) -> None:
        """Raises AssertionError when lists, states and references disagree."""
        with self._lock:
            self._pool.check()

    def close(self) -> None:
        """Nothing to settle: the memory goes with the object."""

    def _sealed(self, key: bytes) -> Block | None:
        block = self._pool.find_key(key)
        return block if block is not None and block.state is State.SEALED else None

    def _use(self, block: Block) -> None:
        self._pool.acquire(block)
        self._pool.release(block)
