"""The asyncio driver of a Link: two readers and a clock, alive while the client is open."""

from __future__ import annotations

import asyncio
import time
import weakref
from pathlib import Path

import zmq
import zmq.asyncio

from .errors import AtlasError, DaemonUnavailable
from .link import Health, Limits, Link, encode
from .paths import control_socket, endpoint
from .stream import Stream
from .transport import RETRY_S, configure, hello, limit_of, lost, needs_limit, oversize, probe

Sockets = tuple[zmq.asyncio.Socket, zmq.asyncio.Socket]


class AsyncConnection:
    """One pair of sockets for all requests of a client; belongs to the event loop it was made in."""

    def __init__(self, path: Path, limits: Limits) -> None:
        probe(path)
        self._path = path
        self._limits = limits
        self._limit = 0
        self._context = zmq.asyncio.Context()
        self._wakes: weakref.WeakKeyDictionary[Stream, asyncio.Event] = weakref.WeakKeyDictionary()
        self._sending = asyncio.Lock()
        self.link = Link(limits)
        self.closed = False
        self._sockets = self._open()
        self._readers = self._read()
        self._clock = asyncio.create_task(self._run())

    async def start(self, stream: Stream) -> None:
        """Sends a request. Raises ErrorReply when it can't be sent at all."""
        frames = encode(stream)
        if needs_limit(frames):
            oversize(frames, self._limit or await self._ask_limit())
        self._wakes[stream] = asyncio.Event()
        self.link.open(stream, time.monotonic())
        await self._flush()

    async def wait(self, stream: Stream) -> None:
        """Returns when the stream has an event or has ended."""
        wake = self._wakes.get(stream)
        while wake and not stream.events and not stream.finished:
            wake.clear()
            await wake.wait()
        if stream.finished:
            self._wakes.pop(stream, None)

    async def cancel(self, rid: str) -> None:
        self.link.cancel(rid)
        await self._flush()

    async def close(self) -> None:
        self.closed = True
        self._clock.cancel()
        self._stop_readers()
        await asyncio.gather(self._clock, *self._readers, return_exceptions=True)
        self._fail(DaemonUnavailable("the client was closed", "open a new AsyncClient"))
        self._context.destroy(linger=0)

    def _open(self) -> Sockets:
        work = self._context.socket(zmq.DEALER)
        control = self._context.socket(zmq.DEALER)
        for made, path in ((work, self._path), (control, control_socket(self._path))):
            configure(made)
            made.connect(endpoint(path))
        return work, control

    def _read(self) -> list[asyncio.Task[None]]:
        work, control = self._sockets
        return [
            asyncio.create_task(self._reader(work, control=False)),
            asyncio.create_task(self._reader(control, control=True)),
        ]

    def _stop_readers(self) -> None:
        for reader in self._readers:
            reader.cancel()

    async def _reader(self, socket: zmq.asyncio.Socket, *, control: bool) -> None:
        take = self.link.control if control else self.link.work
        while True:
            take(await socket.recv_multipart(), time.monotonic())
            self._wake()
            await self._flush()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self.link.wait(time.monotonic()))
            health = self.link.tick(time.monotonic())
            gone = health is Health.DEAD or (health is Health.SUSPECT and not self._listens())
            if gone and not await self._reconnect():
                return
            self._wake()
            await self._flush()

    async def _reconnect(self) -> bool:
        end = time.monotonic() + self._limits.reconnect
        while time.monotonic() < end:
            if self._listens():
                await self._reopen()
                return True
            await asyncio.sleep(RETRY_S)
        self.closed = True
        self._stop_readers()
        self._fail(lost(self._path, self._limits))
        self._context.destroy(linger=0)
        return False

    async def _reopen(self) -> None:
        self._stop_readers()
        await asyncio.gather(*self._readers, return_exceptions=True)
        async with self._sending:
            for socket in self._sockets:
                socket.close()
            self._sockets = self._open()
        self.link.reopened(time.monotonic())
        self._readers = self._read()

    async def _ask_limit(self) -> int:
        asking = Stream(hello())
        await self.start(asking)
        await self.wait(asking)
        self._limit = limit_of(asking.reply)
        return self._limit

    async def _flush(self) -> None:
        async with self._sending:
            queues = (self.link.work_out, self.link.control_out)
            for queue, socket in zip(queues, self._sockets, strict=True):
                while queue and not self.closed:
                    frames = queue.popleft()
                    try:
                        await socket.send_multipart(frames, zmq.DONTWAIT)
                    except zmq.Again:
                        queue.appendleft(frames)
                        break  # the daemon reads nothing; the heartbeat finds out why

    def _wake(self) -> None:
        for stream, wake in list(self._wakes.items()):
            if stream.events or stream.finished:
                wake.set()

    def _fail(self, error: AtlasError) -> None:
        self.link.fail(error)
        self._wake()

    def _listens(self) -> bool:
        try:
            probe(self._path)
        except DaemonUnavailable:
            return False
        return True
