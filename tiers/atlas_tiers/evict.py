"""Which page a tier gives up first. Pure; the caller holds the tier's lock.

A page is of no use without those before it, so only the end of a chain, a page that none here follows, is ever a
candidate. Among those a policy decides: LRU by the last use alone, GDSF (greedy dual size frequency; Cherkasova 1998)
by

    worth = clock + uses * recompute seconds / bytes      clock: the worth of the last page that went

so a page that nobody uses sinks against newer ones, slowly if it is used often or expensive. All pages of a tier have
one size and only ratios matter, so bytes are left out and seconds are those of a token at position 0.

Where every layer has a window (`chained` is False) a page is of use without those far before it, and they are what
nobody misses: then every page is a candidate.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from .base import BLOCK_TOKENS
from .keys import PageId

POLICIES = ("lru", "gdsf")
DEFAULT_SLOPE = 1 / 4096  # attention over 4,096 tokens costs about what the rest of a token does
USES_KEPT = 1 << 17  # pages whose uses are counted
MOST_USES = 15  # more count as this many
APART = 64  # requests between two uses that count: an editor's burst is one use
SLACK = 64  # heap entries beyond two a page before the heap is made again


class Policy(Protocol):
    """Ranks the pages of one tier. Of equal worth the least recently used goes first. `chained`: a page is of no use
    without all those before it."""

    chained: bool

    def worth(self, page: PageId) -> float:
        """What a page is worth from the use that is made of it now."""
        ...

    def evicted(self, worth: float) -> None:
        """A page of this worth is given up."""
        ...


class Lru:
    """Every page is worth the same, so the last use decides."""

    def __init__(self, *, chained: bool = True) -> None:
        self.chained = chained

    def worth(self, page: PageId) -> float:
        return 0.0

    def evicted(self, worth: float) -> None:
        return


class Gdsf:
    """See the top of this file. `cost`: recompute seconds of a page, in any unit."""

    def __init__(self, uses: Uses, cost: Callable[[PageId], float], *, chained: bool = True) -> None:
        self._uses, self._cost, self.chained = uses, cost, chained
        self._clock = 0.0

    def worth(self, page: PageId) -> float:
        return self._clock + self._uses.count(page.key) * self._cost(page)

    def evicted(self, worth: float) -> None:
        self._clock = max(self._clock, worth)


class Uses:
    """How often pages were used, over all tiers and also when they are gone. In memory only. When more than `limit`
    pages are counted all counts are halved. Written by one thread, read by any."""

    def __init__(self, limit: int = USES_KEPT) -> None:
        self._limit = limit
        self._counts: dict[bytes, tuple[int, int]] = {}  # uses, and the request that was counted last
        self._request = 0

    def add(self, keys: Iterable[bytes]) -> None:
        """A request uses pages that were there. Counted once in APART requests."""
        self._request += 1
        for key in keys:
            count, last = self._counts.get(key, (1, -APART))
            if self._request - last >= APART:
                self._counts[key] = min(count + 1, MOST_USES), self._request
        if len(self._counts) > self._limit:
            self._counts = {key: (count // 2, last) for key, (count, last) in self._counts.items() if count > 3}

    def count(self, key: bytes) -> int:
        """At least 1: the page was computed."""
        return self._counts.get(key, (1, 0))[0]


def make_policy(name: str, uses: Uses, cost: Callable[[PageId], float], *, chained: bool = True) -> Policy:
    """A policy of its own for one tier. Raises ValueError for a name that is not in POLICIES."""
    if name not in POLICIES:
        raise ValueError(f"eviction policy {name!r} is not one of {', '.join(POLICIES)}")
    return Lru(chained=chained) if name == "lru" else Gdsf(uses, cost, chained=chained)


def relative_cost(page: PageId, slope: float = DEFAULT_SLOPE) -> float:
    """Time to compute a page's tokens, in that of a token at position 0, if a token's grows by `slope` a position."""
    return page.count * (1 + slope * (page.depth * BLOCK_TOKENS + page.count / 2))


def depths(parents: Mapping[bytes, bytes]) -> dict[bytes, int]:
    """From each page's key and its parent's: pages before it. A chain whose beginning is missing counts from there."""
    known: dict[bytes, int] = {}
    for key in parents:
        path: list[bytes] = []
        while key in parents and key not in known:
            known[key] = -1  # also ends a ring, which only a forged index has
            path.append(key)
            key = parents[key]
        depth = known.get(key, -1)
        for key in reversed(path):
            depth += 1
            known[key] = depth
    return known


@dataclasses.dataclass(slots=True, eq=False)
class _Node:
    page: PageId
    worth: float
    tick: int  # of the last use
    queued: bool = False  # in the heap, perhaps with an older worth
    gone: bool = False


class EvictionOrder:
    """Pages that may be given up, in order. Everything takes O(log n) a page, amortized.

    The heap holds each page that nothing follows once, or `_fresh` does until somebody asks. What has changed since is
    put right when it comes up: a page used meanwhile goes back with its new worth, one that got a follower is left out
    until the last follower goes.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._nodes: dict[bytes, _Node] = {}
        self._followers: Counter[bytes] = Counter()  # members by parent
        self._heap: list[tuple[float, int, _Node]] = []
        self._fresh: list[_Node] = []  # most get a follower soon: not worth sorting in
        self._tick = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, key: bytes) -> bool:
        return key in self._nodes

    def add(self, page: PageId) -> None:
        """Takes in a page, as used now."""
        self._tick += 1
        self._attach(_Node(page, self._policy.worth(page), self._tick))

    def use(self, key: bytes) -> None:
        """A page is used now. The heap learns of it later: worth only grows."""
        node = self._nodes[key]
        self._tick += 1
        node.worth, node.tick = max(node.worth, self._policy.worth(node.page)), self._tick

    def remove(self, key: bytes) -> None:
        """Takes a page out, wherever in its chain it is."""
        self._detach(self._nodes[key])
        if len(self._heap) + len(self._fresh) > 2 * len(self._nodes) + SLACK:
            self._fresh = [node for node in self._fresh if not node.gone]
            self._heap = [item for item in self._heap if not item[2].gone]
            heapq.heapify(self._heap)

    def victims(self, count: int, held: Callable[[bytes], bool]) -> list[bytes]:
        """The first `count` pages in order that are not `held`, for the caller to remove. Held pages at the end of a
        chain are passed over, and the pages before them too unless nothing else is left."""
        chosen: list[_Node] = []
        passed: list[_Node] = []
        while len(chosen) < count and (node := self._pop()) is not None:
            if held(node.page.key):
                passed.append(node)
            else:
                self._choose(node, chosen)
        for leaf in passed if self._policy.chained else []:
            before = self._nodes.get(leaf.page.parent)
            while before is not None and len(chosen) < count:
                if not held(before.page.key):
                    self._choose(before, chosen)
                before = self._nodes.get(before.page.parent)
        for node in reversed(chosen):
            node.gone = False
            self._attach(node)
        for node in passed:
            self._queue(node)
        return [node.page.key for node in chosen]

    def check(self) -> None:
        """Raises AssertionError when a page that nothing follows could not be found."""
        ends = {key for key, node in self._nodes.items() if self._is_end(node)}
        queued = [*self._fresh, *(node for _, _, node in self._heap)]
        if not ends <= {node.page.key for node in queued if not node.gone}:
            raise AssertionError("eviction order: a page at the end of its chain is in no queue")

    def _choose(self, node: _Node, chosen: list[_Node]) -> None:
        chosen.append(node)
        self._policy.evicted(node.worth)
        self._detach(node)

    def _attach(self, node: _Node) -> None:
        self._nodes[node.page.key] = node
        self._followers[node.page.parent] += 1
        if self._is_end(node):
            self._queue(node)

    def _detach(self, node: _Node) -> None:
        node.gone = True
        del self._nodes[node.page.key]
        parent = node.page.parent
        self._followers[parent] -= 1
        if not self._followers[parent]:
            del self._followers[parent]
            if parent in self._nodes:
                self._queue(self._nodes[parent])

    def _queue(self, node: _Node) -> None:
        if not node.queued:
            node.queued = True
            self._fresh.append(node)

    def _pop(self) -> _Node | None:
        """The next member that nothing follows."""
        for node in self._fresh:
            self._push(node)
        self._fresh.clear()
        while self._heap:
            _, tick, node = heapq.heappop(self._heap)
            if tick != node.tick:
                self._push(node)
            elif self._is_end(node):
                node.queued = False
                return node
            else:
                node.queued = False
        return None

    def _push(self, node: _Node) -> None:
        node.queued = self._is_end(node)
        if node.queued:
            heapq.heappush(self._heap, (node.worth, node.tick, node))

    def _is_end(self, node: _Node) -> bool:
        return not node.gone and not (self._policy.chained and self._followers.get(node.page.key))
