"""Where the K/V of a chain of tokens lies: a count by tier, from memory alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .block import BlockPool
from .catalog import Catalog
from .keys import PageId, common_tokens

NOWHERE = "nowhere"


def count_by_tier(
    pages: Iterable[PageId],
    pool: BlockPool,
    growing: Sequence[PageId],
    tiers: Sequence[Catalog[Any]],
) -> dict[str, int]:
    """Tokens of `pages` by the fastest tier that holds them ("device" first, then `tiers` in order), the others under
    NOWHERE: the counts add up to the pages' tokens. `growing` are
    the part-filled pages that running sequences append to. A page that is nowhere as a whole counts as far as another
    page after the same parent agrees with it: that much of it is used when the chain is opened."""
    counts = dict.fromkeys(["device", *(tier.name for tier in tiers), NOWHERE], 0)
    for page in pages:
        name = _tier_of(page, pool, tiers)
        if name is not None:
            counts[name] += page.count
            continue
        used, name = _part_of(page, pool, growing, tiers)
        counts[name] += used
        counts[NOWHERE] += page.count - used
    return counts


def _tier_of(page: PageId, pool: BlockPool, tiers: Sequence[Catalog[Any]]) -> str | None:
    block = pool.find(page)
    if block is not None and not block.filling:
        return "device"
    return next((tier.name for tier in tiers if tier.holds(page)), None)


def _part_of(
    page: PageId, pool: BlockPool, growing: Sequence[PageId], tiers: Sequence[Catalog[Any]]
) -> tuple[int, str]:
    """(tokens of the page that another one shares, where that one lies)."""
    sealed = [block.page for block in pool.followers(page.parent) if block.page is not None]
    held = [("device", other) for other in [*sealed, *(part for part in growing if part.parent == page.parent)]]
    held += [(tier.name, other) for tier in tiers for other in tier.followers(page.parent)]
    shared = [(common_tokens(other.packed, page.packed), name) for name, other in held]
    return max(shared, key=lambda item: item[0], default=(0, NOWHERE))  # the first of equals: the fastest tier
