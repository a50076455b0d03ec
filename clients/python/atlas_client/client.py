"""The blocking client.

A Client may be shared by threads: each thread gets a connection of its own, and a Generation belongs to the thread
that made it (another thread may call its `cancel`). One thread may have several generations open and read them in turn.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import zmq

from . import requests
from .errors import AtlasError
from .link import Limits
from .paths import default_socket
from .protocol import (
    Accepted,
    Archive,
    Attach,
    Done,
    ModelInfo,
    ModelList,
    ModelLoad,
    ModelReply,
    ModelsReply,
    ModelUnload,
    Ok,
    Progress,
    SessionCheckpoint,
    SessionDelete,
    SessionDetail,
    SessionExport,
    SessionFork,
    SessionImport,
    SessionInfo,
    SessionList,
    SessionOpen,
    SessionRename,
    SessionReply,
    SessionShow,
    SessionsReply,
    SessionTruncate,
    Status,
    StatusReply,
    TokenLogprob,
    Tokens,
    Welcome,
)
from .requests import Message, RequestArgs
from .stream import Stream
from .transport import Connection, hello

Event = Accepted | Progress | Tokens | Done
OnProgress = Callable[[Progress], None]
T = TypeVar("T")
CANCEL_WAIT_S = 2.0  # for the end of a cancelled request


class Generation(Iterator[Event]):
    """One running GENERATE: iterate over its events, the last is Done. The daemon's error is raised in its place."""

    def __init__(self, client: Client, connection: Connection, stream: Stream) -> None:
        self._client = client
        self._connection = connection
        self._stream = stream
        self._text: list[str] = []
        self.tokens: list[int] = []  # ids of the events read so far
        self.logprobs: list[TokenLogprob] = []

    @property
    def request_id(self) -> str:
        """Names the request; another client can attach to it."""
        return self._stream.rid

    @property
    def finished(self) -> bool:
        """Whether the terminal reply is here; events may still be unread."""
        return self._stream.finished

    @property
    def complete(self) -> bool:
        """Whether it ended with Done, not with an error."""
        return self._stream.reply is not None

    @property
    def received(self) -> str:
        """The text of the events read so far."""
        return "".join(self._text)

    @property
    def result(self) -> Done:
        """Reads to the end. Raises ErrorReply, DaemonUnavailable."""
        for _ in self:
            pass
        return requests.answer(self._stream, Done)

    @property
    def text(self) -> str:
        """Reads to the end and returns the whole text. Raises ErrorReply, DaemonUnavailable."""
        return self.result.text

    def texts(self) -> Iterator[str]:
        """The pieces of text as they come, none empty."""
        for event in self:
            if isinstance(event, Tokens) and event.text:
                yield event.text

    def cancel(self) -> None:
        """Asks the daemon to stop, from any thread. The stream then ends with ErrorReply CANCELLED."""
        if not self._stream.finished:
            self._client.cancel(self._stream.rid)

    def close(self) -> None:
        """Cancels a generation that still runs and waits a moment for its end."""
        self.cancel()
        end = time.monotonic() + CANCEL_WAIT_S
        try:
            while not self._stream.finished and not self._connection.closed and time.monotonic() < end:
                self._connection.step(0.1)
        except AtlasError:
            return  # nothing runs any more: that is what was asked for
        self._connection.link.forget(self._stream)

    def __next__(self) -> Event:
        while not self._stream.events:
            if self._stream.error is not None:
                raise self._stream.error
            if self._stream.finished:
                raise StopIteration
            self._connection.step()
        event: Event = self._stream.events.popleft()
        if isinstance(event, Tokens):
            self._text.append(event.text)
            self.tokens += event.ids
            self.logprobs += event.logprobs
        return event

    def __iter__(self) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Client:
    """`Client()` reaches the user's daemon. Raises DaemonUnavailable at the first request when there is none."""

    def __init__(
        self,
        socket: str | Path | None = None,
        *,
        timeout: float = Limits.timeout,
        reconnect: float = Limits.reconnect,
        heartbeat: float = Limits.heartbeat,
    ) -> None:
        """Seconds. `timeout`: without a sign of life until the connection counts as dead; `reconnect`: for which a
        daemon that went away is waited for, requests being taken up again; `heartbeat`: of silence before a ping."""
        self.socket = Path(socket) if socket else default_socket()
        self._limits = Limits(timeout, reconnect, heartbeat)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._local = threading.local()
        self._connections: weakref.WeakSet[Connection] = weakref.WeakSet()

    def generate(
        self,
        prompt: str | None = None,
        *,
        tokens: Sequence[int] | None = None,
        messages: Sequence[Message] | None = None,
        session: str | None = None,
        max_tokens: int | None = None,
        retries: int = 0,
        request_id: str | None = None,
        **options: Unpack[RequestArgs],
    ) -> Generation:
        """Starts a generation from exactly one of prompt, tokens (ids) and messages (a chat).

        `retries`: how often a retryable error is answered by sending the request again, with the same seed; what was
        delivered is not delivered twice. The other options are those of protocol.Sampling and protocol.Generate.
        Raises DaemonUnavailable, ErrorReply (INVALID_PARAMETER); what the daemon says comes with iteration.
        """
        body = requests.generate(prompt, tokens, messages, session, max_tokens, options)
        return self._open(Stream(body, rid=request_id, retries=retries))

    def attach(self, request_id: str, last_seq: int = 0) -> Generation:
        """Takes up a generation started before, by this or another client; its replies after `last_seq` come again."""
        return self._open(Stream(Attach(last_seq), rid=request_id))

    def cancel(self, request_id: str) -> None:
        """Asks the daemon to stop a request. Returns at once; the request's own stream says CANCELLED."""
        self._connection().cancel(request_id)

    def session(self, name: str, *, create: bool = True) -> Session:
        """A handle; nothing is sent until it is used or entered with `with`, which opens it."""
        return Session(self, name, create)

    def sessions(self, *, where: bool = False, limit: int = 0) -> list[SessionInfo]:
        """The sessions of this user (`limit`: the first so many): running ones, then the last used. `where`: with the
        tokens by tier of the first 32, as far as the daemon knows them."""
        return self._call(SessionList(where, limit), SessionsReply).sessions

    def import_session(self, name: str, archive: bytes) -> SessionInfo:
        """Makes a session from what Session.export returned."""
        return self._call(SessionImport(name), SessionReply, raw=[archive]).info

    def models(self) -> list[ModelInfo]:
        """Models the daemon knows, with their state."""
        return self._call(ModelList(), ModelsReply).models

    def load_model(
        self, model: str, revision: str | None = None, *, on_progress: OnProgress | None = None
    ) -> ModelInfo:
        """Loads a directory, a hub id or "demo" in place of the present model; returns when it is ready."""
        return self._call(ModelLoad(model, revision), ModelReply, on_progress=on_progress).model

    def unload_model(self) -> None:
        """Stops the engine and frees its memory."""
        self._call(ModelUnload(), Ok)

    def status(self) -> StatusReply:
        return self._call(Status(), StatusReply)

    def hello(self) -> Welcome:
        """The daemon's protocol version, capabilities and limits."""
        return self._call(hello(), Welcome)

    def close(self) -> None:
        """Closes every thread's sockets; no thread may be using them. The daemon cancels requests without `detach`."""
        for connection in list(self._connections):
            connection.close()
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _connection(self) -> Connection:
        connection: Connection | None = getattr(self._local, "connection", None)
        if connection is None or connection.closed:
            connection = Connection(self.socket, self._context, self._limits)
            self._local.connection = connection
            self._connections.add(connection)
        return connection

    def _open(self, stream: Stream) -> Generation:
        connection = self._connection()
        connection.start(stream)
        return Generation(self, connection, stream)

    def _call(self, body: Any, expected: type[T], **options: Any) -> T:
        return self._ask(body, expected, **options)[0]

    def _ask(
        self, body: Any, expected: type[T], *, raw: Sequence[bytes] = (), on_progress: OnProgress | None = None
    ) -> tuple[T, Sequence[bytes]]:
        """One request to its terminal reply and raw frames. Being interrupted (Ctrl-C) cancels it."""
        connection = self._connection()
        stream = Stream(body, raw)
        connection.start(stream)
        try:
            while not stream.finished:
                connection.step()
                _report(stream, on_progress)
        except BaseException:
            if not connection.closed:
                connection.cancel(stream.rid)
                connection.link.forget(stream)
            raise
        return requests.answer(stream, expected), stream.reply_raw


