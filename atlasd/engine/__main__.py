"""The engine process: `python -m atlasd.engine`, started by the broker with an EngineSpec on standard input."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from atlas_client.errors import ErrorCode, ErrorReply
from atlas_client.protocol import Error

from atlasd.config import Config

from . import hub
from .link import Link
from .messages import Beat, EngineSpec, State

if TYPE_CHECKING:
    from .worker import Worker

log = logging.getLogger("atlasd.engine")

PR_SET_PDEATHSIG = 1
REPORT_EVERY_S = 0.1
# OpenMP threads wait for each other by spinning. By default they do so for milliseconds, and on a busy machine the
# thread waited for is not running: a token took 280 ms instead of 25. After a thousand rounds they sleep.
SPIN_ROUNDS = "1000"


class Pulse:
    """What the control thread says once a second; the main thread refreshes the parts it owns."""

    def __init__(self) -> None:
        self.worker: Worker | None = None

    def __call__(self) -> Beat:
        worker = self.worker
        if worker is None:
            return Beat(steps=0, running=0, waiting=0)
        return Beat(
            steps=worker.steps + worker.forward.layers,
            running=len(worker.scheduler.running),
            waiting=len(worker.scheduler.waiting),
            tiers=worker.tiers(),
            counters=worker.store.counters() | worker.tokens,
            warnings=worker.store.warnings,
        )


class Reporter:
    """Sends the load's progress, ten times a second at most. Called from loader threads."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._due = 0.0
        self._lock = threading.Lock()

    def __call__(self, phase: str, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        with self._lock:
            if now < self._due and done < total:
                return
            self._due = now + REPORT_EVERY_S
        self._link.send(State(phase, done, total, unit))


def main() -> int:
    """Reads the spec, loads the model, serves. Exit status 0 after SHUTDOWN, 3 when the model can't be served."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a terminal's Ctrl-C goes to the broker, which shuts this down in order
    sys.setswitchinterval(0.0005)
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_ROUNDS)  # read when torch loads its OpenMP library
    spec = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=EngineSpec)
    die_with(spec.broker_pid)
    config = msgspec.convert(spec.config, Config)
    logging.basicConfig(level=config.log_level.upper(), format="%(levelname)s engine: %(message)s", stream=sys.stderr)
    pulse = Pulse()
    link = Link(spec, pulse)
    link.send(State("starting"))
    try:
        worker = build(spec, config, link)
    except ErrorReply as error:
        log.error("%s (%s)", error, error.next_step)
        link.send(State("failed", error=Error.of(error)))
        link.close()
        return 3
    pulse.worker = worker
    info = worker.loaded
    link.send(State("ready", model=info.info, tokenizer=info.tokenizer_id, kv_identity=info.identity))
    worker.run()
    link.close()
    return 0


def die_with(broker_pid: int) -> None:
    """The kernel kills this process when the broker dies: two engines must never share a state directory."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != broker_pid:  # it died before the call above
        sys.exit(1)


def build(spec: EngineSpec, config: Config, link: Link) -> Worker:
    """Finds the model, imports torch, loads, opens the tiers. Raises ErrorReply, whatever went wrong."""
    try:
        report = Reporter(link)
        directory = find(spec, config, report)
        report("loading", 0, 0, "")
        from .build import build_worker  # imports torch: seconds, which a wrong name should not wait for

        return build_worker(spec, directory, config, link, report)
    except ErrorReply:
        raise
    except Exception as error:
        log.exception("the engine can't start")
        raise ErrorReply(ErrorCode.INTERNAL, f"the engine can't start: {type(error).__name__}: {error}") from error


def find(spec: EngineSpec, config: Config, report: Reporter) -> Path:
    """The model's directory, fetched when it is a hub id, its files checked. Raises ErrorReply."""
    directory = hub.resolve(
        spec.model,
        revision=spec.revision,
        token=_token(config.hub_token_file),
        offline=config.offline,
        report=lambda done, total: report("downloading", done, total, "bytes"),
    )
    hub.check(directory)
    return directory


def _token(file: str | None) -> str | None:
    if file is None:
        return None
    try:
        return Path(file).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ErrorReply(ErrorCode.INVALID_PARAMETER, f"hub token file {file}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
