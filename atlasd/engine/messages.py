"""The contract between broker and engine: two ZeroMQ PAIR sockets in the broker's private directory.

Work socket: SUBMIT, PERSIST, LOCATE, SHUTDOWN down; STATE, STARTED, RELAY, FINISHED, FAILED, PERSISTED, LOCATED up.
Control socket: CANCEL down (read between two forward passes), BEAT up (from a thread of its own, once a second).

Frames: [message as msgpack] [raw]*. Neither torch nor zmq is imported here.
"""

from __future__ import annotations

from typing import Any

import msgspec
from atlas_client.protocol import Error, Generate, ModelInfo, TierUsage, Timings, Usage


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine process is started with; msgpack on its standard input."""

    work_endpoint: str
    control_endpoint: str
    state_dir: str
    model: str  # a directory, a hub id, or "demo"
    revision: str | None
    config: dict[str, Any]  # the daemon's Config as built-ins
    broker_pid: int = 0  # the parent to live with: if getppid() is another after PR_SET_PDEATHSIG, it is dead already


# --- broker to engine -------------------------------------------------------------------------------


class Submit(msgspec.Struct, tag="submit"):
    """One request. Raw frame 0: the session's token ids so far (little-endian uint32), empty without a session."""

    rid: str
    owner: str  # isolates prefix reuse; part of every page key
    session: str | None  # session id
    request: Generate  # with seed, and exactly one of prompt, tokens, messages
    append_only: bool = False  # SESSION.APPEND: no token is generated
    kv_identity: str = ""  # identity the session's last turn was computed under, to say why reuse stopped
    last_finish: str = ""  # finish_reason of the session's last turn
    arrived: float = 0.0  # CLOCK_MONOTONIC seconds at the broker; time to first token counts from here


class Persist(msgspec.Struct, tag="persist"):
    """Writes what the session still has in memory only. Raw frame 0: its token ids. Answer: PERSISTED."""

    rid: str
    owner: str
    purge: bool = False  # erase its pages from every tier instead
    keep: int = 0  # with purge: pages that end within that many tokens stay, other sessions share them


class Locate(msgspec.Struct, tag="locate"):
    """Asks where the K/V of sessions lies. Raw frame 0: their token ids, one session after the other; `counts` says how
    many each has. Answer: LOCATED."""

    rid: str
    owner: str
    counts: list[int]


class Shutdown(msgspec.Struct, tag="shutdown"):
    """Finish the write-behind queue, then exit 0. Running requests have been cancelled by the broker."""


class Cancel(msgspec.Struct, tag="cancel"):
    rid: str


ToEngine = Submit | Persist | Locate | Shutdown


# --- engine to broker -------------------------------------------------------------------------------


class State(msgspec.Struct, tag="state"):
    """The engine's life. `error` is set in state "failed"; the engine then exits."""

    state: str  # starting | downloading | loading | quantizing | ready | failed
    done: int = 0
    total: int = 0
    unit: str = ""  # bytes | tensors
    model: ModelInfo | None = None
    tokenizer: str = ""  # fingerprint: sessions of another one are refused with MODEL_MISMATCH
    kv_identity: str = ""
    error: Error | None = None


class Started(msgspec.Struct, tag="started"):
    """The request was admitted. Until then it may be given to a new engine; after, it dies with this one."""

    rid: str
    queue_ms: float


class Relay(msgspec.Struct, tag="relay"):
    """Raw frame 0 is a client message body (PROGRESS or TOKENS), forwarded as it is."""

    rid: str
    progress: bool  # superseded by the next one: need not be kept for re-attachment


class Finished(msgspec.Struct, tag="finished", kw_only=True):
    """Raw frame 0: token ids the prompt added to the session; raw frame 1: generated ids (uint32)."""

    rid: str
    finish_reason: str
    text: str
    prompt_text: str
    usage: Usage
    timings: Timings
    kv_durable: bool
    kv_identity: str
    tokenizer: str
    reset_reason: str
    seed: int | None


class Failed(msgspec.Struct, tag="failed"):
    rid: str
    error: Error


class Persisted(msgspec.Struct, tag="persisted"):
    rid: str
    pages: int
    error: Error | None = None


class Located(msgspec.Struct, tag="located"):
    """For each session of the LOCATE its tokens by tier: device, host, disk, nowhere."""

    rid: str
    where: list[dict[str, int]]


class Beat(msgspec.Struct, tag="beat", kw_only=True):
    """Control socket, once a second, also while a long forward pass runs."""

    steps: int  # main-loop turns and attention layers so far: unchanged while requests run means hung
    running: int
    waiting: int
    tiers: list[TierUsage] = []
    counters: dict[str, int] = {}
    warnings: list[str] = []


FromEngine = State | Started | Relay | Finished | Failed | Persisted | Located
FromEngineControl = Beat
