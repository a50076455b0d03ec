"""Asks the engine where sessions' pages are. Nobody waits long for that: without an answer it is not known."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from ..engine.messages import Locate, Located
from .sessions import SessionRecord, Sessions
from .supervisor import Supervisor

MOST_SESSIONS = 32  # located for one request
PATIENCE_S = 1.0  # for the engine's answer: it comes between two forward passes
KEPT_SESSIONS, KEPT_BYTES = 64, 16 * 2**20  # token ids kept, so that `top` does not read the log every second

Where = dict[str, int]  # tokens by tier; empty: not known
Then = Callable[[list[Where]], None]


@dataclasses.dataclass(frozen=True)
class _Asked:
    count: int
    due: float  # CLOCK_MONOTONIC seconds at which it is answered anyway
    then: Then


class Census:
    """Questions on their way to the engine. Used by the broker's loop; `tokens` by the log's thread alone."""

    def __init__(self, engine: Supervisor) -> None:
        self._engine = engine
        self._asked: dict[str, _Asked] = {}
        self._ids = itertools.count(1)
        self._kept: OrderedDict[str, tuple[SessionRecord, bytes]] = OrderedDict()

    def ask(self, owner: str, tokens: Sequence[bytes], then: Then) -> None:
        """Calls `then` with the places of each session's token ids (little-endian uint32): at once when no engine is
        ready, within PATIENCE_S otherwise."""
        if not tokens or not self._engine.ready:
            then([{}] * len(tokens))
            return
        rid = f"locate/{next(self._ids)}"
        self._asked[rid] = _Asked(len(tokens), time.monotonic() + PATIENCE_S, then)
        self._engine.send(Locate(rid, owner, [len(ids) // 4 for ids in tokens]), b"".join(tokens))

    def located(self, message: Located) -> None:
        """LOCATED. An answer that comes too late is dropped."""
        if asked := self._asked.pop(message.rid, None):
            asked.then(message.where)

    def give_up(self, now: float = float("inf")) -> None:
        """Answers what has waited too long; without a time, all of it: the engine died."""
        for rid in [rid for rid, asked in self._asked.items() if now >= asked.due]:
            self.located(Located(rid, [{}] * self._asked[rid].count))

    def due(self) -> float:
        """When give_up() has something to do."""
        return min((asked.due for asked in self._asked.values()), default=float("inf"))

    def tokens(self, book: Sessions, record: SessionRecord) -> bytes:
        """A session's token ids, from the log when it has changed since they were read. Raises ErrorReply."""
        kept = self._kept.pop(record.id, None)
        if kept is None or kept[0] != record:
            kept = (record, book.tokens(record))
        self._kept[record.id] = kept
        while len(self._kept) > KEPT_SESSIONS or sum(len(ids) for _, ids in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return kept[1]