class Session:
    """One session by name. `with client.session("name") as session:` opens it, and creates it when it is new."""

    def __init__(self, client: Client, name: str, create: bool = True) -> None:
        self._client = client
        self._create = create
        self.name = name

    def open(self) -> SessionInfo:
        """Raises ErrorReply NO_SUCH_SESSION when it does not exist and `create` is off."""
        return self._client._call(SessionOpen(self.name, self._create), SessionReply).info

    def generate(
        self,
        prompt: str | None = None,
        *,
        tokens: Sequence[int] | None = None,
        messages: Sequence[Message] | None = None,
        max_tokens: int | None = None,
        retries: int = 0,
        request_id: str | None = None,
        **options: Unpack[RequestArgs],
    ) -> Generation:
        """Client.generate in this session."""
        body = requests.generate(prompt, tokens, messages, self.name, max_tokens, options)
        return self._client._open(Stream(body, rid=request_id, retries=retries))

    def append(
        self,
        prompt: str | None = None,
        *,
        tokens: Sequence[int] | None = None,
        messages: Sequence[Message] | None = None,
        on_progress: OnProgress | None = None,
    ) -> Done:
        """Adds to the session without generating; returns when it is durable."""
        body = requests.append(self.name, prompt, tokens, messages)
        return self._client._call(body, Done, on_progress=on_progress)

    def fork(self, new_name: str, *, at_turn: int | None = None, at_token: int | None = None) -> Session:
        """A copy that shares the past: all of it, `at_turn` turns of it, or `at_token` tokens."""
        self._client._call(SessionFork(self.name, new_name, at_turn, at_token), SessionReply)
        return Session(self._client, new_name)

    def truncate(self, *, turns: int | None = None, tokens: int | None = None) -> SessionInfo:
        """Keeps that many turns, or that many tokens."""
        return self._client._call(SessionTruncate(self.name, turns, tokens), SessionReply).info

    def rename(self, new_name: str) -> SessionInfo:
        info = self._client._call(SessionRename(self.name, new_name), SessionReply).info
        self.name = info.name
        return info

    def checkpoint(self) -> str:
        """Returns when the session's pages are on disk; says what was done."""
        return self._client._call(SessionCheckpoint(self.name), Ok).detail

    def show(self, *, text: bool = False, where: bool = False) -> SessionDetail:
        """The session and its turns; `text`: with what was said in them, `where`: with its tokens by tier."""
        return self._client._call(SessionShow(self.name, text, where), SessionDetail)

    def info(self) -> SessionInfo:
        return self.show().info

    def token_ids(self) -> list[int]:
        """Every token of the session, in order."""
        return ids(self._client._ask(SessionShow(self.name), SessionDetail)[1])

    def export(self) -> bytes:
        """An archive for Client.import_session, here or on another machine."""
        return archive(self._client._ask(SessionExport(self.name), Archive)[1])

    def delete(self, *, purge: bool = False) -> None:
        """`purge` also erases its KV pages from every tier, but for those that other sessions share."""
        self._client._call(SessionDelete(self.name, purge), Ok)

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Nothing to release: the session lives in the daemon."""


def ids(raw: Sequence[bytes]) -> list[int]:
    """Token ids of a raw frame (little-endian uint32)."""
    return list(memoryview(raw[0]).cast("I")) if raw else []


def archive(raw: Sequence[bytes]) -> bytes:
    """The archive of a raw frame."""
    return bytes(raw[0]) if raw else b""


def _report(stream: Stream, on_progress: OnProgress | None) -> None:
    while stream.events:
        event = stream.events.popleft()
        if on_progress and isinstance(event, Progress):
            on_progress(event)
