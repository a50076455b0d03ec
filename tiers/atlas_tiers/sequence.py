"""One running sequence: its blocks, its length, and the chain of keys that grows with it. Engine thread only."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from typing import TYPE_CHECKING

from .base import BLOCK_TOKENS, Ticket
from .block import Block
from .keys import PACKED_BYTES, TOKEN_BYTES, PageId, pack

if TYPE_CHECKING:
    from .store import TieredStore


class Sequence:
    """See KVSequence. Blocks [0, length // 64) are SEALED; a part-filled last one is OPEN and this sequence's alone."""

    def __init__(self, store: TieredStore, root: bytes, *, durable: bool) -> None:
        self._store = store
        self.durable = durable
        self.blocks: list[Block] = []
        self.pages: list[PageId] = []  # of the sealed blocks
        self._root = root
        self._rest = b""  # packed tokens after the last full page
        self._waiting: set[int] = set()  # positions of blocks being filled
        self._brought: set[int] = set()  # positions that came from the host tier or disk
        self._kept_pages = 0  # pages there were at the start: older tails can follow these
        self._released = False
        self.block_table: list[int] = []
        self.length = self.reused = self.restored = 0
        self.reset_reason = ""
        self.ready = False

    @property
    def parent(self) -> bytes:
        """Key that the next page follows."""
        return self.pages[-1].key if self.pages else self._root

    # --- used by the store -------------------------------------------------------------------------

    def begin(self, blocks: list[Block], pages: list[PageId], rest: bytes, waiting: set[int]) -> None:
        """Takes the prefix that was found: one block a page, and one for `rest` if that is not empty. The blocks at
        the positions `waiting` are being filled."""
        self.blocks, self.pages, self._rest = blocks, pages, rest
        self._brought, self._waiting = set(waiting), waiting
        self._count_prefix()

    def filled(self, block: Block, reason: str) -> None:
        """A block it waits for is filled, or (with a reason) never will be: then the prefix ends before it."""
        position = self.blocks.index(block)
        self._waiting.discard(position)
        self.ready = not self._waiting
        if reason:
            self._cut(position, reason)

    def _cut(self, position: int, reason: str) -> None:
        self.reset_reason = f"{reason}: recomputing from token {position * BLOCK_TOKENS}"
        dropped, self.blocks = self.blocks[position:], self.blocks[:position]
        self.pages, self._rest = self.pages[:position], b""
        self._waiting = {p for p in self._waiting if p < position}
        self._brought = {p for p in self._brought if p < position}
        self._count_prefix()
        self._store.let_go(self, dropped)

    # --- KVSequence --------------------------------------------------------------------------------

    def reserve(self, count: int) -> None:
        """Makes room to append `count` tokens. Raises OutOfBlocks, changing nothing; ValueError before it is ready."""
        if not self.ready:
            raise ValueError("only a ready sequence can be appended to")
        needed = -(-(self.length + count) // BLOCK_TOKENS) - len(self.blocks)
        if needed > 0:
            self.blocks += self._store.take(needed)
            self.block_table += [block.number for block in self.blocks[-needed:]]

    def commit(self, tokens: Tokens[int]) -> None:
        """The K/V of `tokens` has been written. Raises ValueError without room reserved, or before it is ready."""
        if not self.ready or self.length + len(tokens) > len(self.blocks) * BLOCK_TOKENS:
            raise ValueError(
                f"{len(tokens)} tokens after {self.length} in {len(self.blocks)} blocks, ready={self.ready}"
            )
        self._rest += pack(tokens)
        self.length += len(tokens)
        while len(self._rest) >= PACKED_BYTES:
            page = PageId.of(self.parent, self._rest[:PACKED_BYTES], len(self.pages))
            self._rest = self._rest[PACKED_BYTES:]
            self.pages.append(page)
            self._store.seal(self, self.blocks[len(self.pages) - 1], page)

    def persist(self) -> Ticket:
        """Writes the tail and whatever else of the chain is not on disk. Nothing may be appended afterwards."""
        return self._store.persist_sequence(self)

    def release(self) -> None:
        """Drops the references; pages and tail stay as cache entries. Idempotent."""
        if self._released:
            return
        tail = None if self._waiting else self.tail
        if tail is not None and not self._store.pool.covers(tail):
            self._store.pool.seal(self.blocks[len(self.pages)], tail)
        self._released, self.ready = True, False
        self._store.let_go(self, self.blocks)

    # --- what persist() writes ---------------------------------------------------------------------

    @property
    def tail(self) -> PageId | None:
        """The part-filled last page, if there is one."""
        return PageId.of(self.parent, self._rest, len(self.pages)) if self._rest else None

    def new_parts(self) -> list[PageId]:
        """Pages and tail after those it found: they supersede older tails."""
        parts = self.pages[self._kept_pages :]
        return [*parts, self.tail] if self.tail else parts

    def _count_prefix(self) -> None:
        rest = len(self._rest) // TOKEN_BYTES
        self._kept_pages = len(self.pages)
        self.block_table[:] = [block.number for block in self.blocks]
        self.length = self._kept_pages * BLOCK_TOKENS + rest
        self.restored = sum(BLOCK_TOKENS if p < self._kept_pages else rest for p in self._brought)
        self.reused = self.length - self.restored
        self.ready = not self._waiting
