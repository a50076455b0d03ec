"""Protocol version 1: every message, shared by clients and daemon. `framing` puts them on the wire.

clients/PROTOCOL.md is the authority; this module is its Python form. Unknown fields are ignored,
an unknown "type" is answered with BAD_FRAME. Raw frames carry token ids (little-endian uint32)
or session archives and are named in the message that carries them.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from .errors import ErrorCode, ErrorReply

VERSION = 1
CAPABILITIES = ("generate", "sessions", "attach", "models", "credit", "where")
MAX_MESSAGE_BYTES = 32 * 1024 * 1024

Rid = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
SessionName = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class Header(msgspec.Struct, omit_defaults=True):
    """`rid` names the request (chosen by the client, idempotent); `seq` counts its replies from 1."""

    rid: Rid
    seq: Count = 0


# --- values ---------------------------------------------------------------------------------------


class ChatMessage(msgspec.Struct):
    role: str
    content: str


class Sampling(msgspec.Struct, omit_defaults=True, kw_only=True):
    """How tokens are drawn. None means the model's own generation_config, else greedy."""

    max_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None  # None: 256
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None  # 0: greedy
    top_k: Annotated[int, msgspec.Meta(ge=0)] | None = None  # 0: off
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0)] | None = None
    presence_penalty: Annotated[float, msgspec.Meta(ge=-10, le=10)] = 0.0
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-10, le=10)] = 0.0
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] | None = None  # None: drawn and reported in DONE
    stop: Annotated[list[Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]], msgspec.Meta(max_length=32)] = []
    logit_bias: dict[int, float] = {}
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=10_000)] | None = None  # top-n per token; None: none
    ignore_eos: bool = False


class Usage(msgspec.Struct):
    """Tokens. prompt = reused (in memory) + restored (from RAM tier or disk) + prefilled (computed)."""

    prompt: int = 0
    reused: int = 0
    restored: int = 0
    prefilled: int = 0
    generated: int = 0


class Timings(msgspec.Struct):
    """Milliseconds but for the rate; ttft is from arrival at the broker to the first token."""

    queue_ms: float = 0.0
    restore_ms: float = 0.0
    prefill_ms: float = 0.0
    ttft_ms: float = 0.0
    decode_tokens_per_s: float = 0.0


class TokenLogprob(msgspec.Struct, omit_defaults=True):
    """Natural-log probabilities under the model itself (before temperature and filters)."""

    id: int
    logprob: float
    top: list[tuple[int, float]] = []


class TurnInfo(msgspec.Struct, omit_defaults=True):
    """One turn: tokens [start, start + prompt_tokens + generated_tokens) of the session."""

    index: int
    rid: str
    start: int
    prompt_tokens: int
    generated_tokens: int
    finish_reason: str
    created: float  # Unix seconds
    prompt: str = ""  # what the client sent, as text
    text: str = ""  # what the model answered


class SessionInfo(msgspec.Struct, omit_defaults=True):
    name: str
    id: str
    tokens: int
    turns: int
    created: float
    updated: float
    model: str = ""
    parent: str = ""  # session id this one was forked from
    forked_at: int = 0  # tokens shared with the parent at the fork
    busy: bool = False
    where: dict[str, int] = {}  # tokens by tier: device | host | disk | nowhere; empty: not asked for, or not known


class ModelInfo(msgspec.Struct, omit_defaults=True):
    name: str
    state: str  # available | downloading | loading | ready | failed | unloaded
    path: str = ""
    architecture: str = ""
    fingerprint: str = ""
    quantization: str = ""
    layers_quantized: int = 0
    layers_kept: int = 0
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    max_context: int = 0
    vocab_size: int = 0
    device: str = ""
    dtype: str = ""
    error: str = ""


class TierUsage(msgspec.Struct):
    """One tier in pages of `page_bytes`: free + open + sealed = total when idle."""

    name: str  # device | host | disk
    total: int
    free: int
    open: int
    sealed: int
    page_bytes: int
    bytes_used: int
    limit_bytes: int


# --- requests (client to broker) -------------------------------------------------------------------


class Hello(msgspec.Struct, tag_field="type", tag="hello"):
    """Optional first message: which versions and capabilities the client speaks."""

    client: str
    versions: list[int] = msgspec.field(default_factory=lambda: [VERSION])
    capabilities: list[str] = []


