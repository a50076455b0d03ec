"""A broker that follows a script: real ROUTER sockets, answers given by the test."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
from atlas_client import framing
from atlas_client.paths import control_socket, endpoint
from atlas_client.protocol import Done, Header, Ping, Pong, Timings, Tokens, Usage

Send = Callable[..., None]
Script = Callable[[str, Any, Send], None]  # request id, body, send(reply, seq=…, raw=…)


def done(ids: list[int], text: str, **more: Any) -> Done:
    return Done(finish_reason="length", text=text, tokens=ids, usage=Usage(), timings=Timings(), **more)


class ScriptedBroker:
    """Answers each request with `script`, each PING with `boot` and whether the id is in `known`."""

    def __init__(self, socket: Path, script: Script, boot: str = "b1") -> None:
        self.script = script
        self.boot = boot
        self.known: set[str] = set()
        self.mute = False  # a frozen process: takes nothing, answers nothing
        self.requests: list[tuple[str, Any]] = []
        self.controls: list[tuple[str, Any]] = []
        self._socket = socket
        self._end = threading.Event()
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> ScriptedBroker:
        self._thread.start()
        assert self._up.wait(10)
        return self

    def __exit__(self, *reason: object) -> None:
        """As SIGKILL leaves it: the connections are cut, the path stays behind without a listener."""
        self._end.set()
        self._thread.join(10)

    def seen(self, kind: type) -> list[str]:
        """Ids of the control messages of one kind."""
        return [rid for rid, body in self.controls if isinstance(body, kind)]

    def _serve(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        work, control = context.socket(zmq.ROUTER), context.socket(zmq.ROUTER)
        work.bind(endpoint(self._socket))
        control.bind(endpoint(control_socket(self._socket)))
        self._up.set()
        poller = zmq.Poller()
        poller.register(work, zmq.POLLIN)
        poller.register(control, zmq.POLLIN)
        while not self._end.is_set():
            ready = [] if self.mute else poller.poll(10)
            if self.mute:
                self._end.wait(0.01)
            for socket, _ in ready:
                identity, *frames = socket.recv_multipart()
                if socket is work:
                    self._work(work, identity, frames)
                else:
                    self._control(control, identity, frames)
        context.destroy(linger=100)

    def _work(self, socket: zmq.Socket[bytes], identity: bytes, frames: list[bytes]) -> None:
        header, body, _ = framing.decode_request(frames)
        self.requests.append((header.rid, body))
        sequence = iter(range(1, 1_000_000))

        def send(reply: Any, seq: int | None = None, raw: tuple[bytes, ...] = (), rid: str = header.rid) -> None:
            number = next(sequence) if seq is None else seq
            frames = [b"ATL1", *reply] if isinstance(reply, list) else framing.encode(Header(rid, number), reply, raw)
            socket.send_multipart([identity, *frames])

        self.script(header.rid, body, send)

    def _control(self, socket: zmq.Socket[bytes], identity: bytes, frames: list[bytes]) -> None:
        header, body, _ = framing.decode_control(frames)
        self.controls.append((header.rid, body))
        if isinstance(body, Ping):
            reply = framing.encode(Header(header.rid), Pong(self.boot, header.rid in self.known))
            socket.send_multipart([identity, *reply])


def tokens(start: int, ids: list[int], text: str) -> Tokens:
    return Tokens(start, ids, text)
