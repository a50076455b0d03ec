"""A daemon under test with a scripted engine, and a bare client that speaks frames."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zmq
from atlas_client import framing, protocol
from atlas_client.protocol import Done, Error, Generate, Header, Sampling, Status, Tokens

ENGINE = f"{sys.executable} {Path(__file__).with_name('scripted_engine.py')}"
_ids = itertools.count()


def until(condition: Callable[[], Any], what: str, limit: float = 20.0) -> Any:
    """Polls until the condition holds."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError(f"not within {limit} s: {what}")


class Client:
    """One connection to each public socket. Replies are sorted by request id."""

    def __init__(self, daemon: Daemon, *, hwm: int = 100_000, context: zmq.Context[Any] | None = None) -> None:
        self.daemon = daemon
        self.context = context or zmq.Context.instance()
        self.work = self._connect(str(daemon.socket), hwm)
        self.control = self._connect(f"{daemon.socket}.ctl", hwm)
        self.seen: dict[str, list[tuple[int, Any, list[bytes]]]] = {}

    def _connect(self, path: str, hwm: int) -> zmq.Socket[bytes]:
        socket = self.context.socket(zmq.DEALER)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.RCVHWM, hwm)
        socket.set(zmq.RECONNECT_IVL, 20)
        socket.connect(f"ipc://{path}")
        return socket

    def send(self, request: Any, rid: str = "", raw: tuple[bytes, ...] = ()) -> str:
        rid = rid or f"r{os.getpid()}-{next(_ids)}"
        self.work.send_multipart(framing.encode(Header(rid), request, raw))
        return rid

    def order(self, request: Any, rid: str) -> None:
        self.control.send_multipart(framing.encode(Header(rid), request))

    def pong(self, request: Any, rid: str = "p", limit: float = 5.0) -> Any:
        """Sends on the control socket and waits for the answer."""
        self.order(request, rid)
        assert self.control.poll(int(limit * 1000)), "no answer on the control socket"
        return framing.decode_reply(self.control.recv_multipart())[1]

    def receive(self, limit: float = 0.0) -> bool:
        """Takes one reply, if one comes."""
        if not self.work.poll(int(limit * 1000)):
            return False
        header, body, raw = framing.decode_reply(self.work.recv_multipart())
        self.seen.setdefault(header.rid, []).append((header.seq, body, list(raw)))
        return True

    def replies(self, rid: str, limit: float = 20.0) -> list[Any]:
        """All replies to a request up to its terminal one."""
        return [body for _, body, _ in self.events(rid, limit)]

    def events(self, rid: str, limit: float = 20.0) -> list[tuple[int, Any, list[bytes]]]:
        end = time.monotonic() + limit
        while not any(not isinstance(body, protocol.STREAMING) for _, body, _ in self.seen.get(rid, [])):
            left = end - time.monotonic()
            assert left > 0, f"no terminal reply to {rid}: {self.seen.get(rid)}"
            self.receive(min(left, 0.1))
        return self.seen.pop(rid)

    def wait_for(self, rid: str, kind: type, count: int = 1, limit: float = 20.0) -> None:
        """Until that many replies of a class have come."""
        end = time.monotonic() + limit
        while sum(isinstance(body, kind) for _, body, _ in self.seen.get(rid, [])) < count:
            assert time.monotonic() < end, f"{self.seen.get(rid)}"
            self.receive(0.1)

    def ask(self, request: Any, raw: tuple[bytes, ...] = (), limit: float = 20.0) -> Any:
        """The terminal reply to a request."""
        return self.replies(self.send(request, raw=raw), limit)[-1]

    def ask_raw(self, request: Any) -> tuple[Any, list[bytes]]:
        """The terminal reply with its raw frames."""
        _, body, raw = self.events(self.send(request))[-1]
        return body, raw

    def generate(self, prompt: str = "hello", session: str | None = None, tokens: int = 4, **rest: Any) -> Any:
        request = Generate(prompt=prompt, session=session, sampling=Sampling(max_tokens=tokens), **rest)
        return self.ask(request)

    def close(self) -> None:
        self.work.close(0)
        self.control.close(0)


class Daemon:
    """`atlasd` as a process of its own."""

    def __init__(self, directory: Path, *flags: str, model: str = "demo", socket: Path | None = None) -> None:
        self.directory = directory
        self.socket = socket or directory / "run" / "a.sock"
        self.state = directory / "state"
        self.flags = ("--model", model, *flags)
        self.process: subprocess.Popen[bytes] | None = None
        self.log = directory / "daemon.log"
        self.prefix: list[str] = []  # what the daemon is run under

    @property
    def command(self) -> list[str]:
        return [
            *self.prefix, sys.executable, "-m", "atlasd", "--socket", str(self.socket), "--state-dir", str(self.state),
            "--engine-command", ENGINE, *self.flags,
        ]  # fmt: skip

    def start(self) -> Daemon:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stderr=log)
        return self

    def run(self, timeout: float = 20.0) -> subprocess.CompletedProcess[str]:
        """Starts it where it is expected to exit."""
        return subprocess.run(self.command, capture_output=True, text=True, timeout=timeout)

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    def kill(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()
        if self.process:
            self.process.wait()

    def stop(self, limit: float = 20.0) -> int:
        assert self.process
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(limit)

    def text(self) -> str:
        return self.log.read_text()

    def client(self) -> Client:
        return Client(self)

    def ready(self, limit: float = 20.0) -> Client:
        """A client, once the engine is ready."""
        client = self.client()
        until(lambda: client.ask(Status(), limit=limit).engine_state == "ready", "engine ready", limit)
        return client


def daemon_at(directory: Path, *flags: str, **rest: Any) -> Iterator[Daemon]:
    """For fixtures: a running daemon that is killed in the end."""
    daemon = Daemon(directory, *flags, **rest).start()
    try:
        yield daemon
    finally:
        daemon.kill()
        assert "Traceback" not in daemon.text(), daemon.text()[-3000:]


def text_tokens(replies: list[Any]) -> list[int]:
    """Token ids of all TOKENS replies, checked to be without gap or repetition."""
    ids: list[int] = []
    for reply in replies:
        if isinstance(reply, Tokens):
            assert reply.index == len(ids)
            ids += reply.ids
    return ids


def is_error(reply: Any, code: str) -> bool:
    assert isinstance(reply, Error | Done), reply
    return isinstance(reply, Error) and reply.code == code
