"""The client's side of a pair of sockets (work, control) as pure state: what to send, whether the broker lives. No I/O.

A driver (transport.Connection, aio.AsyncConnection) moves `work_out` and `control_out` to the sockets, hands in what
arrives, and calls `tick` at least every `wait` seconds. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections import deque
from collections.abc import Sequence
from typing import Any

from . import framing
from .errors import AtlasError, ErrorCode, ErrorReply
from .framing import BadFrame
from .protocol import (
    Attach,
    Cancel,
    Credit,
    Error,
    Generate,
    Header,
    Hello,
    ModelList,
    Ping,
    Pong,
    SessionExport,
    SessionList,
    SessionShow,
    Status,
)
from .stream import Stream

MISSES = 2  # PONGs in a row that do not know a stream before it is sent again
UNKNOWN_MISSES = 10  # the same for requests that change nothing: brokers need not know their streams
UNKNOWN = (Hello, Status, SessionList, SessionShow, SessionExport, ModelList)
_RID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds."""

    timeout: float = 10.0  # without any answer until the connection counts as dead
    reconnect: float = 30.0  # for which a lost daemon is waited for
    heartbeat: float = 1.0  # of silence before a PING


class Health(enum.Enum):
    OK = "ok"
    SUSPECT = "suspect"  # a PING is overdue: see whether anything still listens
    DEAD = "dead"


@dataclasses.dataclass
class _Watch:
    """One live stream. `due`: when to send it (a retry that waits); `awaiting`: its PONG decides how it goes on."""

    stream: Stream
    heard: float
    due: float | None = None
    awaiting: bool = False
    misses: int = 0
    taken: int = 0  # events since the last CREDIT


