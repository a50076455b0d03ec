"""Which requests run, and how many tokens of each go into the next forward pass. No torch, zmq or lmdb.

Continuous batching with chunked prefill: every decoding request gets its one token in every pass; prefills share
`chunk` tokens in order of admission. A request that is out of pages makes the youngest other one give its pages back.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable

from .request import Request, State


@dataclasses.dataclass(frozen=True)
class Part:
    """`count` tokens of `request` from kv.length on; `sample`: they are its last, so a token is drawn."""

    request: Request
    count: int
    sample: bool


class Scheduler:
    """waiting: FIFO, no pages held. running: in order of admission, pages held."""

    def __init__(self, max_batch: int, chunk: int) -> None:
        self.max_batch = max_batch
        self.chunk = chunk
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def find(self, rid: str) -> Request | None:
        return next((r for r in (*self.running, *self.waiting) if r.rid == rid), None)

    def remove(self, request: Request) -> None:
        """Takes a finished request off its list."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def admit(self, begin: Callable[[Request], bool]) -> None:
        """Admits from the head of the queue while `begin` finds pages; later requests never overtake."""
        while self.waiting and len(self.running) < self.max_batch:
            request = self.waiting[0]
            if not begin(request):
                return
            if self.waiting and self.waiting[0] is request:  # else `begin` failed it
                self.waiting.popleft()
                self.running.append(request)

    def plan(self) -> list[Part]:
        """The next pass: decodes, then prefill chunks up to the budget. Nothing when nobody is ready."""
        ready = [r for r in self.running if r.state is State.RUNNING]
        parts = [Part(r, 1, True) for r in ready if r.decoding]
        budget = self.chunk
        for request in ready:
            if request.decoding or budget == 0:
                continue
            count = min(request.pending, budget)
            budget -= count
            parts.append(Part(request, count, sample=count == request.pending))
        return parts

    def victim(self, needy: Request) -> Request | None:
        """The request that gives way to `needy`: the youngest running one, never `needy` itself or an older one."""
        place = self.running.index(needy)
        return next((r for r in reversed(self.running[place + 1 :])), None)

    def requeue(self, request: Request) -> None:
        """Back to the head of the queue, its pages given up."""
        self.running.remove(request)
        request.state = State.QUEUED
        self.waiting.appendleft(request)
