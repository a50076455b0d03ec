"""The outgoing half of the work socket: sends what streams hold, never waits for a client."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq
from atlas_client.errors import ErrorCode, ErrorReply
from atlas_client.protocol import Error

from .streams import Stream, StreamTable

log = logging.getLogger("atlasd.broker")
# Plain integers and single sends: this is the path of each token, and flag arithmetic on enums costs more than sending.
LAST = int(zmq.NOBLOCK)
MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_encode = msgspec.msgpack.Encoder().encode


class Outbox:
    """Sends events of streams to their clients. `on_gone(stream)` is called when a client vanished,
    `on_slow(stream)` when it does not read: both may end the stream."""

    def __init__(self, socket: zmq.Socket[bytes], table: StreamTable) -> None:
        self.socket = socket
        self.table = table
        self.stalled: set[Stream] = set()
        self.on_gone: Callable[[Stream], None] = lambda stream: None
        self.on_slow: Callable[[Stream], None] = lambda stream: None

    def push(self, stream: Stream, message: Any, raw: Sequence[bytes] = ()) -> None:
        """Sends a message that is not the terminal reply."""
        self._add(stream, _encode(message), raw)

    def relay(self, stream: Stream, body: bytes, *, progress: bool) -> None:
        """Sends an encoded PROGRESS or TOKENS message untouched."""
        if not stream.finished:
            stream.push(body, progress=progress, tokens=not progress)
            self._flush(stream)

    def progress(self, stream: Stream, message: Any) -> None:
        """Sends a PROGRESS message made by the broker itself."""
        self.relay(stream, _encode(message), progress=True)

    def end(self, stream: Stream, message: Any, raw: Sequence[bytes] = ()) -> None:
        """Sends the terminal reply. A stream that has ended already is left as it is."""
        if stream.finished:
            return
        stream.retryable = isinstance(message, Error) and message.retryable
        self._add(stream, _encode(message), raw, last=True)
        self.table.finish(stream, time.monotonic())

    def fail(self, stream: Stream, code: ErrorCode, message: str, next_step: str = "") -> None:
        """Ends the stream with ERROR."""
        self.end(stream, Error.of(ErrorReply(code, message, next_step)))

    def attach(self, stream: Stream, identity: bytes, last_seq: int) -> None:
        """Replays events after `last_seq` to a connection, which gets what follows too."""
        stream.attach(identity, last_seq)
        self._send(stream)

    def grant(self, stream: Stream, events: int) -> None:
        """Applies CREDIT."""
        stream.grant(events)
        self._send(stream)

    def retry(self) -> None:
        """Tries the streams whose clients did not take an event before."""
        for stream in list(self.stalled):
            self._send(stream)

    def _add(self, stream: Stream, body: bytes, raw: Sequence[bytes], last: bool = False) -> None:
        stream.push(body, raw, last=last)
        self._flush(stream)

    def _flush(self, stream: Stream) -> None:
        self._send(stream)
        if stream.finished or not stream.overflows(self.table.limits):
            return
        if stream.identity is None:
            stream.compact()
        else:
            self.on_slow(stream)

    def _send(self, stream: Stream) -> None:
        self.stalled.discard(stream)
        identity = stream.identity
        while identity is not None and (event := stream.pending()) is not None:
            try:
                self._write(identity, event.frames)
            except zmq.Again:
                self.stalled.add(stream)
                return
            except zmq.ZMQError as error:
                self._lost(stream, error)
                return
            stream.sent()

    def _write(self, identity: bytes, frames: list[bytes]) -> None:
        """The frames of one message. Only the first can be refused, as a message is taken whole or not at all."""
        send = self.socket.send
        send(identity, MORE)
        for frame in frames[:-1]:
            send(frame, MORE)
        send(frames[-1], LAST)

    def _lost(self, stream: Stream, error: zmq.ZMQError) -> None:
        stream.identity = None
        if error.errno != zmq.EHOSTUNREACH:
            log.error("send failed rid=%s error=%s", stream.key[1], error)
        if not stream.finished:
            log.info("client gone rid=%s", stream.key[1])
            self.on_gone(stream)
