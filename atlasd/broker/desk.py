"""Session requests other than turns: each becomes work for the log's thread, and one terminal reply."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from atlas_client.errors import ErrorCode, ErrorReply
from atlas_client.protocol import (
    Archive,
    Error,
    Ok,
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
)

from ..engine.messages import Persist, Persisted
from . import archive
from .calls import Call
from .census import MOST_SESSIONS, Census, Where
from .log import Log
from .outbox import Outbox
from .sessions import SessionRecord, Sessions, check_name, invalid
from .supervisor import Supervisor
from .turns import Turns

Answer = tuple[Any, Sequence[bytes]]  # a reply and its raw frames


class Desk:
    """Handlers of session requests. All may raise ErrorReply."""

    def __init__(self, outbox: Outbox, log: Log, turns: Turns, engine: Supervisor, max_bytes: int) -> None:
        self.outbox = outbox
        self.log = log
        self.turns = turns
        self.engine = engine
        self.max_bytes = max_bytes
        self.census = Census(engine)
        self._waiting: dict[str, tuple[Call, Callable[[Persisted], None]]] = {}  # PERSIST sent, by its id
        self._ids = itertools.count(1)

    # --- reading ---------------------------------------------------------------------------------------

    def list(self, call: Call) -> None:
        """SESSION.LIST."""
        asked: SessionList = call.request

        def work(book: Sessions) -> tuple[list[SessionInfo], list[bytes]]:
            records = sorted(book.owned(call.owner), key=lambda record: not self._busy(record))
            records = records[: asked.limit or len(records)]
            located = records[:MOST_SESSIONS] if asked.where else []
            return [self._info(record) for record in records], [self.census.tokens(book, r) for r in located]

        def place(infos: list[SessionInfo], tokens: list[bytes]) -> None:
            def placed(found: list[Where]) -> None:
                for info, where in zip(infos, found, strict=False):
                    info.where = where
                self.outbox.end(call.stream, SessionsReply(infos))

            self.census.ask(call.owner, tokens, placed)

        self._then(call, work, place)

    def show(self, call: Call) -> None:
        """SESSION.SHOW."""
        asked: SessionShow = call.request

        def work(book: Sessions) -> tuple[SessionDetail, Sequence[bytes]]:
            record = book.get(call.owner, asked.session)
            turns = book.turns(record)
            detail = SessionDetail(self._info(record), [turn.info(i, asked.text) for i, turn in enumerate(turns)])
            return self._fitting(detail, b"".join(turn.prompt_ids + turn.generated_ids for turn in turns))

        def place(detail: SessionDetail, raw: Sequence[bytes]) -> None:
            def placed(found: list[Where]) -> None:
                detail.info.where = found[0]
                self.outbox.end(call.stream, detail, raw)

            self.census.ask(call.owner, raw, placed)

        if asked.where:
            self._then(call, work, place)
        else:
            self._run(call, work)

    def export(self, call: Call) -> None:
        """SESSION.EXPORT."""
        asked: SessionExport = call.request

        def work(book: Sessions) -> Answer:
            record = book.get(call.owner, asked.session)
            return self._fitting(Archive(self._info(record)), archive.pack(record, book.turns(record)))

        self._run(call, work)

    # --- changing --------------------------------------------------------------------------------------

    def open(self, call: Call) -> None:
        """SESSION.OPEN."""
        asked: SessionOpen = call.request
        self._run(call, lambda book: self._reply(book.open(call.owner, asked.name, asked.create)))

    def fork(self, call: Call) -> None:
        """SESSION.FORK: of what is stored; a running turn of the source is not part of it."""
        asked: SessionFork = call.request
        self._run(
            call,
            lambda book: self._reply(
                book.fork(call.owner, asked.session, asked.new_name, asked.at_turn, asked.at_token)
            ),
        )

    def truncate(self, call: Call) -> None:
        """SESSION.TRUNCATE."""
        asked: SessionTruncate = call.request
        self._locked(
            call, asked.session,
            lambda book: self._reply(book.truncate(call.owner, asked.session, asked.turns, asked.tokens)),
        )  # fmt: skip

    def rename(self, call: Call) -> None:
        """SESSION.RENAME."""
        asked: SessionRename = call.request
        self._locked(
            call, asked.session, lambda book: self._reply(book.rename(call.owner, asked.session, asked.new_name))
        )

    def import_(self, call: Call) -> None:
        """SESSION.IMPORT."""
        asked: SessionImport = call.request
        if len(call.raw) != 1:
            raise invalid("session.import carries one raw frame, the archive")

        def work(book: Sessions) -> Answer:
            content = archive.unpack(call.raw[0])
            return self._reply(book.adopt(call.owner, asked.name, content.session, content.turns))

        self._run(call, work)

    def delete(self, call: Call) -> None:
        """SESSION.DELETE. With `purge` the KV pages are erased first, which only a ready engine can do."""
        asked: SessionDelete = call.request
        if not asked.purge:
            self._locked(call, asked.session, lambda book: self._delete(book, call, asked.session))
            return
        if not self.engine.ready:
            raise ErrorReply(
                ErrorCode.MODEL_NOT_LOADED, "KV pages can be erased only while the session's model is loaded",
                "wait until it is ready, or delete without purge",
            )  # fmt: skip
        lock = self._lock(call, asked.session)

        def purged(answer: Persisted) -> None:
            if answer.error is not None:
                self.turns.locks.pop(lock, None)
                self.outbox.end(call.stream, answer.error)
                return
            self._run(call, lambda book: self._delete(book, call, asked.session), lock)

        self._persist(call, asked.session, True, purged, lock)

    def checkpoint(self, call: Call) -> None:
        """SESSION.CHECKPOINT. Without an engine nothing is in memory only."""
        asked: SessionCheckpoint = call.request

        def persisted(answer: Persisted) -> None:
            self.outbox.end(call.stream, answer.error or Ok(f"{answer.pages} pages written"))

        if self.engine.ready:
            self._persist(call, asked.session, False, persisted, None)
        else:
            self._run(call, lambda book: (book.get(call.owner, asked.session), (Ok("0 pages written"), ()))[1])

    # --- the engine's answers -----------------------------------------------------------------------------

    def persisted(self, message: Persisted) -> None:
        """PERSISTED."""
        if entry := self._waiting.pop(message.rid, None):
            entry[1](message)

    def engine_died(self, reason: str) -> None:
        """What was asked of the engine that died gets ENGINE_DIED."""
        error = Error.of(ErrorReply(ErrorCode.ENGINE_DIED, reason))
        for rid in list(self._waiting):
            self.persisted(Persisted(rid, 0, error))
        self.census.give_up()

    # --- parts -------------------------------------------------------------------------------------------

    def _then(self, call: Call, work: Callable[[Sessions], Any], then: Callable[..., None]) -> None:
        """Work for the log's thread whose result `then` takes, in the broker's loop."""

        def report(result: Any, error: ErrorReply | None) -> None:
            if error is not None:
                self.outbox.end(call.stream, Error.of(error))
            else:
                then(*result)

        self.log.submit(work, report)

    def _persist(
        self, call: Call, name: str, purge: bool, then: Callable[[Persisted], None], lock: tuple[str, str] | None
    ) -> None:
        def work(book: Sessions) -> tuple[bytes, int]:
            record = book.get(call.owner, name)
            return book.tokens(record), book.shared(record) if purge else 0

        def read(result: Any, error: ErrorReply | None) -> None:
            if error is None and not self.engine.ready:
                error = ErrorReply(ErrorCode.ENGINE_DIED, "the engine has stopped")
            if error is not None:
                then(Persisted("", 0, Error.of(error)))
                return
            rid = f"persist/{next(self._ids)}"
            self._waiting[rid] = (call, then)
            tokens, shared = result
            self.engine.send(Persist(rid, call.owner, purge, shared), tokens)

        self.log.submit(work, read)

    def _locked(self, call: Call, name: str, work: Callable[[Sessions], Answer]) -> None:
        self._run(call, work, self._lock(call, name))

    def _lock(self, call: Call, name: str) -> tuple[str, str]:
        lock = (call.owner, check_name(name))
        if lock in self.turns.locks:
            raise ErrorReply(ErrorCode.SESSION_BUSY, f"session {name!r} has a running turn")
        self.turns.locks[lock] = call.rid
        return lock

    def _run(self, call: Call, work: Callable[[Sessions], Answer], lock: tuple[str, str] | None = None) -> None:
        def report(result: Any, error: ErrorReply | None) -> None:
            if lock is not None:
                self.turns.locks.pop(lock, None)
            if error is not None:
                self.outbox.end(call.stream, Error.of(error))
            else:
                self.outbox.end(call.stream, *result)

        self.log.submit(work, report)

    def _info(self, record: SessionRecord) -> SessionInfo:
        return record.info(self._busy(record))

    def _busy(self, record: SessionRecord) -> bool:
        return (record.owner, record.name) in self.turns.locks

    def _reply(self, record: SessionRecord) -> Answer:
        return SessionReply(record.info()), ()

    def _delete(self, book: Sessions, call: Call, name: str) -> Answer:
        book.delete(call.owner, name)
        return Ok(), ()

    def _fitting(self, reply: Any, raw: bytes) -> Answer:
        """The answer, if a client can take it: it applies the same limit as the daemon."""
        size = len(raw) + len(msgspec.msgpack.encode(reply)) + 1024
        if size > self.max_bytes:
            raise invalid(f"the answer takes {size} bytes, more than the {self.max_bytes} of --max-message-mb")
        return reply, (raw,)


def handlers(desk: Desk) -> dict[type, Callable[[Call], None]]:
    """Which method answers which request."""
    return {
        SessionList: desk.list,
        SessionShow: desk.show,
        SessionExport: desk.export,
        SessionOpen: desk.open,
        SessionFork: desk.fork,
        SessionTruncate: desk.truncate,
        SessionRename: desk.rename,
        SessionImport: desk.import_,
        SessionDelete: desk.delete,
        SessionCheckpoint: desk.checkpoint,
    }
