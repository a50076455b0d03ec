"""The asyncio client: the surface of client.Client with `await`, `async for` and `async with`.

One AsyncClient has one pair of sockets for all its requests and belongs to the event loop it was first used in.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from . import requests
from .aio_transport import AsyncConnection
from .client import Event, OnProgress, archive, ids
from .link import Limits
from .paths import default_socket
from .protocol import (
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
from .transport import hello

T = TypeVar("T")
CLOSE_WAIT_S = 2.0


class AsyncGeneration(AsyncIterator[Event]):
    """One running GENERATE: `async for` over its events, the last is Done. Errors are raised in its place."""

    def __init__(self, connection: AsyncConnection, stream: Stream) -> None:
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

    async def result(self) -> Done:
        """Reads to the end. Raises ErrorReply, DaemonUnavailable."""
        async for _ in self:
            pass
        return requests.answer(self._stream, Done)

    async def text(self) -> str:
        """Reads to the end and returns the whole text. Raises ErrorReply, DaemonUnavailable."""
        return (await self.result()).text

    async def texts(self) -> AsyncIterator[str]:
        """The pieces of text as they come, none empty."""
        async for event in self:
            if isinstance(event, Tokens) and event.text:
                yield event.text

    async def cancel(self) -> None:
        """Asks the daemon to stop. The stream then ends with ErrorReply CANCELLED."""
        if not self._stream.finished and not self._connection.closed:
            await self._connection.cancel(self._stream.rid)

    async def close(self) -> None:
        """Cancels a generation that still runs and waits a moment for its end."""
        await self.cancel()
        end = time.monotonic() + CLOSE_WAIT_S
        while not self._stream.finished and (left := end - time.monotonic()) > 0:
            self._stream.events.clear()
            try:
                await asyncio.wait_for(self._connection.wait(self._stream), left)
            except TimeoutError:
                break
        self._connection.link.forget(self._stream)

    async def __anext__(self) -> Event:
        if not self._stream.events:
            await self._connection.wait(self._stream)
        if not self._stream.events:
            if self._stream.error is not None:
                raise self._stream.error
            raise StopAsyncIteration
        event: Event = self._stream.events.popleft()
        if isinstance(event, Tokens):
            self._text.append(event.text)
            self.tokens += event.ids
            self.logprobs += event.logprobs
        return event

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()


class AsyncClient:
    """`AsyncClient()` reaches the user's daemon. Raises DaemonUnavailable at the first request when there is none."""

    def __init__(
        self,
        socket: str | Path | None = None,
        *,
        timeout: float = Limits.timeout,
        reconnect: float = Limits.reconnect,
        heartbeat: float = Limits.heartbeat,
    ) -> None:
        """Seconds, as in client.Client."""
        self.socket = Path(socket) if socket else default_socket()
        self._limits = Limits(timeout, reconnect, heartbeat)
        self._connection: AsyncConnection | None = None

    async def generate(
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
    ) -> AsyncGeneration:
        """Starts a generation; see client.Client.generate."""
        body = requests.generate(prompt, tokens, messages, session, max_tokens, options)
        return await self._open(Stream(body, rid=request_id, retries=retries))

    async def attach(self, request_id: str, last_seq: int = 0) -> AsyncGeneration:
        """Takes up a generation started before; its replies after `last_seq` come again."""
        return await self._open(Stream(Attach(last_seq), rid=request_id))

    async def cancel(self, request_id: str) -> None:
        """Asks the daemon to stop a request; the request's own stream says CANCELLED."""
        await self._connected().cancel(request_id)

    def session(self, name: str, *, create: bool = True) -> AsyncSession:
        """A handle; nothing is sent until it is used or entered with `async with`, which opens it."""
        return AsyncSession(self, name, create)

    async def sessions(self, *, where: bool = False, limit: int = 0) -> list[SessionInfo]:
        """The sessions of this user, as Client.sessions gives them."""
        return (await self._call(SessionList(where, limit), SessionsReply)).sessions

    async def import_session(self, name: str, archive: bytes) -> SessionInfo:
        """Makes a session from what AsyncSession.export returned."""
        return (await self._call(SessionImport(name), SessionReply, raw=[archive])).info

    async def models(self) -> list[ModelInfo]:
        """Models the daemon knows, with their state."""
        return (await self._call(ModelList(), ModelsReply)).models

    async def load_model(
        self, model: str, revision: str | None = None, *, on_progress: OnProgress | None = None
    ) -> ModelInfo:
        """Loads a model in place of the present one; returns when it is ready."""
        return (await self._call(ModelLoad(model, revision), ModelReply, on_progress=on_progress)).model

    async def unload_model(self) -> None:
        """Stops the engine and frees its memory."""
        await self._call(ModelUnload(), Ok)

    async def status(self) -> StatusReply:
        return await self._call(Status(), StatusReply)

    async def hello(self) -> Welcome:
        """The daemon's protocol version, capabilities and limits."""
        return await self._call(hello(), Welcome)

    async def close(self) -> None:
        """Requests that were not detached are cancelled by the daemon."""
        if self._connection is not None:
            await self._connection.close()
            self._connection = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    def _connected(self) -> AsyncConnection:
        if self._connection is None or self._connection.closed:
            self._connection = AsyncConnection(self.socket, self._limits)
        return self._connection

    async def _open(self, stream: Stream) -> AsyncGeneration:
        connection = self._connected()
        await connection.start(stream)
        return AsyncGeneration(connection, stream)

    async def _call(self, body: Any, expected: type[T], **options: Any) -> T:
        return (await self._ask(body, expected, **options))[0]

    async def _ask(
        self, body: Any, expected: type[T], *, raw: Sequence[bytes] = (), on_progress: OnProgress | None = None
    ) -> tuple[T, Sequence[bytes]]:
        """One request to its terminal reply and raw frames. Cancelling the task cancels it."""
        connection = self._connected()
        stream = Stream(body, raw)
        await connection.start(stream)
        try:
            while not stream.finished:
                await connection.wait(stream)
                while stream.events:
                    event = stream.events.popleft()
                    if on_progress and isinstance(event, Progress):
                        on_progress(event)
        except BaseException:
            if not connection.closed:
                await connection.cancel(stream.rid)
                connection.link.forget(stream)
            raise
        return requests.answer(stream, expected), stream.reply_raw


