"""Monotonic counts and the last thing that went wrong, shared by threads."""

from __future__ import annotations

import threading
from collections import Counter


class Counters:
    """Named counts plus short warnings for a person. Thread-safe."""

    KEEP = 20

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._warnings: list[str] = []

    def add(self, name: str, amount: int = 1) -> None:
        """Raises a count."""
        with self._lock:
            self._counts[name] += amount

    def warn(self, text: str) -> None:
        """Keeps a warning once; the oldest make room for new ones."""
        with self._lock:
            if text not in self._warnings:
                self._warnings = [*self._warnings[-self.KEEP + 1 :], text]

    def counts(self) -> dict[str, int]:
        """All counts by name."""
        with self._lock:
            return dict(self._counts)

    def warnings(self) -> list[str]:
        """The latest warnings, oldest first."""
        with self._lock:
            return list(self._warnings)
