"""What bringing a page back costs and what computing it again costs, as measured, and which is less. Pure but for a
lock and a clock that is handed in.

Restoring has one rate a tier: seconds a byte, over the time in which at least one read of that tier was under way, so
reads that run side by side are not counted twice. Computing a token at position p takes a + b*p seconds: a for the
layers, b for attention over what comes before. Both forget: the last few dozen samples decide.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence

from .evict import DEFAULT_SLOPE, relative_cost
from .keys import PageId

PAGE_DECAY = 31 / 32  # weight of older pages when one more was read
PASS_DECAY = 15 / 16
OUTLIER = 8.0  # a sample this many times over the estimate counts as this many: one hiccup decides nothing
LEAST_SAMPLES = 4  # pages read, or
LEAST_TOKENS = 256  # tokens computed, before there is an estimate
STALE_S = 30.0  # without a sample for so long, an estimate is put to the test
STALE_PAGES = 2.0  # and weighs as much as this many pages
PROBE_PAGES = 4  # read for that


class RestoreRate:
    """One tier's. Not thread-safe."""

    def __init__(self) -> None:
        self._seconds = self._bytes = self._pages = 0.0  # sums that decay
        self._samples = 0
        self._active = 0
        self._since = 0.0  # up to here the time has been charged
        self._last = 0.0  # when a page was last read

    @property
    def seconds_per_byte(self) -> float | None:
        """None: not known yet."""
        return self._seconds / self._bytes if self._samples >= LEAST_SAMPLES else None

    def begin(self, now: float) -> None:
        """A read starts."""
        if not self._active:
            self._since = now
            if self.stale(now) and self._pages > STALE_PAGES:
                self._scale(STALE_PAGES / self._pages)
        self._active += 1

    def end(self, now: float, size: int, pages: int) -> None:
        """A read of `pages` pages of `size` bytes ends; 0: it failed. It is charged the time since the one before it
        ended."""
        self._active -= 1
        seconds, self._since = now - self._since, now
        if not pages:
            return
        size *= pages
        if known := self.seconds_per_byte:  # 0 too, if the clock stood still, is no bound
            seconds = min(seconds, OUTLIER * known * size)
        self._scale(PAGE_DECAY**pages)
        self._seconds, self._bytes, self._pages = self._seconds + seconds, self._bytes + size, self._pages + pages
        self._samples += pages
        self._last = now

    def stale(self, now: float) -> bool:
        """Whether nothing was read for so long that the rate may be another one by now."""
        return now - self._last > STALE_S

    def _scale(self, factor: float) -> None:
        self._seconds, self._bytes, self._pages = (factor * x for x in (self._seconds, self._bytes, self._pages))