class AsyncSession:
    """One session by name. `async with client.session("name") as session:` opens it, and creates it when it is new."""

    def __init__(self, client: AsyncClient, name: str, create: bool = True) -> None:
        self._client = client
        self._create = create
        self.name = name

    async def open(self) -> SessionInfo:
        """Raises ErrorReply NO_SUCH_SESSION when it does not exist and `create` is off."""
        return (await self._client._call(SessionOpen(self.name, self._create), SessionReply)).info

    async def generate(
        self,
        prompt: str | None = None,
        *,
        tokens: Sequence[int] | None = None,
        messages: Sequence[Message] | None = None,
        max_tokens: int | None = None,
        retries: int = 0,
        request_id: str | None = None,
        **options: Unpack[RequestArgs],
    ) -> AsyncGeneration:
        """AsyncClient.generate in this session."""
        body = requests.generate(prompt, tokens, messages, self.name, max_tokens, options)
        return await self._client._open(Stream(body, rid=request_id, retries=retries))

    async def append(
        self,
        prompt: str | None = None,
        *,
        tokens: Sequence[int] | None = None,
        messages: Sequence[Message] | None = None,
        on_progress: OnProgress | None = None,
    ) -> Done:
        """Adds to the session without generating; returns when it is durable."""
        body = requests.append(self.name, prompt, tokens, messages)
        return await self._client._call(body, Done, on_progress=on_progress)

    async def fork(self, new_name: str, *, at_turn: int | None = None, at_token: int | None = None) -> AsyncSession:
        """A copy that shares the past: all of it, `at_turn` turns of it, or `at_token` tokens."""
        await self._client._call(SessionFork(self.name, new_name, at_turn, at_token), SessionReply)
        return AsyncSession(self._client, new_name)

    async def truncate(self, *, turns: int | None = None, tokens: int | None = None) -> SessionInfo:
        """Keeps that many turns, or that many tokens."""
        return (await self._client._call(SessionTruncate(self.name, turns, tokens), SessionReply)).info

    async def rename(self, new_name: str) -> SessionInfo:
        info = (await self._client._call(SessionRename(self.name, new_name), SessionReply)).info
        self.name = info.name
        return info

    async def checkpoint(self) -> str:
        """Returns when the session's pages are on disk; says what was done."""
        return (await self._client._call(SessionCheckpoint(self.name), Ok)).detail

    async def show(self, *, text: bool = False, where: bool = False) -> SessionDetail:
        """The session and its turns; `text`: with what was said in them, `where`: with its tokens by tier."""
        return await self._client._call(SessionShow(self.name, text, where), SessionDetail)

    async def info(self) -> SessionInfo:
        return (await self.show()).info

    async def token_ids(self) -> list[int]:
        """Every token of the session, in order."""
        return ids((await self._client._ask(SessionShow(self.name), SessionDetail))[1])

    async def export(self) -> bytes:
        """An archive for AsyncClient.import_session, here or on another machine."""
        return archive((await self._client._ask(SessionExport(self.name), Archive))[1])

    async def delete(self, *, purge: bool = False) -> None:
        """`purge` also erases its KV pages from every tier, but for those that other sessions share."""
        await self._client._call(SessionDelete(self.name, purge), Ok)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        """Nothing to release: the session lives in the daemon."""
