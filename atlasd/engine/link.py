"""The engine's end of its two PAIR sockets to the broker.

The work socket belongs to the main thread (during loading, sends may come from loader threads: a lock orders them).
The control socket belongs to a thread of its own, so that cancels arrive and beats leave while a forward pass runs.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import zmq

from .messages import Beat, Cancel, EngineSpec, ToEngine

BEAT_S = 1.0
LINGER_MS = 2000

_encoder = msgspec.msgpack.Encoder()
_work = msgspec.msgpack.Decoder(ToEngine)
_control = msgspec.msgpack.Decoder(Cancel)


class Link:
    """Messages to and from the broker. `beat` is asked for a new Beat once a second, on the control thread."""

    def __init__(self, spec: EngineSpec, beat: Callable[[], Beat]) -> None:
        self._context = zmq.Context()
        self._socket = self._connect(spec.work_endpoint)
        self._control_endpoint = spec.control_endpoint
        self._sending = threading.Lock()
        self._beat = beat
        self._cancelled: deque[str] = deque()  # filled by the control thread, emptied by the main thread
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve_control, name="control", daemon=True)
        self._thread.start()

    def _connect(self, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.PAIR)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        socket.setsockopt(zmq.SNDHWM, 0)  # the broker always reads; nothing may be dropped between the two
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.connect(endpoint)
        return socket

    def send(self, message: Any, raw: Sequence[bytes] = ()) -> None:
        """Sends one message of messages.FromEngine with its raw frames."""
        with self._sending:
            self._socket.send_multipart([_encoder.encode(message), *raw])

    def wait(self, wait_s: float) -> None:
        """Waits up to `wait_s` for a message."""
        if wait_s:
            self._socket.poll(int(1000 * wait_s))

    def receive(self) -> Iterator[tuple[Any, list[bytes]]]:
        """Messages that have arrived."""
        while self._socket.poll(0):
            frames = self._socket.recv_multipart()
            yield _work.decode(frames[0]), frames[1:]

    def cancelled(self) -> list[str]:
        """Request ids cancelled since the last call."""
        taken = []
        while self._cancelled:
            taken.append(self._cancelled.popleft())
        return taken

    def _serve_control(self) -> None:
        socket = self._connect(self._control_endpoint)
        due = 0.0
        while not self._closing.is_set():
            now = time.monotonic()
            if now >= due:
                socket.send(_encoder.encode(self._beat()))
                due = now + BEAT_S
            if socket.poll(int(1000 * max(0.0, min(due - now, 0.2)))):
                self._cancelled.append(_control.decode(socket.recv()).rid)
        socket.close(linger=0)

    def close(self) -> None:
        """Sends what is queued (for LINGER_MS at most) and stops the control thread."""
        self._closing.set()
        self._thread.join()
        self._socket.close()
        self._context.term()


def encode(body: Any) -> bytes:
    """A client message's body, to be relayed."""
    return _encoder.encode(body)
