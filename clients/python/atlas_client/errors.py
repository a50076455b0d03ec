"""The error tree. One closed list of codes, each with `retryable` and a next step.

AtlasError
├── DaemonUnavailable        no daemon answers on the socket, or it went away for good
└── ErrorReply               the daemon's typed answer, `.code` from ErrorCode
"""

from __future__ import annotations

import enum


class ErrorCode(enum.StrEnum):
    """Every code an ERROR message may carry. The list is closed for protocol version 1."""

    BAD_FRAME = "BAD_FRAME"
    UNSUPPORTED_VERSION = "UNSUPPORTED_VERSION"
    UNAUTHORIZED = "UNAUTHORIZED"
    NO_SUCH_SESSION = "NO_SUCH_SESSION"
    SESSION_BUSY = "SESSION_BUSY"
    NO_SUCH_MODEL = "NO_SUCH_MODEL"
    MODEL_NOT_LOADED = "MODEL_NOT_LOADED"
    MODEL_MISMATCH = "MODEL_MISMATCH"
    CONTEXT_OVERFLOW = "CONTEXT_OVERFLOW"
    INVALID_PARAMETER = "INVALID_PARAMETER"
    QUEUE_FULL = "QUEUE_FULL"
    DEADLINE = "DEADLINE"
    CANCELLED = "CANCELLED"
    SLOW_CONSUMER = "SLOW_CONSUMER"
    OUT_OF_VRAM = "OUT_OF_VRAM"
    OUT_OF_RAM = "OUT_OF_RAM"
    DISK_FULL = "DISK_FULL"
    ENGINE_DIED = "ENGINE_DIED"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    INTERNAL = "INTERNAL"


RETRYABLE = frozenset(
    {
        ErrorCode.SESSION_BUSY,
        ErrorCode.MODEL_NOT_LOADED,
        ErrorCode.QUEUE_FULL,
        ErrorCode.DEADLINE,
        ErrorCode.SLOW_CONSUMER,
        ErrorCode.OUT_OF_VRAM,
        ErrorCode.OUT_OF_RAM,
        ErrorCode.ENGINE_DIED,
        ErrorCode.SHUTTING_DOWN,
    }
)

NEXT_STEP = {
    ErrorCode.BAD_FRAME: "update the client; see clients/PROTOCOL.md",
    ErrorCode.UNSUPPORTED_VERSION: "use a client and a daemon of the same protocol version",
    ErrorCode.UNAUTHORIZED: "ask the administrator to add you to the daemon's group",
    ErrorCode.NO_SUCH_SESSION: "`atlasctl session list` shows the sessions there are",
    ErrorCode.SESSION_BUSY: "wait for the running turn, cancel it, or fork the session",
    ErrorCode.NO_SUCH_MODEL: "`atlasctl model list` shows what can be loaded",
    ErrorCode.MODEL_NOT_LOADED: "load it with `atlasctl model load NAME`, or wait until it is ready",
    ErrorCode.MODEL_MISMATCH: "load the model the session was made with, or start a new session",
    ErrorCode.CONTEXT_OVERFLOW: "shorten the prompt, truncate the session, or raise --max-context",
    ErrorCode.INVALID_PARAMETER: "correct the parameter and send the request again",
    ErrorCode.QUEUE_FULL: "try again when running requests have finished",
    ErrorCode.DEADLINE: "try again, or raise the deadline",
    ErrorCode.CANCELLED: "send the request again if it is still wanted",
    ErrorCode.SLOW_CONSUMER: "read faster, then re-attach with the last sequence number",
    ErrorCode.OUT_OF_VRAM: "lower --max-context or the number of parallel requests",
    ErrorCode.OUT_OF_RAM: "free memory, or ask for less of it with --kv-vram-gb and --kv-ram-gb",
    ErrorCode.DISK_FULL: "free space on the disk of the state directory and of --kv-disk-path",
    ErrorCode.ENGINE_DIED: "send the request again; the daemon has started a new engine",
    ErrorCode.SHUTTING_DOWN: "try again when the daemon is back",
    ErrorCode.INTERNAL: "see the daemon's log, and report it",
}


class AtlasError(Exception):
    """Base of every error this package raises."""


class DaemonUnavailable(AtlasError):
    """No daemon answers on the socket. `next_step` says how to start one or gain access."""

    def __init__(self, message: str, next_step: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step
        self.refused = refused  # the path exists, but this user may not open it


class ErrorReply(AtlasError):
    """The daemon's terminal ERROR reply to one request."""

    def __init__(self, code: ErrorCode, message: str, next_step: str = "", *, retryable: bool | None = None) -> None:
        super().__init__(f"{code.value}: {message}")
        self.code = code
        self.message = message
        self.next_step = next_step or NEXT_STEP[code]
        self.retryable = code in RETRYABLE if retryable is None else retryable