class PrefillRate:
    """Seconds of a token at position p as a + b*p: least squares over recent passes, weighted by tokens. While all
    passes lie at about one position, b is the default share of a."""

    def __init__(self) -> None:
        self._w = self._x = self._y = self._xx = self._xy = 0.0  # weight and weighted sums, which decay
        self._tokens = 0

    def note(self, tokens: int, position: int, seconds: float) -> None:
        """`tokens` at [position, position + tokens) took so long."""
        x, y = position + tokens / 2, seconds / tokens
        if self.known:
            y = min(y, OUTLIER * sum(f * g for f, g in zip(self.coefficients, (1.0, x), strict=True)))
        sums = (self._w, self._x, self._y, self._xx, self._xy)
        new = (tokens, tokens * x, tokens * y, tokens * x * x, tokens * x * y)
        decayed = (PASS_DECAY * old + value for old, value in zip(sums, new, strict=True))
        self._w, self._x, self._y, self._xx, self._xy = decayed
        self._tokens += tokens

    @property
    def known(self) -> bool:
        """Whether enough was computed."""
        return self._tokens >= LEAST_TOKENS

    @property
    def coefficients(self) -> tuple[float, float]:
        """(a, b) in seconds and seconds a position, neither negative. Only when known."""
        x, y = self._x / self._w, self._y / self._w
        spread = self._xx / self._w - x * x
        if spread < LEAST_TOKENS**2:
            a = y / (1 + DEFAULT_SLOPE * x)
            return a, DEFAULT_SLOPE * a
        b = min(max(0.0, (self._xy / self._w - x * y) / spread), y / x)
        return max(0.0, y - b * x), b

    def seconds(self, first: int, last: int) -> float:
        """To compute tokens [first, last). Only when known."""
        a, b = self.coefficients
        return (last - first) * (a + b * (first + last) / 2)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Use `pages` pages of the prefix. Reading those after them would take `restore_s`, computing their tokens takes
    `compute_s`; 0 when all are used."""

    pages: int
    restore_s: float = 0.0
    compute_s: float = 0.0


def cheapest(restore_s: Sequence[float], tokens: Sequence[int], compute_s: Callable[[int, int], float]) -> Choice:
    """How many pages of a prefix to use so that reading them and computing the rest takes least; of equals the most.
    `restore_s`: of each page, 0 where it is at hand. `tokens`: how many it gives. `compute_s(first, last)`."""
    total = sum(tokens)
    best, least, read, position = 0, compute_s(0, total), 0.0, 0
    for number, (seconds, count) in enumerate(zip(restore_s, tokens, strict=True), 1):
        read, position = read + seconds, position + count
        if (needed := read + compute_s(position, total)) <= least:
            best, least = number, needed
    if best == len(tokens):
        return Choice(best)
    return Choice(best, sum(restore_s[best:]), compute_s(sum(tokens[:best]), total))


class Rates:
    """What a store has measured. Thread-safe: its readers report here too."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: seconds that only grow."""
        self._clock = clock
        self._lock = threading.Lock()
        self._tiers: dict[str, RestoreRate] = {}
        self._probed: dict[str, float] = {}
        self.prefill = PrefillRate()

    @contextlib.contextmanager
    def restoring(self, tier: str, size: int, pages: int = 1) -> Iterator[None]:
        """Measures one read of `pages` pages of `size` bytes. One that raises counts for nothing."""
        with self._lock:
            rate = self._tiers.setdefault(tier, RestoreRate())
            rate.begin(self._clock())
        done = 0
        try:
            yield
            done = pages
        finally:
            with self._lock:
                rate.end(self._clock(), size, done)

    def restore_s(self, tier: str, size: int) -> float | None:
        """Seconds to bring `size` bytes from a tier. None: not known yet."""
        with self._lock:
            known = self._tiers[tier].seconds_per_byte if tier in self._tiers else None
        return None if known is None else known * size

    @property
    def slope(self) -> float:
        """By how much of itself the time of a token grows with each position: b / a."""
        if not self.prefill.known:
            return DEFAULT_SLOPE
        a, b = self.prefill.coefficients
        return b / a if a else DEFAULT_SLOPE

    def page_cost(self, page: PageId) -> float:
        """What computing a page takes, for eviction: only ratios mean something."""
        return relative_cost(page, self.slope)

    def choose(self, pages: Sequence[tuple[str, int]], size: int) -> Choice:
        """How many of a prefix's pages to use: for each its tier and tokens, `size` bytes a page. Pages in the device
        pool are at hand; what has no rate yet is used. From a tier that was not read for STALE_S, PROBE_PAGES more than
        is best are read, at most once in STALE_S: a rate that was bad for a while is not believed for ever."""
        if not self.prefill.known:
            return Choice(len(pages))
        costs = [self.restore_s(tier, size) or 0.0 for tier, _ in pages]
        choice = cheapest(costs, [count for _, count in pages], self.prefill.seconds)
        if choice.pages < len(pages) and self._probe(pages[choice.pages][0]):
            return dataclasses.replace(choice, pages=min(choice.pages + PROBE_PAGES, len(pages)))
        return choice

    def _probe(self, tier: str) -> bool:
        now = self._clock()
        with self._lock:
            rate = self._tiers.get(tier)
            if rate is None or not rate.stale(now) or now - self._probed.get(tier, -STALE_S) < STALE_S:
                return False
            self._probed[tier] = now
            return True
