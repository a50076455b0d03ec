"""Sockets: reaching the daemon, and the blocking driver of a Link.

ZeroMQ says nothing when nobody listens or when access is denied, so the path is tried with a plain socket first.
"""

from __future__ import annotations

import errno
import socket as unix
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zmq

from .errors import DaemonUnavailable, ErrorCode, ErrorReply
from .link import Health, Limits, Link, encode
from .paths import MAX_IPC_PATH, control_socket, endpoint
from .protocol import MAX_MESSAGE_BYTES, Hello, Welcome
from .stream import Stream

RETRY_S = 0.05  # between two attempts to reach a daemon that went away
ASK_BYTES = 1024 * 1024  # the least limit a daemon can have; larger messages ask for its limit first
MAX_REPLY_BYTES = 1024 * 1024 * 1024
START = "start one with `atlasctl up` or `systemctl start atlasd`"


def probe(path: Path) -> None:
    """Returns when something listens on `path`. Raises DaemonUnavailable, `refused` when access is denied."""
    if len(str(path)) > MAX_IPC_PATH:
        raise DaemonUnavailable(
            f"the socket path is longer than {MAX_IPC_PATH} bytes: {path}",
            "give a shorter one with --socket or ATLAS_SOCKET",
        )
    with unix.socket(unix.AF_UNIX, unix.SOCK_STREAM) as probing:
        probing.setblocking(False)
        code = probing.connect_ex(str(path))
    if code in (0, errno.EAGAIN, errno.EINPROGRESS):  # EAGAIN: it listens, its backlog is full
        return
    if code in (errno.EACCES, errno.EPERM):
        raise DaemonUnavailable(
            f"this user may not open {path}",
            f"join the socket's group (`ls -l {path}` shows it), then log in again",
            refused=True,
        )
    raise DaemonUnavailable(f"no daemon is listening on {path}", START)


def lost(path: Path, limits: Limits) -> DaemonUnavailable:
    """The error for a daemon that went away and did not come back in time."""
    return DaemonUnavailable(f"the daemon on {path} went away and did not come back in {limits.reconnect:g} s", START)


def configure(made: zmq.Socket[Any]) -> None:
    """Sets a DEALER's options. Replies queue without bound here: a caller that reads slowly stalls nobody else."""
    made.setsockopt(zmq.LINGER, 0)
    made.setsockopt(zmq.RCVHWM, 0)
    made.setsockopt(zmq.MAXMSGSIZE, MAX_REPLY_BYTES)
    made.setsockopt(zmq.RECONNECT_IVL, 50)
    made.setsockopt(zmq.RECONNECT_IVL_MAX, 200)


def oversize(frames: Sequence[bytes], limit: int) -> None:
    """Raises ErrorReply when a message is larger than the daemon takes: ZeroMQ would cut the connection instead."""
    size = max(len(frame) for frame in frames)
    if size > limit:
        raise ErrorReply(
            ErrorCode.INVALID_PARAMETER,
            f"the request has {size / 2**20:.1f} MiB, the daemon takes {limit / 2**20:g} MiB",
            "send less at once, or raise the daemon's --max-message-mb",
        )


def needs_limit(frames: Sequence[bytes]) -> bool:
    """Whether a message is so large that the daemon must be asked for its limit first."""
    return max(len(frame) for frame in frames) > ASK_BYTES


def limit_of(welcome: object) -> int:
    """The largest frame the daemon takes, in bytes."""
    return welcome.max_message_bytes if isinstance(welcome, Welcome) else MAX_MESSAGE_BYTES


def hello() -> Hello:
    """The first message of a client that wants to know the daemon's limits."""
    return Hello("atlas_client/0.1.0", capabilities=["generate", "sessions", "attach", "models", "credit"])


class Connection:
    """One thread's pair of sockets. Not to be used by two threads at once."""

    def __init__(self, path: Path, context: zmq.Context[zmq.Socket[bytes]], limits: Limits) -> None:
        probe(path)
        self._path = path
        self._context = context
        self._limits = limits
        self._limit = 0
        self.link = Link(limits)
        self.closed = False
        self._open()

    def start(self, stream: Stream) -> None:
        """Sends a request. Raises ErrorReply when it can't be sent at all."""
        frames = encode(stream)
        if needs_limit(frames):
            oversize(frames, self._limit or self._ask_limit())
        self.link.open(stream, time.monotonic())
        self._flush()

    def cancel(self, rid: str) -> None:
        self.link.cancel(rid)
        self._flush()

    def step(self, timeout: float | None = None) -> None:
        """Waits for the next message (`timeout` seconds at most) and takes all that are there.

        Raises DaemonUnavailable when the daemon went away and stayed away; every stream has ended then.
        """
        self._flush()
        wait = self.link.wait(time.monotonic())
        wait = wait if timeout is None else min(wait, timeout)
        ready = dict(self._poller.poll(int(wait * 1000) + 1))
        if self._work in ready:
            self._drain(self._work, control=False)
        if self._control in ready:
            self._drain(self._control, control=True)
        health = self.link.tick(time.monotonic())
        if health is Health.DEAD or (health is Health.SUSPECT and not self._listens()):
            self._reconnect()
        self._flush()

    def close(self) -> None:
        self.closed = True
        self._work.close()
        self._control.close()

    def _open(self) -> None:
        self._poller = zmq.Poller()
        self._work = self._dealer(self._path)
        self._control = self._dealer(control_socket(self._path))

    def _dealer(self, path: Path) -> zmq.Socket[bytes]:
        made = self._context.socket(zmq.DEALER)
        configure(made)
        made.connect(endpoint(path))
        self._poller.register(made, zmq.POLLIN)
        return made

    def _ask_limit(self) -> int:
        asking = Stream(hello())
        self.link.open(asking, time.monotonic())
        while not asking.finished:
            self.step()
        self._limit = limit_of(asking.reply)
        return self._limit

    def _flush(self) -> None:
        for queue, socket in ((self.link.work_out, self._work), (self.link.control_out, self._control)):
            while queue:
                try:
                    socket.send_multipart(queue[0], zmq.DONTWAIT)
                except zmq.Again:
                    break  # the daemon reads nothing; the heartbeat finds out why
                queue.popleft()

    def _drain(self, socket: zmq.Socket[bytes], *, control: bool) -> None:
        take = self.link.control if control else self.link.work
        while True:
            try:
                frames = socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            take(frames, time.monotonic())

    def _listens(self) -> bool:
        try:
            probe(self._path)
        except DaemonUnavailable:
            return False
        return True

    def _reconnect(self) -> None:
        end = time.monotonic() + self._limits.reconnect
        while time.monotonic() < end:
            if self._listens():
                self.close()
                self.closed = False
                self._open()
                self.link.reopened(time.monotonic())
                return
            time.sleep(RETRY_S)
        error = lost(self._path, self._limits)
        self.link.fail(error)
        self.close()
        raise error
