"""The device pool's blocks: who holds which, what is cached, what is evicted first. Pure.

    FREE ──take──► OPEN ──seal──► SEALED ──(no reference, evicted)──► FREE
                    ▲ ╰─(no reference)─► FREE   │
                    ╰────────reopen: a tail, unreferenced──────────────╯

A reference is held by each running sequence, by each queued write and by the read that fills a block. A block being
filled is OPEN and already registered, so that a second sequence shares it instead of reading the page again.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable

from .base import OutOfBlocks
from .evict import EvictionOrder, Lru, Policy
from .keys import PageId


class State(enum.Enum):
    FREE = "free"
    OPEN = "open"
    SEALED = "sealed"


@dataclasses.dataclass(slots=True, eq=False)
class Block:
    """One slot of the device slabs. `page` names its content once it is sealed or being filled."""

    number: int
    state: State = State.FREE
    refs: int = 0
    page: PageId | None = None
    registered: bool = False  # found by its key; a second copy of the same page is not
    filling: bool = False  # its bytes are being read


class BlockPool:
    """All blocks. `on_evict` is called with a SEALED block's number and page just before it becomes FREE."""

    def __init__(self, count: int, on_evict: Callable[[int, PageId], None], policy: Policy | None = None) -> None:
        self.blocks = [Block(number) for number in range(count)]
        self._on_evict = on_evict
        self._free = list(reversed(self.blocks))
        self._idle = EvictionOrder(policy or Lru())  # pages that are SEALED and registered without reference
        self._registered: dict[bytes, Block] = {}
        self._followers: dict[bytes, dict[bytes, Block]] = {}

    @property
    def available(self) -> int:
        """Blocks that take() could give now."""
        return len(self._free) + len(self._idle)

    def find(self, page: PageId) -> Block | None:
        """The block of exactly this page (key, parent, tokens), sealed or being filled."""
        block = self._registered.get(page.key)
        return block if block is not None and block.page == page else None

    def find_key(self, key: bytes) -> Block | None:
        """The block registered under `key`, sealed or being filled."""
        return self._registered.get(key)

    def followers(self, parent: bytes) -> list[Block]:
        """Sealed blocks whose page comes right after `parent`."""
        return [block for block in self._followers.get(parent, {}).values() if block.state is State.SEALED]

    def take(self, count: int) -> list[Block]:
        """`count` OPEN blocks with one reference each, evicting as the policy says. Raises OutOfBlocks, changing
        nothing."""
        if count > self.available:
            raise OutOfBlocks(f"{count} blocks wanted, {self.available} of {len(self.blocks)} can be had")
        while len(self._free) < count:
            self._evict()
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            block.state, block.refs = State.OPEN, 1
        return taken

    def acquire(self, block: Block) -> None:
        """One more reference."""
        if block.refs == 0:
            self._leave_idle(block)
        block.refs += 1

    def release(self, block: Block) -> None:
        """One reference less. The last one makes a registered page the newest cache entry, anything else FREE."""
        if block.refs <= 0:
            raise ValueError(f"block {block.number} has no reference")
        block.refs -= 1
        if block.refs:
            return
        if block.state is State.SEALED and block.registered and block.page is not None:
            self._idle.add(block.page)
        else:
            self._make_free(block)

    def register(self, block: Block, page: PageId) -> bool:
        """Lets a referenced block be found as `page`, to be filled or just sealed. False: another block already is."""
        block.page = page
        if page.key in self._registered:
            return False
        block.registered = True
        self._registered[page.key] = block
        self._followers.setdefault(page.parent, {})[page.key] = block
        return True

    def seal(self, block: Block, page: PageId, *, supersede: bool = True) -> bool:
        """OPEN to SEALED. Unreferenced tails whose tokens this page begins with become FREE, unless `supersede` is
        False. False: another block holds the same page, and this one won't outlive its references."""
        block.state = State.SEALED
        if not block.registered and not self.register(block, page):
            return False
        if supersede:
            self._supersede(page)
        return True

    def covers(self, page: PageId) -> bool:
        """Whether a sealed block holds this page's tokens and more, after the same parent."""
        pages = (block.page for block in self.followers(page.parent))
        return any(other is not None and other.packed.startswith(page.packed) for other in pages)

    def reopen(self, block: Block) -> bool:
        """Takes an unreferenced tail over to append to it: SEALED to OPEN, one reference. False: someone holds it."""
        if block.refs or block.page is None or not block.page.is_tail:
            return False
        self._leave_idle(block)
        self._unregister(block)
        block.state, block.refs, block.page = State.OPEN, 1, None
        return True

    def abandon(self, block: Block) -> None:
        """A block that was to be filled is not going to be: it can't be found any more and ends with its references."""
        self._unregister(block)
        block.page = None

    def forget(self, block: Block) -> bool:
        """Frees an unreferenced cached page at once. False: it is referenced."""
        if not self._is_idle(block):
            return False
        self._leave_idle(block)
        self._make_free(block)
        return True

    def counts(self) -> tuple[int, int, int, int]:
        """(total, free, open, sealed)."""
        open_ = sum(block.state is State.OPEN for block in self.blocks)
        sealed = sum(block.state is State.SEALED for block in self.blocks)
        return len(self.blocks), len(self._free), open_, sealed

    def check(self) -> None:
        """Raises AssertionError when lists, states and references disagree."""
        total, free, open_, sealed = self.counts()
        if free + open_ + sealed != total:
            raise AssertionError(f"device pool: {free} free + {open_} open + {sealed} sealed != {total}")
        for block in self.blocks:
            idle = self._is_idle(block)
            if block.refs < 0 or (block.refs == 0) != (idle or block.state is State.FREE):
                raise AssertionError(f"device pool: {block} is {'' if idle else 'not '}idle")
            if block.registered and (block.page is None or self._registered.get(block.page.key) is not block):
                raise AssertionError(f"device pool: {block} is not registered")
        if len(self._registered) != sum(block.registered for block in self.blocks):
            raise AssertionError("device pool: keys of blocks that hold no page")
        if len(self._idle) != sum(map(self._is_idle, self.blocks)):
            raise AssertionError("device pool: pages to evict that no block holds")
        self._idle.check()

    def _evict(self) -> None:
        (key,) = self._idle.victims(1, lambda key: False)
        block = self._registered[key]
        if block.page is not None:
            self._on_evict(block.number, block.page)
        self._leave_idle(block)
        self._make_free(block)

    def _is_idle(self, block: Block) -> bool:
        return block.registered and block.page is not None and block.refs == 0 and block.page.key in self._idle

    def _leave_idle(self, block: Block) -> None:
        if block.page is not None:
            self._idle.remove(block.page.key)

    def _make_free(self, block: Block) -> None:
        self._unregister(block)
        block.state, block.page = State.FREE, None
        self._free.append(block)

    def _unregister(self, block: Block) -> None:
        if not block.registered or block.page is None:
            return
        block.registered = False
        del self._registered[block.page.key]
        family = self._followers[block.page.parent]
        del family[block.page.key]
        if not family:
            del self._followers[block.page.parent]

    def _supersede(self, page: PageId) -> None:
        for other in self.followers(page.parent):
            shorter = other.page is not None and other.page.is_tail and other.page.count < page.count
            if shorter and other.page is not None and page.packed.startswith(other.page.packed):
                self.forget(other)
