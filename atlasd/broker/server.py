"""The broker: public sockets, one poll loop, a handler per request class, exactly one terminal reply per request.

Nothing in the loop waits for the disk, the engine or a client: commits are the log's thread's, the engine's life is the
supervisor's, and what a client does not take stays in its stream.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import zmq
from atlas_client import framing, protocol
from atlas_client.errors import ErrorCode, ErrorReply
from atlas_client.paths import endpoint
from atlas_client.protocol import (
    Attach,
    Cancel,
    Credit,
    Error,
    Generate,
    Header,
    Hello,
    ModelList,
    ModelLoad,
    ModelUnload,
    Ping,
    Pong,
    SessionAppend,
    SessionExport,
    SessionList,
    SessionShow,
    Status,
    Welcome,
)

from .. import __version__
from ..config import Config
from ..engine.messages import Located, Persisted, State
from . import report
from .calls import Call
from .desk import Desk, handlers
from .log import Log
from .models import Models
from .notify import Notifier
from .outbox import Outbox
from .place import Place
from .sessions import invalid
from .streams import Key, Limits, Stream, StreamTable
from .supervisor import Supervisor
from .turn import replay
from .turns import Turns

log = logging.getLogger("atlasd.broker")

SEND_HWM = 1000  # messages ZeroMQ holds for one client; what it does not take stays in the streams
LINGER_MS = 1000  # for last replies when the daemon stops
RETRY_S = 0.005  # between two tries on a client that does not take its events
CANCEL_S = 10.0  # for running turns to end when the daemon stops
MAX_MESSAGES = 64  # taken from one socket before others get their turn
HEARTBEAT_MS = 1000
READ_ONLY = (Hello, Status, SessionList, SessionShow, SessionExport, ModelList)  # not kept for replay


class Broker:
    """One daemon's broker. Raises LogError when its session log can't be opened, zmq.ZMQError when it can't bind."""

    def __init__(
        self, config: Config, place: Place, engine_command: Sequence[str] | None = None, limits: Limits | None = None
    ) -> None:
        self.config = config
        self.place = place
        self.boot = os.urandom(8).hex()
        self.started = time.monotonic()
        self.notifier = Notifier()
        self.log = Log(Path(config.state_dir) / "sessions")
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.poller = zmq.Poller()
        self.work, self.control = self._bind(place.socket), self._bind(place.control)
        self.outbox = Outbox(self.work, StreamTable(limits or Limits()))
        self.engine = Supervisor(config, place.run_dir, self.context, self.poller, engine_command)
        self.turns = Turns(config, self.outbox, self.log, self.engine)
        self.models = Models(self.outbox, self.turns, self.engine, config.model)
        self.desk = Desk(self.outbox, self.log, self.turns, self.engine, config.max_message_mb * 2**20)
        self.stopping = False
        self._due = 0.0  # when the loop has something to do though nothing arrives
        self._wake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self._connect()

    def _bind(self, path: Path) -> zmq.Socket[bytes]:
        socket = self.context.socket(zmq.ROUTER)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        # No ROUTER_HANDOVER: with it, whoever may connect could take over another client's identity and replies.
        socket.set(zmq.MAXMSGSIZE, self.config.max_message_mb * 2**20)
        socket.set(zmq.SNDHWM, SEND_HWM)
        socket.set(zmq.RCVHWM, SEND_HWM)
        socket.set(zmq.LINGER, LINGER_MS)
        os.umask(0o117)
        try:
            socket.bind(endpoint(path))
        finally:
            os.umask(0o077)
        return socket

    def _connect(self) -> None:
        self.outbox.on_gone, self.outbox.on_slow = self.turns.gone, self.turns.slow
        self.engine.on_message, self.engine.on_state = self._from_engine, self._engine_state
        self.engine.on_death = self._engine_died
        for source in (self.work, self.control, self.log.fd, self._wake):
            self.poller.register(source, zmq.POLLIN)
        self.handlers: dict[type, Callable[[Call], None]] = {
            Hello: self._hello,
            Status: self._status,
            Generate: self.turns.generate,
            SessionAppend: self.turns.append,
            ModelList: self.models.list,
            ModelLoad: self.models.load,
            ModelUnload: self.models.unload,
            **handlers(self.desk),
        }

    # --- the loop ----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serves until stop() is called, then lets everything end in order."""
        self.notifier.send(READY="1", STATUS="starting the engine")
        self.engine.load(self.config.model, self.config.revision)
        while not self.stopping:
            self.step()
        self._shut_down()

    def stop(self) -> None:
        """Ends run(). Safe in a signal handler."""
        self.stopping = True

    def step(self) -> None:
        """One turn of the loop. What is not due is not looked at: a relayed token costs its own way only."""
        wait = max(0.0, self._due - time.monotonic())
        ready = dict(self.poller.poll(int(wait * 1000) + 1))
        if self._wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake, 4096)
        if self.work in ready:
            self._guard(self._drain, self.work, self._request)
        if self.control in ready:
            self._guard(self._drain, self.control, self._control)
        self._guard(self.engine.receive, ready)
        if self.log.fd in ready:
            self._guard(self.log.deliver)
        now = time.monotonic()
        if self.engine.eventful or self.outbox.stalled or now >= self._due or not self.engine.only_work(ready):
            self._guard(self._tick, now)
            self._due = time.monotonic() + self._wait_s()

    def _guard(self, step: Callable[..., None], *arguments: Any) -> None:
        """Runs one part of the loop; an unexpected exception is logged, and the loop goes on."""
        try:
            step(*arguments)
        except Exception:
            log.exception("unexpected error in the broker")

    def _wait_s(self) -> float:
        now = time.monotonic()
        wait = min(self.engine.wait_s(now), self.turns.next_deadline() - now, self.desk.census.due() - now)
        if self.outbox.stalled:
            wait = min(wait, RETRY_S)
        if self.notifier.interval:
            wait = min(wait, self.notifier.interval)
        return max(0.0, wait)

    def _tick(self, now: float) -> None:
        self.outbox.retry()
        self.turns.tick(now)
        self.engine.tick(now)
        self.models.tick()
        self.desk.census.give_up(now)
        self.outbox.table.expire(now)
        self.notifier.feed(now)

    def _drain(self, socket: zmq.Socket[bytes], take: Callable[[bytes, list[bytes], str], None]) -> None:
        for _ in range(MAX_MESSAGES):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._guard(take, frames[0].bytes, [frame.bytes for frame in frames[1:]], _owner(frames[-1]))

    # --- requests ----------------------------------------------------------------------------------------

    def _request(self, identity: bytes, frames: list[bytes], owner: str) -> None:
        try:
            header, request, raw = framing.decode_request(frames)
        except framing.BadFrame as error:
            self._refuse(self.work, identity, error.rid or "-", _typed(error))
            return
        try:
            self._dispatch(identity, (owner, header.rid), request, raw)
        except Exception:
            log.exception("unexpected error rid=%s type=%s", header.rid, type(request).__name__)
            unexpected = ErrorReply(ErrorCode.INTERNAL, "unexpected error in the broker")
            self._refuse(self.work, identity, header.rid, unexpected)

    def _dispatch(self, identity: bytes, key: Key, request: Any, raw: Sequence[bytes]) -> None:
        if isinstance(request, Attach):
            self._attach(identity, key, request)
        elif isinstance(request, READ_ONLY):
            self._call(Call(request, raw, b"", Stream(key, b"", identity, kept=False)))
        else:
            self._once(identity, key, request, raw)

    def _once(self, identity: bytes, key: Key, request: Any, raw: Sequence[bytes]) -> None:
        """A request that is run once however often it is sent. After an error that says so it is run again."""
        digest = report.digest(request, raw)
        known = self.outbox.table.find(key)
        if known is not None and known.digest and known.digest != digest:
            self._refuse(self.work, identity, key[1], invalid(f"request id {key[1]!r} was used for another request"))
        elif known is not None and not (known.finished and known.retryable):
            self.outbox.attach(known, identity, 0)
        else:
            credit = request.credit if isinstance(request, Generate) else 0
            stream = Stream(key, digest, identity, credit=credit)
            self.outbox.table.add(stream)
            self._call(Call(request, raw, digest, stream))

    def _call(self, call: Call) -> None:
        try:
            if self.stopping and not isinstance(call.request, READ_ONLY):
                raise ErrorReply(ErrorCode.SHUTTING_DOWN, "the daemon is shutting down")
            self.handlers[type(call.request)](call)
        except ErrorReply as error:
            self.outbox.end(call.stream, Error.of(error))
        except Exception:
            log.exception("unexpected error rid=%s type=%s", call.rid, type(call.request).__name__)
            self.outbox.fail(call.stream, ErrorCode.INTERNAL, "unexpected error in the broker")

    def _attach(self, identity: bytes, key: Key, request: Attach) -> None:
        """ATTACH: to a stream that is known, else to a turn in the log; its numbers then go on after `last_seq`."""
        known = self.outbox.table.find(key)
        if known is not None:
            self.outbox.attach(known, identity, request.last_seq)
            return
        stream = Stream(key, b"", identity, kept=False)
        stream.seq = request.last_seq

        def found(result: Any, error: ErrorReply | None) -> None:
            if result is not None:
                replay(self.outbox, stream, b"", result[1], result[0].name)
            else:
                unknown = invalid(f"request id {key[1]!r} is not known; send the request again")
                self.outbox.end(stream, Error.of(error or unknown))

        self.log.submit(lambda sessions: sessions.answered(*key), found)

    def _control(self, identity: bytes, frames: list[bytes], owner: str) -> None:
        try:
            header, request, _ = framing.decode_control(frames)
        except framing.BadFrame as error:
            self._refuse(self.control, identity, error.rid or "-", _typed(error))
            return
        key = (owner, header.rid)
        stream = self.outbox.table.find(key)
        match request:
            case Ping():
                self._send(self.control, identity, header, Pong(self.boot, stream is not None))
            case Cancel():
                self.turns.cancel(key, time.monotonic())
            case Credit() if stream is not None:
                self.outbox.grant(stream, request.events)

    def _refuse(self, socket: zmq.Socket[bytes], identity: bytes, rid: str, error: ErrorReply) -> None:
        """An ERROR outside of any stream: its number is 0."""
        log.info("refused rid=%s code=%s", rid, error.code.value)
        self._send(socket, identity, Header(rid), Error.of(error))

    def _send(self, socket: zmq.Socket[bytes], identity: bytes, header: Header, message: Any) -> None:
        with contextlib.suppress(zmq.ZMQError):  # a client that is gone or does not read loses this reply alone
            socket.send_multipart([identity, *framing.encode(header, message)], zmq.NOBLOCK)

    def _hello(self, call: Call) -> None:
        asked: Hello = call.request
        if protocol.VERSION not in asked.versions:
            raise ErrorReply(ErrorCode.UNSUPPORTED_VERSION, f"this daemon speaks version {protocol.VERSION}")
        welcome = Welcome(
            protocol.VERSION, f"atlasd {__version__}", self.boot, list(protocol.CAPABILITIES), HEARTBEAT_MS,
            self.config.max_message_mb * 2**20,
        )  # fmt: skip
        self.outbox.end(call.stream, welcome)

    def _status(self, call: Call) -> None:
        self.outbox.end(call.stream, report.status(self))

    # --- the engine --------------------------------------------------------------------------------------

    def _from_engine(self, message: Any, raw: Sequence[bytes]) -> None:
        if isinstance(message, Persisted):
            self.desk.persisted(message)
        elif isinstance(message, Located):
            self.desk.census.located(message)
        else:
            self.turns.take(message, raw)

    def _engine_state(self, state: State) -> None:
        self.notifier.status(report.state_line(state, self.engine))
        self.models.on_state(state)
        self.turns.tell_state(state)

    def _engine_died(self, reason: str) -> None:
        self.turns.engine_died(reason)
        self.desk.engine_died(reason)

    # --- the end -----------------------------------------------------------------------------------------

    def _shut_down(self) -> None:
        log.info("shutting down")
        self.notifier.send(STOPPING="1")
        self.turns.interrupt_all(ErrorCode.SHUTTING_DOWN, "the daemon is shutting down")
        self._step_until(lambda: not self.turns.live, CANCEL_S)
        self.engine.stop()
        self._step_until(lambda: self.engine.down, 60.0)
        self.engine.kill()
        self._step_until(lambda: not self.outbox.stalled, 1.0)
        self.log.close()
        signal.set_wakeup_fd(-1)
        for socket in (self.work, self.control):
            socket.close()
        self.context.term()

    def _step_until(self, condition: Callable[[], bool], limit: float) -> None:
        end = time.monotonic() + limit
        while not condition() and time.monotonic() < end:
            self.step()


