"""Monotonic counts, times and the last thing that went wrong, shared by threads."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable


class Counters:
    """Named counts plus short warnings for a person. Thread-safe."""

    KEEP = 20

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._warnings: list[str] = []
        self._gauges: dict[str, Callable[[], int]] = {}

    def add(self, name: str, amount: int = 1) -> None:
        """Raises a count."""
        with self._lock:
            self._counts[name] += amount

    def warn(self, text: str) -> None:
        """Keeps a warning once; the oldest make room for new ones."""
        with self._lock:
            if text not in self._warnings:
                self._warnings = [*self._warnings[-self.KEEP + 1 :], text]

    def gauge(self, name: str, value: Callable[[], int]) -> None:
        """Something that may fall, too: asked whenever the counts are. `value` must not count anything itself."""
        self._gauges[name] = value

    def counts(self) -> dict[str, int]:
        """All counts and gauges by name."""
        gauges = {name: value() for name, value in self._gauges.items()}
        with self._lock:
            return dict(self._counts) | gauges

    def warnings(self) -> list[str]:
        """The latest warnings, oldest first."""
        with self._lock:
            return list(self._warnings)


class Meter:
    """`with meter:` counts the microseconds in which at least one thread is inside, so that bytes / time is what the
    threads move together. Thread-safe."""

    def __init__(self, counters: Counters, name: str) -> None:
        self._counters, self._name = counters, name
        self._lock = threading.Lock()
        self._inside = 0
        self._counted_ns = 0  # up to here

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._counted_ns = time.perf_counter_ns()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            passed_us = (time.perf_counter_ns() - self._counted_ns) // 1000
            self._counted_ns += 1000 * passed_us
        self._counters.add(self._name, passed_us)


class DailyBytes:
    """How much was written on this day, in UTC. Thread-safe."""

    DAY_S = 86_400

    def __init__(self, day: int, bytes_: int, clock: Callable[[], float] = time.time) -> None:
        """Goes on from `bytes_` if `day` (days since 1970) is today."""
        self._lock = threading.Lock()
        self._clock = clock
        self._day, self._bytes = day, bytes_

    def add(self, amount: int) -> None:
        """Counts bytes."""
        today = self._today()
        with self._lock:
            self._bytes = amount + (self._bytes if self._day == today else 0)
            self._day = today

    def today(self) -> int:
        """Bytes so far today."""
        return self.record()[1]

    def record(self) -> tuple[int, int]:
        """(day, bytes): what to go on from after a restart."""
        today = self._today()
        with self._lock:
            return today, self._bytes if self._day == today else 0

    def _today(self) -> int:
        return int(self._clock() // self.DAY_S)
