"""Reply streams: numbered events, replay, credit and caps. Deciding code only; the outbox sends what this says.

A stream is the list of replies to one request. Its events carry sequence numbers from 1 upwards. `position` divides
them: events [0, position) were handed to the client's connection, [position, len) wait. A PROGRESS event is superseded
by the next one, so replayed numbers may have gaps; a missing number never hides anything but superseded progress.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import msgspec
from atlas_client.framing import MAGIC
from atlas_client.protocol import Header, TokenLogprob, Tokens

_encode = msgspec.msgpack.Encoder().encode
_tokens = msgspec.msgpack.Decoder(Tokens)

Key = tuple[str, str]  # owner, request id
COMPACT_EVENTS = 256  # fewer unsent events are not worth merging again


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds on what streams hold. Bytes count message bodies."""

    backlog_events: int = 8192  # unsent events of one attached stream before SLOW_CONSUMER
    backlog_bytes: int = 4 * 2**20
    kept_streams: int = 256  # finished streams kept for replay
    kept_seconds: float = 600.0
    kept_bytes: int = 32 * 2**20


@dataclasses.dataclass(slots=True)
class Event:
    seq: int
    frames: list[bytes]  # magic, header, body, raw...
    progress: bool = False
    tokens: bool = False  # a TOKENS body, which may be merged with its neighbours while unsent

    @property
    def size(self) -> int:
        return sum(map(len, self.frames))


class Stream:
    """The replies to one request."""

    def __init__(self, key: Key, digest: bytes, identity: bytes | None, *, credit: int = 0, kept: bool = True) -> None:
        self.key = key
        self.digest = digest
        self.identity = identity  # the connection that gets the events; None: nobody is there
        self.kept = kept  # found again by its request id
        self.window = credit
        self.credit: int | None = credit or None  # events that may still be sent; None: unlimited
        self.events: list[Event] = []
        self.position = 0
        self.backlog = 0  # bytes in events[position:]
        self.size = 0  # bytes in all events
        self.seq = 0
        self.finished = False
        self.retryable = False  # ended with an error after which the same request may be run again

    def push(
        self,
        body: bytes,
        raw: Sequence[bytes] = (),
        *,
        progress: bool = False,
        tokens: bool = False,
        last: bool = False,
    ) -> None:
        """Appends one event. `body` is an encoded message and is not changed. After `last` nothing is accepted."""
        if self.finished:
            return
        seq = self._supersede() if progress else None
        if seq is None:
            self.seq += 1
            seq = self.seq
        event = Event(seq, [MAGIC, _encode(Header(self.key[1], seq)), body, *raw], progress, tokens)
        self.events.append(event)
        self.backlog += event.size
        self.size += event.size
        self.finished = last

    def _supersede(self) -> int | None:
        """Drops an older progress event at the end; returns its number if nobody has seen it."""
        if not self.events or not self.events[-1].progress:
            return None
        old = self.events.pop()
        self.size -= old.size
        if self.position > len(self.events):
            self.position -= 1
            return None
        self.backlog -= old.size
        return old.seq

    def pending(self) -> Event | None:
        """The event to send now; None when there is none, nobody is there, or credit is used up."""
        if self.identity is None or self.position == len(self.events):
            return None
        if self.credit == 0 and not (self.finished and self.position == len(self.events) - 1):
            return None
        return self.events[self.position]

    def sent(self) -> None:
        """The pending event was handed over."""
        self.backlog -= self.events[self.position].size
        self.position += 1
        if self.credit:
            self.credit -= 1

    def grant(self, events: int) -> None:
        """CREDIT: allows that many more events. Without effect on a stream that has no limit."""
        if self.credit is not None:
            self.credit += events

    def attach(self, identity: bytes, last_seq: int) -> None:
        """Directs the stream to a connection that has seen events up to `last_seq`; credit starts anew."""
        self.identity = identity
        self.credit = self.window or None
        self.position = next((i for i, event in enumerate(self.events) if event.seq > last_seq), len(self.events))
        self.backlog = sum(event.size for event in self.events[self.position :])

    @property
    def drained(self) -> bool:
        return self.finished and self.position == len(self.events)

    def overflows(self, limits: Limits) -> bool:
        """Whether unsent events exceed the cap."""
        return len(self.events) - self.position > limits.backlog_events or self.backlog > limits.backlog_bytes

    def compact(self) -> None:
        """Merges unsent neighbouring TOKENS events. No client has seen any of them, so none can see one twice."""
        if len(self.events) - self.position < COMPACT_EVENTS:
            return
        head, rest = self.events[: self.position], self.events[self.position :]
        merged = list(_merged(rest, self.key[1]))
        self.events = head + merged
        self.backlog = sum(event.size for event in merged)
        self.size = self.backlog + sum(event.size for event in head)


def _merged(events: list[Event], rid: str) -> Iterator[Event]:
    run: list[Event] = []
    for event in events:
        if event.tokens:
            run.append(event)
            continue
        yield from _joined(run, rid)
        run = []
        yield event
    yield from _joined(run, rid)


def _joined(run: list[Event], rid: str) -> Iterator[Event]:
    if len(run) < 2:
        yield from run
        return
    parts = [_tokens.decode(event.frames[2]) for event in run]
    ids = [token for part in parts for token in part.ids]
    logprobs: list[TokenLogprob] = [entry for part in parts for entry in part.logprobs]
    body = _encode(Tokens(parts[0].index, ids, "".join(part.text for part in parts), logprobs))
    seq = run[-1].seq
    yield Event(seq, [MAGIC, _encode(Header(rid, seq)), body], tokens=True)


class StreamTable:
    """Streams by owner and request id: the live ones, and finished ones for as long as the limits allow."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._streams: dict[Key, Stream] = {}
        self._finished: collections.OrderedDict[Key, float] = collections.OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._streams)

    def find(self, key: Key) -> Stream | None:
        return self._streams.get(key)

    def add(self, stream: Stream) -> None:
        """Makes the stream known by its key, in place of a finished one of the same key."""
        self._forget(stream.key)
        self._streams[stream.key] = stream

    def finish(self, stream: Stream, now: float) -> None:
        """The stream got its terminal event; it is kept for replay within the limits."""
        if self._streams.get(stream.key) is not stream:
            return
        self._finished[stream.key] = now
        self._bytes += stream.size
        while len(self._finished) > self.limits.kept_streams or (
            self._bytes > self.limits.kept_bytes and len(self._finished) > 1
        ):
            self._forget(next(iter(self._finished)))

    def expire(self, now: float) -> None:
        """Forgets finished streams older than the limit."""
        while self._finished:
            key, since = next(iter(self._finished.items()))
            if now - since < self.limits.kept_seconds:
                return
            self._forget(key)

    def _forget(self, key: Key) -> None:
        stream = self._streams.pop(key, None)
        if self._finished.pop(key, None) is not None and stream is not None:
            self._bytes -= stream.size