class Link:
    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.boot = ""
        self.work_out: deque[list[bytes]] = deque()
        self.control_out: deque[list[bytes]] = deque()
        self._watches: dict[str, _Watch] = {}
        self._unanswered: float | None = None  # since when a PING has had no answer

    @property
    def busy(self) -> bool:
        return bool(self._watches)

    @property
    def streams(self) -> list[Stream]:
        return [watch.stream for watch in self._watches.values()]

    def open(self, stream: Stream, now: float) -> None:
        """Sends a request. Raises ErrorReply when it can't be encoded."""
        frames = encode(stream)
        self._watches[stream.rid] = _Watch(stream, now)
        self.work_out.append(frames)
        if not self.boot:
            self._send_control(stream.rid, Ping())
            self._unanswered = now

    def forget(self, stream: Stream) -> None:
        """No further reply to this stream is of interest."""
        self._watches.pop(stream.rid, None)

    def cancel(self, rid: str) -> None:
        """Raises ErrorReply when `rid` can't be a request id."""
        check(rid)
        self._send_control(rid, Cancel())

    def fail(self, error: AtlasError) -> None:
        """Ends every stream with `error`."""
        for watch in self._watches.values():
            watch.stream.error = error
        self._watches.clear()

    def work(self, frames: Sequence[bytes], now: float) -> None:
        """Takes one message of the work socket."""
        self._unanswered = None
        header, reply, raw = _decode(frames)
        watch = self._watches.get(header.rid) if header else None
        if header is None or watch is None or watch.due is not None:
            return
        watch.heard, watch.misses = now, 0
        watch.stream.feed(header.seq, reply, raw)
        if watch.stream.finished:
            self._end(watch, now)
        else:
            self._grant(watch)

    def control(self, frames: Sequence[bytes], now: float) -> None:
        """Takes one message of the control socket."""
        self._unanswered = None
        header, reply, _ = _decode(frames)
        watch = self._watches.get(header.rid) if header else None
        if isinstance(reply, Pong):
            self._pong(watch, reply, now)
        elif isinstance(reply, Error) and reply.code == ErrorCode.UNAUTHORIZED and watch:
            watch.stream.feed(0, reply)
            self._end(watch, now)

    def tick(self, now: float) -> Health:
        """Queues what is due (PINGs, retries) and says how the connection is."""
        for watch in list(self._watches.values()):
            if watch.due is not None:
                if now >= watch.due:
                    watch.due, watch.heard = None, now
                    self.work_out.append(encode(watch.stream))
            elif now - watch.heard >= self.limits.heartbeat:
                watch.heard = now
                self._ping(watch, now)
        silent = 0.0 if self._unanswered is None else now - self._unanswered
        if silent >= self.limits.timeout:
            return Health.DEAD
        return Health.SUSPECT if silent >= self.limits.heartbeat else Health.OK

    def wait(self, now: float) -> float:
        """Seconds until `tick` has something to do."""
        due = [watch.due for watch in self._watches.values() if watch.due is not None]
        return max(0.0, min([self.limits.heartbeat / 2, *(at - now for at in due)]))

    def reopened(self, now: float) -> None:
        """The sockets are new: what was queued is void, and each stream asks whether it is still known."""
        self.work_out.clear()
        self.control_out.clear()
        self._unanswered = now
        if not self._watches:
            self._send_control("link", Ping())
        for watch in self._watches.values():
            watch.heard, watch.misses, watch.awaiting = now, 0, watch.due is None
            self._ping(watch, now)

    def _pong(self, watch: _Watch | None, pong: Pong, now: float) -> None:
        changed = self.boot not in ("", pong.boot)
        self.boot = pong.boot
        if changed:
            for each in [each for each in self._watches.values() if each.due is None]:
                self._resend(each, "the daemon was started again", now)
        elif watch and watch.awaiting and pong.known:
            watch.awaiting, watch.misses, watch.taken = False, 0, 0  # ATTACH starts the credit anew
            self.work_out.append(framing.encode(Header(watch.stream.rid), Attach(watch.stream.last_seq)))
        elif watch and watch.due is None:
            watch.misses = 0 if pong.known else watch.misses + 1
            most = UNKNOWN_MISSES if isinstance(watch.stream.body, UNKNOWN) else MISSES
            if (watch.awaiting and not pong.known) or watch.misses >= most:
                self._resend(watch, "the daemon lost the request", now)

    def _resend(self, watch: _Watch, reason: str, now: float) -> None:
        watch.awaiting, watch.misses, watch.heard, watch.taken = False, 0, now, 0
        if watch.stream.resend(reason):
            self.work_out.append(encode(watch.stream))
        else:
            self._watches.pop(watch.stream.rid)

    def _end(self, watch: _Watch, now: float) -> None:
        del self._watches[watch.stream.rid]
        delay = watch.stream.retry()
        if delay is not None:
            self._watches[watch.stream.rid] = _Watch(watch.stream, now, due=now + delay)

    def _grant(self, watch: _Watch) -> None:
        """Keeps a stream with limited credit going: half of it is granted again when half is used."""
        credit = watch.stream.body.credit if isinstance(watch.stream.body, Generate) else 0
        if not credit:
            return
        watch.taken += 1
        if watch.taken >= (credit + 1) // 2:
            self._send_control(watch.stream.rid, Credit(watch.taken))
            watch.taken = 0

    def _ping(self, watch: _Watch, now: float) -> None:
        self._send_control(watch.stream.rid, Ping())
        self._unanswered = now if self._unanswered is None else self._unanswered

    def _send_control(self, rid: str, body: Any) -> None:
        self.control_out.append(framing.encode(Header(rid), body))


def encode(stream: Stream) -> list[bytes]:
    """The frames of a stream's request. Raises ErrorReply when a value can't be encoded."""
    check(stream.rid)
    try:
        return framing.encode(Header(stream.rid), stream.body, stream.raw)
    except (TypeError, ValueError, OverflowError) as error:  # UnicodeEncodeError: half a surrogate pair
        raise ErrorReply(ErrorCode.INVALID_PARAMETER, f"the request can't be encoded: {error}") from None


def check(rid: str) -> None:
    """Raises ErrorReply when `rid` can't be a request id: a daemon could not even say whom it refuses."""
    if not _RID.fullmatch(rid):
        raise ErrorReply(ErrorCode.INVALID_PARAMETER, f"request id {rid!r} is not 1 to 64 of A-Z a-z 0-9 . _ -")


def _decode(frames: Sequence[bytes]) -> tuple[Header | None, Any, Sequence[bytes]]:
    try:
        return framing.decode_reply(frames)
    except BadFrame as error:
        if error.rid is None:
            return None, None, ()
        reply = ErrorReply(ErrorCode.BAD_FRAME, f"the daemon's answer can't be read: {error}")
        return Header(error.rid), Error.of(reply), ()
