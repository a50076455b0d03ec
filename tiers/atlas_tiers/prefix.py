"""The search for the longest usable prefix over all tiers. Memory only: no disk access, no torch.

What is found is held (blocks referenced, pages pinned) until the sequence has it or `give_up` lets it go.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from .base import BLOCK_TOKENS
from .block import Block, BlockPool, State
from .catalog import Catalog
from .index import Entry
from .keys import PACKED_BYTES, PageId, chain, common_tokens
from .rates import Rates

Sources = list[tuple[Catalog[Any], Entry[Any]]]
FirstNeeded = Callable[[int], int]


@dataclasses.dataclass(slots=True)
class Hit:
    """A page of the prefix: in a block (referenced), in lower tiers (pinned, fastest first), or nowhere (`past`), as a
    page that lies before every layer's window is not needed."""

    page: PageId
    block: Block | None
    sources: Sources

    @property
    def past(self) -> bool:
        """Whether it is not needed."""
        return self.block is None and not self.sources

    @property
    def tier(self) -> str:
        """Name of the fastest tier that has it; not for a past one."""
        return "device" if self.block is not None else self.sources[0][0].name


@dataclasses.dataclass(slots=True)
class TailHit:
    """The page after the full ones, of which `used` tokens agree. `owned`: its block was taken over, not copied."""

    hit: Hit
    used: int
    owned: bool


@dataclasses.dataclass(slots=True)
class Prefix:
    """Full pages in order, then perhaps a part of one more."""

    hits: list[Hit]
    tail: TailHit | None

    @property
    def pages(self) -> list[Hit]:
        """The full pages that are needed and the one of the tail."""
        needed = [hit for hit in self.hits if not hit.past]
        return [*needed, self.tail.hit] if self.tail else needed

    @property
    def length(self) -> int:
        """Tokens."""
        return BLOCK_TOKENS * len(self.hits) + (self.tail.used if self.tail else 0)

    @property
    def blocks_needed(self) -> int:
        """Fresh blocks: for every page to be read, and for a tail that is read or copied."""
        return self.pages_needed + (self.tail is not None and not self.tail.owned)

    @property
    def pages_needed(self) -> int:
        """Full pages that are wanted and in no block."""
        return sum(hit.block is None and not hit.past for hit in self.hits)

    def leave_out_slow(self, rates: Rates, size: int, pool: BlockPool) -> str:
        """Lets go of the pages, of `size` bytes, that are computed faster than they are read; says so, or nothing."""
        pages = [(hit.tier, BLOCK_TOKENS) for hit in self.hits]
        if self.tail is not None:
            pages.append((self.tail.hit.tier, self.tail.used))
        choice = rates.choose(pages, size)
        first = choice.pages
        if first == len(pages):
            return ""
        Prefix(self.hits[first:], self.tail).give_up(pool)
        self.hits, self.tail = self.hits[:first], None
        return (
            f"recomputing from token {first * BLOCK_TOKENS} was faster: about {choice.compute_s:.2f} s, against "
            f"{choice.restore_s:.2f} s to read {len(pages) - first} pages"
        )

    def give_up(self, pool: BlockPool) -> None:
        """Undoes what the search holds."""
        if self.tail is not None and self.tail.owned and self.tail.hit.block is not None:
            pool.seal(self.tail.hit.block, self.tail.hit.page)
        for hit in reversed(self.pages):
            if hit.block is not None:
                pool.release(hit.block)
            for tier, entry in hit.sources:
                tier.unpin(entry)


def longest_prefix(
    root: bytes, packed: bytes, pool: BlockPool, tiers: Sequence[Catalog[Any]], first_needed: FirstNeeded | None = None
) -> Prefix:
    """The longest chain of full pages over all tiers, then the page that shares most tokens with what follows.
    `tiers`: fastest first. `first_needed`: of a model whose layers all have a window, the first page that a sequence
    of so many tokens needs; those before it need not be anywhere."""
    if first_needed is not None:
        return _windowed_prefix(chain(root, packed), root, packed, pool, tiers, first_needed)
    hits: list[Hit] = []
    parent = root
    for start in range(0, len(packed) - PACKED_BYTES + 1, PACKED_BYTES):
        hit = _hold(PageId.of(parent, packed[start : start + PACKED_BYTES], len(hits)), pool, tiers)
        if hit is None:
            break
        hits.append(hit)
        parent = hit.page.key
    rest = packed[len(hits) * PACKED_BYTES :][:PACKED_BYTES]
    return Prefix(hits, _best_tail(parent, rest, pool, tiers))


def _windowed_prefix(
    pages: list[PageId],
    root: bytes,
    packed: bytes,
    pool: BlockPool,
    tiers: Sequence[Catalog[Any]],
    first_needed: FirstNeeded,
) -> Prefix:
    usable = run = 0  # pages; of those up to here, how many in a row are there
    for count, page in enumerate(pages, 1):
        there = pool.find(page) is not None or any(tier.holds(page) for tier in tiers)
        run = run + 1 if there else 0
        if run >= count - first_needed(count * BLOCK_TOKENS):
            usable = count
    hits: list[Hit] = []
    first = first_needed(usable * BLOCK_TOKENS)
    for number, page in enumerate(pages[:usable]):
        hit = Hit(page, None, []) if number < first else _hold(page, pool, tiers)
        if hit is None:  # it went between the two looks
            Prefix(hits, None).give_up(pool)
            return Prefix([], None)
        hits.append(hit)
    rest = packed[usable * PACKED_BYTES :][:PACKED_BYTES]
    return Prefix(hits, _best_tail(pages[usable - 1].key if usable else root, rest, pool, tiers))


def _hold(page: PageId, pool: BlockPool, tiers: Sequence[Catalog[Any]]) -> Hit | None:
    block = pool.find(page)
    if block is not None:
        pool.acquire(block)
        return Hit(page, block, [])
    return _pin(page, tiers)


def _pin(page: PageId, tiers: Sequence[Catalog[Any]]) -> Hit | None:
    sources: Sources = [(tier, entry) for tier in tiers if (entry := tier.pin(page)) is not None]
    return Hit(page, None, sources) if sources else None


def _best_tail(parent: bytes, rest: bytes, pool: BlockPool, tiers: Sequence[Catalog[Any]]) -> TailHit | None:
    if not rest:
        return None
    pages = [block.page for block in pool.followers(parent) if block.page is not None]
    for tier in tiers:
        pages += tier.followers(parent)
    if not pages:
        return None
    best = max(pages, key=lambda page: common_tokens(page.packed, rest))  # the first of equals: the fastest tier
    used = common_tokens(best.packed, rest)
    if not used:
        return None
    block = pool.find(best)
    if block is not None and used == best.count and pool.reopen(block):
        return TailHit(Hit(best, block, []), used, owned=True)
    being_filled = block is not None and block.state is State.OPEN  # nothing to copy yet: read it a second time
    hit = _pin(best, tiers) if being_filled else _hold(best, pool, tiers)
    return TailHit(hit, used, owned=False) if hit else None