class Generate(msgspec.Struct, tag_field="type", tag="generate", omit_defaults=True, kw_only=True):
    """Exactly one of prompt, tokens, messages. Replies: ACCEPTED, PROGRESS*, TOKENS*, then DONE or ERROR."""

    prompt: str | None = None
    tokens: list[Count] | None = None
    messages: list[ChatMessage] | None = None
    session: SessionName | None = None  # created when it does not exist
    sampling: Sampling = msgspec.field(default_factory=Sampling)
    stream: bool = True  # False: no TOKENS events
    detach: bool | None = None  # go on when the client vanishes; None: yes for sessions, no otherwise
    model: str | None = None  # refuse with MODEL_NOT_LOADED unless this model is loaded
    deadline_ms: Annotated[int, msgspec.Meta(ge=1)] | None = None
    credit: Count = 0  # events that may be sent before CREDIT is granted; 0: unlimited


class Attach(msgspec.Struct, tag_field="type", tag="attach"):
    """Header.rid names a request sent before; its events after `last_seq` are sent again and go on."""

    last_seq: Count = 0


class SessionOpen(msgspec.Struct, tag_field="type", tag="session.open"):
    name: SessionName
    create: bool = True


class SessionAppend(msgspec.Struct, tag_field="type", tag="session.append", omit_defaults=True, kw_only=True):
    """Adds text to a session and computes its KV, generating nothing. Replies as GENERATE does."""

    session: SessionName
    prompt: str | None = None
    tokens: list[Count] | None = None
    messages: list[ChatMessage] | None = None


class SessionFork(msgspec.Struct, tag_field="type", tag="session.fork", omit_defaults=True):
    session: SessionName
    new_name: SessionName
    at_turn: Count | None = None  # keep this many turns
    at_token: Count | None = None


class SessionTruncate(msgspec.Struct, tag_field="type", tag="session.truncate", omit_defaults=True):
    session: SessionName
    turns: Count | None = None  # keep this many turns
    tokens: Count | None = None


class SessionRename(msgspec.Struct, tag_field="type", tag="session.rename"):
    session: SessionName
    new_name: SessionName


class SessionCheckpoint(msgspec.Struct, tag_field="type", tag="session.checkpoint"):
    """Returns when every sealed page of the session that was still in memory is on disk."""

    session: SessionName


class SessionList(msgspec.Struct, tag_field="type", tag="session.list", omit_defaults=True):
    where: bool = False  # with the tokens by tier of the first sessions
    limit: Count = 0  # at most so many sessions; 0: all


class SessionShow(msgspec.Struct, tag_field="type", tag="session.show", omit_defaults=True):
    session: SessionName
    text: bool = False  # with each turn's text
    where: bool = False  # with its tokens by tier


class SessionExport(msgspec.Struct, tag_field="type", tag="session.export"):
    session: SessionName


class SessionImport(msgspec.Struct, tag_field="type", tag="session.import"):
    """One raw frame: the archive that SESSION.EXPORT returned."""

    name: SessionName


class SessionDelete(msgspec.Struct, tag_field="type", tag="session.delete"):
    session: SessionName
    purge: bool = False  # also erase its KV pages from disk


class ModelList(msgspec.Struct, tag_field="type", tag="model.list"):
    pass


class ModelLoad(msgspec.Struct, tag_field="type", tag="model.load", omit_defaults=True):
    """Replies: PROGRESS* (download, load, quantize), then MODEL or ERROR."""

    model: str
    revision: str | None = None


class ModelUnload(msgspec.Struct, tag_field="type", tag="model.unload"):
    pass


class Status(msgspec.Struct, tag_field="type", tag="status"):
    pass


class Cancel(msgspec.Struct, tag_field="type", tag="cancel"):
    """Control socket. Header.rid names the request; its own stream then ends with CANCELLED."""


class Credit(msgspec.Struct, tag_field="type", tag="credit"):
    """Control socket. Allows `events` more events on the stream of Header.rid."""

    events: Annotated[int, msgspec.Meta(ge=1)]


class Ping(msgspec.Struct, tag_field="type", tag="ping"):
    """Control socket. Answered at once by PONG."""


Request = (
    Hello | Generate | Attach | SessionOpen | SessionAppend | SessionFork | SessionTruncate | SessionRename
    | SessionCheckpoint | SessionList | SessionShow | SessionExport | SessionImport | SessionDelete
    | ModelList | ModelLoad | ModelUnload | Status
)  # fmt: skip
ControlRequest = Cancel | Credit | Ping