def _owner(frame: zmq.Frame) -> str:
    """The uid of the peer, from "localhost:UID:GID:PID"; the daemon's own where ZeroMQ does not tell."""
    try:
        return str(frame.get("Peer-Address")).split(":")[1]
    except (zmq.ZMQError, IndexError):
        return str(os.getuid())


def _typed(error: framing.BadFrame) -> ErrorReply:
    if error.version:
        return ErrorReply(ErrorCode.UNSUPPORTED_VERSION, str(error))
    return ErrorReply(ErrorCode.INVALID_PARAMETER if error.parameter else ErrorCode.BAD_FRAME, str(error))


def run(config: Config, engine_command: Sequence[str] | None = None, limits: Limits | None = None) -> None:
    """Runs a daemon until SIGTERM or SIGINT. Raises PlaceError, LogError."""
    sys.setswitchinterval(0.0005)  # the log's thread must not hold up the loop for the default 5 ms
    os.umask(0o077)
    place = Place(Path(config.socket), Path(config.state_dir))
    try:
        broker = Broker(config, place, engine_command, limits)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: broker.stop())
        signal.signal(signal.SIGHUP, lambda *_: log.info("SIGHUP ignored: restart to change the configuration"))
        print(f"atlasd listens on {config.socket}, state in {config.state_dir}", file=sys.stderr, flush=True)
        broker.run()
    finally:
        place.close()
