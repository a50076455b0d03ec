"""What the daemon says about itself, and how a request is told from another."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from atlas_client.protocol import StatusReply

from .. import __version__
from ..engine.messages import State

if TYPE_CHECKING:
    from .server import Broker
    from .supervisor import Supervisor

_encode = msgspec.msgpack.Encoder(order="deterministic").encode
_PAGE = os.sysconf("SC_PAGE_SIZE")


def digest(request: Any, raw: Sequence[bytes]) -> bytes:
    """Names the content of a request, however its client ordered the fields."""
    plain = msgspec.to_builtins(request, str_keys=True)  # maps with integer keys can't be ordered
    summary = hashlib.blake2b(_encode(plain), digest_size=16)
    for frame in raw:
        summary.update(len(frame).to_bytes(8, "little") + frame)
    return summary.digest()


def rss_bytes(pid: int | str = "self") -> int:
    """Resident bytes of a process; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def state_line(state: State, engine: Supervisor) -> str:
    """One line for a person: what the engine is doing."""
    if state.state == "failed":
        return f"model {engine.model}: {engine.error}"
    share = f" {100 * state.done // state.total} %" if state.total else ""
    return f"model {engine.model}: {state.state}{share}"


def status(broker: Broker) -> StatusReply:
    """The answer to STATUS."""
    engine, turns = broker.engine, broker.turns
    beat = engine.pulse.beat if engine.pid else None  # the memory of an engine that is gone is gone too
    return StatusReply(
        version=__version__, pid=os.getpid(), boot=broker.boot, uptime_s=time.monotonic() - broker.started,
        socket=broker.config.socket, state_dir=broker.config.state_dir, rss_bytes=rss_bytes(),
        sessions=broker.log.sessions, queued=turns.waiting, running=turns.running,
        engine_state=engine.state.state, engine_pid=engine.pid, engine_restarts=engine.restarts,
        engine_rss_bytes=rss_bytes(engine.pid) if engine.pid else 0, engine_error=engine.error,
        model=broker.models.current(), tiers=beat.tiers if beat else [], counters=beat.counters if beat else {},
        counters_at=engine.pulse.beat_at - broker.started if beat else 0.0,
        warnings=[*broker.log.warnings, *(beat.warnings if beat else [])],
    )  # fmt: skip