# --- replies (broker to client) --------------------------------------------------------------------


class Welcome(msgspec.Struct, tag_field="type", tag="welcome"):
    version: int
    server: str
    boot: str  # changes with every start of the broker
    capabilities: list[str]
    heartbeat_ms: int
    max_message_bytes: int


class Accepted(msgspec.Struct, tag_field="type", tag="accepted"):
    """Not terminal. Requests ahead of this one when it was queued."""

    position: int


class Progress(msgspec.Struct, tag_field="type", tag="progress"):
    """Not terminal. phase: queue | download | load | quantize | restore | prefill; unit: tokens | bytes | tensors."""

    phase: str
    done: int
    total: int
    unit: str = "tokens"


class Tokens(msgspec.Struct, tag_field="type", tag="tokens", omit_defaults=True):
    """Not terminal. `index` is the place of ids[0] among the generated tokens. `text` may be empty."""

    index: int
    ids: list[int]
    text: str
    logprobs: list[TokenLogprob] = []


class Done(msgspec.Struct, tag_field="type", tag="done", omit_defaults=True, kw_only=True):
    """Terminal reply to GENERATE and SESSION.APPEND. `durable`: the turn is committed to disk."""

    finish_reason: str  # stop | length | eos | append
    text: str
    tokens: list[int]
    usage: Usage
    timings: Timings
    session: str | None = None
    durable: bool = False
    kv_durable: bool = False  # its KV pages too; False costs time at the next resume, never a token
    reset_reason: str = ""  # why the usable prefix ended where it did; empty: nothing was lost
    seed: int | None = None


class SessionReply(msgspec.Struct, tag_field="type", tag="session"):
    info: SessionInfo


class SessionsReply(msgspec.Struct, tag_field="type", tag="sessions"):
    sessions: list[SessionInfo]


class SessionDetail(msgspec.Struct, tag_field="type", tag="session.detail"):
    """One raw frame: the session's token ids."""

    info: SessionInfo
    turns: list[TurnInfo]


class Archive(msgspec.Struct, tag_field="type", tag="archive"):
    """One raw frame: the archive."""

    info: SessionInfo


class ModelReply(msgspec.Struct, tag_field="type", tag="model"):
    model: ModelInfo


class ModelsReply(msgspec.Struct, tag_field="type", tag="models"):
    models: list[ModelInfo]


class StatusReply(msgspec.Struct, tag_field="type", tag="status.reply", omit_defaults=True, kw_only=True):
    version: str
    pid: int
    boot: str
    uptime_s: float
    socket: str
    state_dir: str
    rss_bytes: int
    sessions: int
    queued: int
    running: int
    engine_state: str  # stopped | starting | downloading | loading | quantizing | ready | failed
    engine_pid: int = 0
    engine_restarts: int = 0
    engine_rss_bytes: int = 0
    engine_error: str = ""
    model: ModelInfo | None = None
    tiers: list[TierUsage] = []
    counters: dict[str, int] = {}
    counters_at: float = 0.0  # uptime_s at which tiers and counters were read
    warnings: list[str] = []


class Pong(msgspec.Struct, tag_field="type", tag="pong"):
    """Control socket. `known`: the broker still holds the stream of Header.rid."""

    boot: str
    known: bool = False


class Ok(msgspec.Struct, tag_field="type", tag="ok", omit_defaults=True):
    """Terminal reply to requests that return nothing."""

    detail: str = ""


class Error(msgspec.Struct, tag_field="type", tag="error"):
    """Terminal reply. `code` is one of errors.ErrorCode."""

    code: str
    message: str
    retryable: bool
    next_step: str

    @classmethod
    def of(cls, error: ErrorReply) -> Error:
        return cls(error.code.value, error.message, error.retryable, error.next_step)

    def exception(self) -> ErrorReply:
        """The exception a client raises; a code this version does not know becomes INTERNAL."""
        known = self.code in ErrorCode.__members__
        code = ErrorCode(self.code) if known else ErrorCode.INTERNAL
        message = self.message if known else f"{self.code}: {self.message}"
        return ErrorReply(code, message, self.next_step, retryable=self.retryable)


Reply = (
    Welcome | Accepted | Progress | Tokens | Done | SessionReply | SessionsReply | SessionDetail | Archive
    | ModelReply | ModelsReply | StatusReply | Pong | Ok | Error
)  # fmt: skip
STREAMING = (Accepted, Progress, Tokens)  # every other reply is terminal
