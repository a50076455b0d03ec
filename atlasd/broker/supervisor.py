"""The engine's life: start, heartbeat, death, restart, stop. One engine process at a time, one pair of sockets each."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Container, Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq

from ..config import Config
from ..engine.messages import (
    Beat,
    Cancel,
    EngineSpec,
    FromEngine,
    FromEngineControl,
    Relay,
    Shutdown,
    State,
)

log = logging.getLogger("atlasd.supervisor")

WINDOW_S = 60.0
MAX_DEATHS = 5  # in WINDOW_S; then the engine stays down until a model is loaded
FIRST_SIGN_S = 60.0  # an engine that imports its libraries beats later than a running one
STUCK_FACTOR = 4  # heartbeats without a step while requests run: a long forward pass is no hang
FLUSH_S = 20.0  # for the write-behind queue, before SIGTERM
TERM_S = 3.0  # before SIGKILL
NOBLOCK = int(zmq.NOBLOCK)  # a plain integer: arithmetic on enums costs more than receiving
MAX_MESSAGES = 64  # taken from one socket before others get their turn

_encode = msgspec.msgpack.Encoder().encode
_work = msgspec.msgpack.Decoder(FromEngine)
_control = msgspec.msgpack.Decoder(FromEngineControl)


class RestartPolicy:
    """When to start an engine again that died: at once, later after repeated quick deaths, at last never."""

    def __init__(self) -> None:
        self.deaths: collections.deque[float] = collections.deque(maxlen=MAX_DEATHS)

    def delay(self, now: float) -> float | None:
        """Records a death and returns the seconds to wait; None: give up."""
        self.deaths.append(now)
        recent = sum(now - death < WINDOW_S for death in self.deaths)
        if recent >= MAX_DEATHS:
            return None
        return 0.0 if recent == 1 else 0.1 * 2.0**recent

    def forget(self) -> None:
        self.deaths.clear()


class Pulse:
    """Judges from beats whether an engine hangs. Times in seconds of one monotonic clock."""

    def __init__(self, now: float, heartbeat: float) -> None:
        self.heartbeat = heartbeat
        self.beat: Beat | None = None
        self.beat_at = now
        self._step_at = now

    def take(self, beat: Beat, now: float) -> None:
        """Records a beat."""
        if self.beat is None or beat.steps != self.beat.steps or not beat.running:
            self._step_at = now
        self.beat = beat
        self.beat_at = now

    def problem(self, now: float) -> str:
        """What is wrong, or nothing."""
        limit = self.heartbeat if self.beat else max(self.heartbeat, FIRST_SIGN_S)
        if now - self.beat_at > limit:
            return f"no heartbeat for {now - self.beat_at:.0f} s"
        if now - self._step_at > STUCK_FACTOR * self.heartbeat and self.beat and self.beat.running:
            return f"no step for {now - self._step_at:.0f} s while {self.beat.running} requests run"
        return ""


class _Engine:
    """One engine process with its sockets."""

    def __init__(self, command: Sequence[str], spec: EngineSpec, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.work = _pair(context, spec.work_endpoint)
        self.control = _pair(context, spec.control_endpoint)
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE)
        except OSError:
            self.work.close(0)
            self.control.close(0)
            raise
        self.pidfd = os.pidfd_open(self.process.pid)
        self.stopping = 0.0  # when the next, harder way of stopping is due; 0: it is not to stop
        self.pressed = False  # SIGTERM was sent
        self.loaded = False  # it has been ready, so there may be pages to write before it goes
        self.cause = ""  # why it was killed
        if self.process.stdin:
            with contextlib.suppress(BrokenPipeError):  # its death is noticed by the pidfd
                self.process.stdin.write(_encode(spec))
                self.process.stdin.close()

    def close(self) -> None:
        os.close(self.pidfd)
        self.work.close(0)
        self.control.close(0)


def _pair(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.PAIR)
    socket.set(zmq.SNDHWM, 0)  # bounded by max_queue
    socket.set(zmq.RCVHWM, 10_000)  # a loop that is behind slows the engine down instead of growing
    socket.set(zmq.LINGER, 0)
    socket.bind(endpoint)
    return socket


class Supervisor:
    """Runs the engine. The owner sets `on_message(message, raw)`, `on_state(state)` and `on_death(reason)`; they run in
    receive() and tick(), called by the broker's loop. Sockets and the pidfd are kept registered with `poller`."""

    def __init__(
        self, config: Config, run_dir: Path, context: zmq.Context[zmq.Socket[bytes]], poller: zmq.Poller,
        command: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.run_dir = run_dir
        self.context = context
        self.poller = poller
        self.command = command or [sys.executable, "-P", "-m", "atlasd.engine"]  # no imports from the cwd
        self.model = config.model
        self.revision = config.revision
        self.state = State("stopped")
        self.error = ""
        self.restarts = 0
        self.eventful = False
        self.pulse = Pulse(0.0, config.heartbeat_s)
        self.policy = RestartPolicy()
        self.on_message: Callable[[Any, Sequence[bytes]], None] = lambda message, raw: None
        self.on_state: Callable[[State], None] = lambda state: None
        self.on_death: Callable[[str], None] = lambda reason: None
        self._engine: _Engine | None = None
        self._start_at: float | None = None  # a start that is due then

    # --- what others ask ---------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        return self.state.state == "ready" and self._engine is not None and not self._engine.stopping

    @property
    def pid(self) -> int:
        return self._engine.process.pid if self._engine else 0

    @property
    def down(self) -> bool:
        """No engine runs and none is about to."""
        return self._engine is None and self._start_at is None

    @property
    def stopping(self) -> bool:
        return self._engine is not None and self._engine.stopping > 0

    def load(self, model: str, revision: str | None) -> None:
        """Starts an engine with a model, after the running one has stopped."""
        self.model, self.revision = model, revision
        self.policy.forget()
        self.error = ""
        self._start_at = time.monotonic()
        if self._engine:
            self._begin_stop()
        self._set(State("starting"))

    def stop(self) -> None:
        """Lets the engine finish its write-behind queue and exit; harder if it takes too long."""
        self._start_at = None
        if self._engine:
            self._begin_stop()
        else:
            self._set(State("stopped"))

    def send(self, message: Any, raw: bytes = b"") -> None:
        """SUBMIT or PERSIST. Call when `ready`."""
        if self._engine:
            with contextlib.suppress(zmq.Again):  # it has just died; on_death says what becomes of the message
                self._engine.work.send_multipart([_encode(message), raw], zmq.NOBLOCK)

    def cancel(self, rid: str) -> None:
        """Tells the engine to end a request."""
        if self._engine:
            with contextlib.suppress(zmq.Again):  # as in send()
                self._engine.control.send(_encode(Cancel(rid)), zmq.NOBLOCK)

    # --- the loop's calls --------------------------------------------------------------------------------

    def receive(self, ready: Container[Any], limit: int = MAX_MESSAGES) -> None:
        """Takes what the engine has sent on the sockets that are `ready`, up to a limit. `eventful` then says whether
        there was more than relayed events."""
        self.eventful = False
        engine = self._engine
        if engine is None:
            return
        if engine.work in ready:
            with contextlib.suppress(zmq.Again):
                for _ in range(limit):
                    self._take(engine.work.recv_multipart(NOBLOCK))
        if engine.control in ready:
            with contextlib.suppress(zmq.Again):
                while True:
                    self.pulse.take(_control.decode(engine.control.recv(NOBLOCK)), time.monotonic())

    def only_work(self, ready: Collection[Any]) -> bool:
        """Whether nothing but the engine's work socket is ready."""
        return not ready or (len(ready) == 1 and self._engine is not None and self._engine.work in ready)

    def tick(self, now: float) -> None:
        """Notices death and hanging, goes on with a stop, starts what is due."""
        engine = self._engine
        if engine and engine.process.poll() is not None:
            self._bury(engine, now)
        elif engine and engine.stopping:
            self._press(engine, now)
        elif engine and (problem := self.pulse.problem(now)):
            log.error("engine hangs: %s; killing pid %d", problem, engine.process.pid)
            engine.cause = f"the engine hung: {problem}"
            engine.process.kill()
        if self._engine is None and self._start_at is not None and now >= self._start_at:
            self._start(now)

    def wait_s(self, now: float) -> float:
        """Seconds until tick() has something to do."""
        due = [now + 1.0]
        if self._engine is None and self._start_at is not None:
            due.append(self._start_at)
        if self._engine and self._engine.stopping:
            due.append(self._engine.stopping)
        return max(0.0, min(due) - now)

    def kill(self) -> None:
        """Ends the engine at once, for a broker that exits."""
        self._start_at = None
        if engine := self._engine:
            engine.process.kill()
            engine.process.wait()
            self._forget(engine)

    # --- parts -------------------------------------------------------------------------------------------

    def _start(self, now: float) -> None:
        self._start_at = None
        # Names nobody has seen: the engine of a broker that was killed goes on trying to reach its own for a moment,
        # and a PAIR socket serves whoever comes first.
        token = os.urandom(3).hex()
        work, control = (f"ipc://{self.run_dir}/{token}{kind}" for kind in "wc")
        spec = EngineSpec(
            work_endpoint=work, control_endpoint=control, state_dir=self.config.state_dir, model=self.model,
            revision=self.revision, config=msgspec.to_builtins(self.config), broker_pid=os.getpid(),
        )  # fmt: skip
        try:
            engine = _Engine(self.command, spec, self.context)
        except OSError as error:
            reason = f"the engine can't be started: {error}"
            log.error("%s", reason)
            self._died(reason, now)
            return
        self._engine = engine
        for source in (engine.work, engine.control, engine.pidfd):
            self.poller.register(source, zmq.POLLIN)
        self.pulse = Pulse(now, self.config.heartbeat_s)
        log.info("engine started pid=%d model=%s", engine.process.pid, self.model)
        self._set(State("starting"))

    def _take(self, frames: list[bytes]) -> None:
        message = _work.decode(frames[0])
        self.eventful = self.eventful or not isinstance(message, Relay)
        if isinstance(message, State):
            if self._engine and message.state == "failed":
                self._engine.stopping = time.monotonic() + TERM_S  # it exits by itself, or is made to
            elif self._engine and message.state == "ready":
                self._engine.loaded = True
            if not self.stopping or message.state == "failed":
                self._set(message)
        else:
            self.on_message(message, frames[1:])

    def _set(self, state: State) -> None:
        if state.state == "ready":
            self.error = ""
        elif state.error:
            self.error = state.error.message
        if state.state != self.state.state:
            log.info("engine state=%s model=%s %s", state.state, self.model, self.error)
        self.state = state
        self.on_state(state)

    def _begin_stop(self) -> None:
        if self._engine and not self._engine.stopping:
            self._engine.stopping = time.monotonic() + (FLUSH_S if self._engine.loaded else 0.0)
            with contextlib.suppress(zmq.ZMQError):
                self._engine.work.send(_encode(Shutdown()), zmq.NOBLOCK)

    def _press(self, engine: _Engine, now: float) -> None:
        """The next, harder way of stopping: SIGTERM, then SIGKILL."""
        if now < engine.stopping:
            return
        log.warning("engine pid=%d does not stop", engine.process.pid)
        engine.process.send_signal(signal.SIGKILL if engine.pressed else signal.SIGTERM)
        engine.pressed = True
        engine.stopping = now + TERM_S

    def _bury(self, engine: _Engine, now: float) -> None:
        """Takes what it sent before it died, then says so and decides what comes next."""
        self.receive((engine.work,), limit=1_000_000)
        reason = engine.cause or _cause(engine.process.returncode)
        stopping = engine.stopping > 0
        self._forget(engine)
        if self.state.state == "failed":
            self.on_death(self.error)
        elif stopping:
            log.info("engine stopped")
            self.on_death("the engine was stopped")
            self._set(State("starting" if self._start_at is not None else "stopped"))
        else:
            self.restarts += 1
            log.error("engine died: %s", reason)
            self._died(reason, now)

    def _died(self, reason: str, now: float) -> None:
        delay = self.policy.delay(now)
        self.error = reason
        self._start_at = None if delay is None else now + delay
        self.on_death(reason)
        if delay is not None:
            self._set(State("starting"))
            return
        self.error = f"{reason}; it died {MAX_DEATHS} times within {WINDOW_S:.0f} s, see the daemon's log"
        self._set(State("failed"))

    def _forget(self, engine: _Engine) -> None:
        for source in (engine.work, engine.control, engine.pidfd):
            with contextlib.suppress(KeyError):
                self.poller.unregister(source)
        engine.close()
        self._engine = None


def _cause(code: int) -> str:
    if code < 0:
        memory = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"the engine was ended by {signal.Signals(-code).name}{memory}"
    return f"the engine exited with status {code}"
