"""Where sessions' pages are, counted between forward passes without holding them up. No torch."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable

from atlas_tiers.base import KVStore

from .messages import Locate, Located

STEP_S = 0.002  # of counting after which the next forward pass has its turn


class _Count:
    """One LOCATE that is being answered."""

    def __init__(self, message: Locate, raw: bytes) -> None:
        self.message = message
        self.ids = array("I", raw)
        self.start = 0  # of the next session in `ids`
        self.where: list[dict[str, int]] = []

    def next(self) -> array[int]:
        """The token ids of the next session."""
        end = self.start + self.message.counts[len(self.where)]
        ids, self.start = self.ids[self.start : end], end
        return ids

    @property
    def done(self) -> bool:
        return len(self.where) == len(self.message.counts)


class Census:
    """Answers LOCATE, one session after the other. Main thread only, as the store is."""

    def __init__(self, store: KVStore, send: Callable[[Located], None]) -> None:
        self._store = store
        self._send = send
        self._waiting: deque[_Count] = deque()

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def add(self, message: Locate, raw: bytes) -> None:
        """Takes a question in."""
        self._waiting.append(_Count(message, raw))

    def step(self) -> None:
        """Counts for STEP_S, and the one session longer that was begun by then."""
        end = time.monotonic() + STEP_S
        while self._waiting and time.monotonic() < end:
            count = self._waiting[0]
            if not count.done:
                count.where.append(self._store.locate(count.next(), count.message.owner))
            if count.done:
                self._waiting.popleft()
                self._send(Located(count.message.rid, count.where))
