"""One running sequence: its blocks, its length, and the chain of keys that grows with it. Engine thread only."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from typing import TYPE_CHECKING

from .base import AWAY, BLOCK_TOKENS, Table, Ticket
from .block import Block, State
from .held import Held
from .keys import PACKED_BYTES, TOKEN_BYTES, PageId, pack

if TYPE_CHECKING:
    from .store import TieredStore


class Sequence:
    """See KVSequence. Blocks [0, length // 64) are SEALED or away; a part-filled last one is OPEN and this sequence's
    alone. At each position there is a block, or a page held in a lower tier, or neither where the page lies before
    every layer's window."""

    def __init__(self, store: TieredStore, root: bytes, *, durable: bool) -> None:
        self._store = store
        self.durable = durable
        self.blocks: list[Block | None] = []
        self.away: dict[int, Held] = {}
        self.pages: list[PageId] = []  # of the sealed blocks
        self._root = root
        self._rest = b""  # packed tokens after the last full page
        self._waiting: set[int] = set()  # positions of pages being read
        self._brought: set[int] = set()  # positions that came from the host tier or disk
        self._past = 0  # pages before this are not needed and not kept
        self._kept_pages = 0  # pages there were at the start: older tails can follow these
        self.released = False
        self.block_table: list[int] = []
        self.length = self.reused = self.restored = 0
        self.reset_reason = ""
        self.ready = False

    @property
    def tables(self) -> tuple[Table, ...]:
        """See KVSequence."""
        return (Table(self.block_table, self.away),)

    @property
    def parent(self) -> bytes:
        """Key that the next page follows."""
        return self.pages[-1].key if self.pages else self._root

    # --- used by the store -------------------------------------------------------------------------

    def begin(self, blocks: list[Block | None], pages: list[PageId], rest: bytes, waiting: set[int]) -> None:
        """Takes the prefix that was found: a block or (away) None for each page, and a block for `rest` if that is not
        empty. The pages at the positions `waiting` are being read."""
        self.blocks, self.pages, self._rest = blocks, pages, rest
        self._brought, self._waiting = set(waiting), waiting
        self._count_prefix()

    def filled(self, block: Block, reason: str) -> None:
        """A block it waits for is filled, or (with a reason) never will be: then the prefix ends before it."""
        self._arrived(self.blocks.index(block), reason)

    def held(self, position: int, held: Held | None, reason: str) -> None:
        """A page that stays away can be read where it lies, or (with a reason) not: then the prefix ends before it."""
        if held is not None:
            self.away[position] = held
        self._arrived(position, reason)

    def _arrived(self, position: int, reason: str) -> None:
        self._waiting.discard(position)
        self.ready = not self._waiting
        if reason:
            self._cut(position, reason)

    def _cut(self, position: int, reason: str) -> None:
        if self._store.layout.window:
            position = 0  # the pages that a shorter prefix needs were not asked for
        self.reset_reason = f"{reason}: recomputing from token {position * BLOCK_TOKENS}"
        dropped, self.blocks = self.blocks[position:], self.blocks[:position]
        self.pages, self._rest = self.pages[:position], b""
        self._waiting = {p for p in self._waiting if p < position}
        self._brought = {p for p in self._brought if p < position}
        self._count_prefix()
        self._store.let_go(self, dropped, self._take_away(position))

    def _take_away(self, position: int) -> list[Held]:
        """The pages held from `position` on, which are this sequence's no longer."""
        return [self.away.pop(p) for p in sorted(self.away) if p >= position]

    def in_pool(self) -> list[int]:
        """Positions of full pages that are in blocks, the last first; none before it is ready."""
        if not self.ready:
            return []
        return [
            p
            for p in range(len(self.pages) - 1, -1, -1)
            if (block := self.blocks[p]) is not None and block.state is State.SEALED
        ]

    def number_at(self, position: int) -> int:
        """Of the block at a position."""
        return self._own(position).number

    def send_away(self, position: int, held: Held) -> Block:
        """From now on the page at `position` is read where `held` has it. Returns its block, to be released."""
        block = self.blocks[position]
        if block is None:
            raise ValueError(f"the page at {position} is away already")
        self.blocks[position], self.block_table[position], self.away[position] = None, AWAY, held
        return block

    # --- KVSequence --------------------------------------------------------------------------------

    def reserve(self, count: int) -> None:
        """Makes room to append `count` tokens. Raises OutOfBlocks, changing nothing; ValueError before it is ready."""
        if not self.ready:
            raise ValueError("only a ready sequence can be appended to")
        needed = -(-(self.length + count) // BLOCK_TOKENS) - len(self.blocks)
        if needed > 0:
            blocks = self._store.take(needed)
            self.blocks += blocks
            self.block_table += [block.number for block in blocks]

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
            self._store.seal(self, self._own(len(self.pages) - 1), page)
        self._drop_past()

    def _drop_past(self) -> None:
        """Lets go of the pages that lie before every layer's window."""
        needed = min(self.first_needed, len(self.pages))
        for position in range(self._past, needed):
            block, held = self.blocks[position], self.away.pop(position, None)
            self.blocks[position], self.block_table[position] = None, AWAY
            self._store.let_past(block, held)
        self._past = max(self._past, needed)

    @property
    def first_needed(self) -> int:
        """The first page that is needed from now on, and by who goes on after the last full page."""
        return self._store.layout.first_needed(len(self.pages) * BLOCK_TOKENS)

    def persist(self) -> Ticket:
        """Writes the tail and whatever else of the chain is not on disk. Nothing may be appended afterwards."""
        return self._store.persist_sequence(self)

    def release(self) -> None:
        """Drops the references; pages and tail stay as cache entries. Idempotent."""
        if self.released:
            return
        tail = None if self._waiting else self.tail
        if tail is not None and not self._store.pool.covers(tail):
            self._store.pool.seal(self._own(len(self.pages)), tail)
        self.released, self.ready = True, False
        self._store.let_go(self, self.blocks, self._take_away(0))

    def _own(self, position: int) -> Block:
        block = self.blocks[position]
        if block is None:
            raise ValueError(f"the page at {position} is away: nothing can be written to it")
        return block

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
        self._past = 0
        self._kept_pages = len(self.pages)
        self.block_table[:] = [AWAY if block is None else block.number for block in self.blocks]
        self.length = self._kept_pages * BLOCK_TOKENS + rest
        self.restored = sum(BLOCK_TOKENS if p < self._kept_pages else rest for p in self._brought)
        self.reused = self.length - self.restored
        self.ready = not self._waiting
