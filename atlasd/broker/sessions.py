"""Sessions: the durable truth. Records, their layout, and what may be done to them.

Layout, version 1 (an LMDB 0.9 environment with these named databases; every value but `meta` ends with the
CRC-32 of what precedes it, little endian):

    meta      "version"                      -> "1"; "turnover" means nothing
    names     owner NUL name                 -> session id (16 hex characters)
    sessions  session id                     -> SessionRecord as msgpack
    turns     session id, turn index (BE32)  -> TurnRecord as msgpack
    rids      owner NUL request id           -> session id, turn index (BE32)

Token ids are little-endian uint32. Turns of a session lie end to end: turn i holds tokens [start, start + its
tokens), and start of turn i + 1 is the end of turn i. A turn is written once; only TRUNCATE shortens the last one kept.
Fork copies the turns it keeps. `rids` names the uncut turns that answered a request of this daemon, so that a request
sent again after a restart is answered from the log.

A `Sessions` object works on one LMDB transaction, which the log's thread commits or aborts; no lmdb is imported here.
"""

from __future__ import annotations

import itertools
import logging
import os
import unicodedata
import zlib
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
from atlas_client.errors import ErrorCode, ErrorReply
from atlas_client.protocol import Done, Sampling, SessionInfo, Timings, TurnInfo, Usage

log = logging.getLogger("atlasd.log")
VERSION = b"1"
DATABASES = ("meta", "names", "sessions", "turns", "rids")
TRUNCATED = "truncated"  # finish_reason of a turn that was cut

_encode = msgspec.msgpack.Encoder().encode
T = TypeVar("T")


class SessionRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What is known of a session besides its turns."""

    id: str
    owner: str
    name: str
    created: float  # Unix seconds
    updated: float
    tokens: int = 0
    turns: int = 0
    model: str = ""  # name of the model of the last turn
    tokenizer: str = ""  # its fingerprint
    kv_identity: str = ""
    last_finish: str = ""
    parent: str = ""
    forked_at: int = 0

    def info(self, busy: bool = False) -> SessionInfo:
        """As clients see it."""
        return SessionInfo(
            self.name, self.id, self.tokens, self.turns, self.created, self.updated,
            self.model, self.parent, self.forked_at, busy,
        )  # fmt: skip


class TurnRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One turn with all that is needed to answer its request again."""

    rid: str
    digest: bytes  # of the request; the same id with another request is refused
    start: int
    prompt_ids: bytes
    generated_ids: bytes
    finish_reason: str
    created: float
    prompt_text: str
    text: str
    sampling: Sampling
    usage: Usage
    timings: Timings
    seed: int | None = None
    kv_durable: bool = False
    reset_reason: str = ""

    @property
    def tokens(self) -> int:
        return (len(self.prompt_ids) + len(self.generated_ids)) // 4

    def info(self, index: int, text: bool) -> TurnInfo:
        """As clients see it."""
        shown = (self.prompt_text, self.text) if text else ("", "")
        prompt, generated = len(self.prompt_ids) // 4, len(self.generated_ids) // 4
        return TurnInfo(index, self.rid, self.start, prompt, generated, self.finish_reason, self.created, *shown)

    def done(self, session: str | None) -> Done:
        """The terminal reply to the turn's request."""
        return Done(
            finish_reason=self.finish_reason, text=self.text, tokens=unpack(self.generated_ids), usage=self.usage,
            timings=self.timings, session=session, durable=session is not None, kv_durable=self.kv_durable,
            reset_reason=self.reset_reason, seed=self.seed,
        )  # fmt: skip

    def cut(self, keep: int) -> TurnRecord:
        """The first `keep` tokens of it. Text can't be cut at a token without the tokenizer, so a part has none."""
        prompt, generated = self.prompt_ids[: keep * 4], self.generated_ids[: max(0, keep * 4 - len(self.prompt_ids))]
        whole_prompt = len(prompt) == len(self.prompt_ids)
        return msgspec.structs.replace(
            self, prompt_ids=prompt, generated_ids=generated, finish_reason=TRUNCATED, text="",
            prompt_text=self.prompt_text if whole_prompt else "",
        )  # fmt: skip


_session = msgspec.msgpack.Decoder(SessionRecord)
_turn = msgspec.msgpack.Decoder(TurnRecord)


def unpack(ids: bytes) -> list[int]:
    """Token ids from little-endian uint32."""
    return memoryview(ids).cast("I").tolist() if ids else []


BIDI_CONTROLS = frozenset(("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"))  # Unicode TR 9, 3.2


def check_name(name: str) -> str:
    """The name, if it may name a session. Raises INVALID_PARAMETER."""
    problem = ""
    if not name or name != name.strip():
        problem = "is empty or begins or ends with white space"
    elif any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in name):
        problem = "holds a control character"
    elif any(unicodedata.bidirectional(char) in BIDI_CONTROLS for char in name):
        problem = "holds a character that changes the direction of what follows"
    elif len(name.encode()) > 200:
        problem = "is longer than 200 bytes"
    if problem:
        raise invalid(f"session name {name[:200]!a} {problem}")
    return name


def invalid(message: str) -> ErrorReply:
    """INVALID_PARAMETER with the message."""
    return ErrorReply(ErrorCode.INVALID_PARAMETER, message)


def _seal(value: bytes) -> bytes:
    return value + zlib.crc32(value).to_bytes(4, "little")


def _open(value: bytes, what: str) -> bytes:
    if zlib.crc32(value[:-4]).to_bytes(4, "little") != value[-4:]:
        raise ErrorReply(ErrorCode.INTERNAL, f"{what} is damaged in the session log", "restore the state directory")
    return value[:-4]


class Sessions:
    """The sessions as of one transaction. Every method raises ErrorReply and then has changed nothing of weight:
    the transaction is aborted by the caller."""

    def __init__(self, txn: Any, databases: dict[str, Any], now: float) -> None:
        self.txn = txn
        self.db = databases
        self.now = now

    # --- reading ---------------------------------------------------------------------------------------

    def find(self, owner: str, name: str) -> SessionRecord | None:
        """The session of that name, if there is one."""
        found = self.txn.get(_owned(owner, name), db=self.db["names"])
        return None if found is None else self._record(_open(found, "a session's name").decode())

    def get(self, owner: str, name: str) -> SessionRecord:
        """The session of that name. Raises NO_SUCH_SESSION."""
        record = self.find(owner, check_name(name))
        if record is None:
            raise ErrorReply(ErrorCode.NO_SUCH_SESSION, f"no session {name!r}")
        return record

    def owned(self, owner: str) -> list[SessionRecord]:
        """The owner's sessions, last used first. A damaged one is left out and logged, not to hide the others."""
        records = []
        for _, value in self._scan("names", _owned(owner, "")):
            try:
                records.append(self._record(_open(value, "a session's name").decode()))
            except ErrorReply as error:
                log.error("%s", error.message)
        return sorted(records, key=lambda record: -record.updated)

    def turns(self, record: SessionRecord) -> list[TurnRecord]:
        """All turns in order."""
        prefix = record.id.encode()
        turns = [_turn.decode(_open(value, f"a turn of {record.name!r}")) for _, value in self._scan("turns", prefix)]
        if len(turns) != record.turns or sum(turn.tokens for turn in turns) != record.tokens:
            raise ErrorReply(ErrorCode.INTERNAL, f"session {record.name!r} lacks turns", "restore the state directory")
        return turns

    def tokens(self, record: SessionRecord) -> bytes:
        """All token ids."""
        return b"".join(turn.prompt_ids + turn.generated_ids for turn in self.turns(record))

    def shared(self, record: SessionRecord) -> int:
        """How many tokens from its start on other sessions of its owner have too, at most."""
        own = self.tokens(record)
        others = [other for other in self.owned(record.owner) if other.id != record.id]
        return max((self._common(own, other) for other in others), default=0) // 4

    def _common(self, own: bytes, other: SessionRecord) -> int:
        """Bytes of token ids from the start on that a session has in common with `own`; reads no further."""
        length = 0
        for _, value in self._scan("turns", other.id.encode()):
            turn = _turn.decode(_open(value, f"a turn of {other.name!r}"))
            ids = turn.prompt_ids + turn.generated_ids
            if not own.startswith(ids, length):
                mine = unpack(own[length : length + len(ids)])
                pairs = zip(mine, unpack(ids), strict=False)
                return length + 4 * sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            length += len(ids)
        return length

    def answered(self, owner: str, rid: str) -> tuple[SessionRecord, TurnRecord] | None:
        """The turn that answered a request before, if there is one."""
        found = self.txn.get(_owned(owner, rid), db=self.db["rids"])
        if found is None:
            return None
        place = _open(found, "a request's place")
        value = self.txn.get(place, db=self.db["turns"])
        if value is None:
            return None
        return self._record(place[:16].decode()), _turn.decode(_open(value, "a turn"))

    # --- writing ---------------------------------------------------------------------------------------

    def open(self, owner: str, name: str, create: bool = True) -> SessionRecord:
        """The session of that name, made if need be. Raises NO_SUCH_SESSION when it is not and may not be made."""
        if self.find(owner, check_name(name)) or not create:
            return self.get(owner, name)
        record = SessionRecord(id=os.urandom(8).hex(), owner=owner, name=name, created=self.now, updated=self.now)
        self._name(record)
        self._save(record)
        return record

    def append(self, record: SessionRecord, turn: TurnRecord) -> None:
        """Adds a turn to the session as it was when the turn began; `record` carries the new model and KV identity.
        Raises SESSION_BUSY if the session has changed since, which the broker's own lock prevents."""
        stored = self._record(record.id)
        if (stored.tokens, stored.turns) != (record.tokens, record.turns) or turn.start != stored.tokens:
            raise ErrorReply(ErrorCode.SESSION_BUSY, f"session {record.name!r} changed during the turn")
        place = _place(record.id, stored.turns)
        self.txn.put(place, _seal(_encode(turn)), db=self.db["turns"])
        self.txn.put(_owned(record.owner, turn.rid), _seal(place), db=self.db["rids"])
        self._save(
            msgspec.structs.replace(
                record, name=stored.name, tokens=stored.tokens + turn.tokens, turns=stored.turns + 1,
                updated=self.now, last_finish=turn.finish_reason,
            )
        )  # fmt: skip

    def fork(self, owner: str, name: str, new_name: str, at_turn: int | None, at_token: int | None) -> SessionRecord:
        """A new session with the first turns or tokens of another. Raises NO_SUCH_SESSION, INVALID_PARAMETER."""
        source = self.get(owner, name)
        self._free(owner, new_name)
        turns = _kept(self.turns(source), at_turn, at_token)
        record = msgspec.structs.replace(
            source, id=os.urandom(8).hex(), name=new_name, created=self.now, parent=source.id,
            forked_at=sum(turn.tokens for turn in turns),
        )  # fmt: skip
        self._name(record)
        return self._fill(record, turns)

    def truncate(self, owner: str, name: str, turns: int | None, tokens: int | None) -> SessionRecord:
        """Keeps the first `turns` or `tokens`. Raises NO_SUCH_SESSION, INVALID_PARAMETER."""
        if turns is None and tokens is None:
            raise invalid("truncate needs turns or tokens")
        record = self.get(owner, name)
        before = self.turns(record)
        kept = _kept(before, turns, tokens)
        for index, old in enumerate(before):
            if index >= len(kept) or kept[index] is not old:
                self.txn.delete(_place(record.id, index), db=self.db["turns"])
                self._unanswer(owner, record.id, index, old)
        return self._fill(record, kept)

    def rename(self, owner: str, name: str, new_name: str) -> SessionRecord:
        """Raises NO_SUCH_SESSION, INVALID_PARAMETER when the new name is taken."""
        record = self.get(owner, name)
        if name == new_name:
            return record
        self._free(owner, new_name)
        self.txn.delete(_owned(owner, name), db=self.db["names"])
        record.name, record.updated = new_name, self.now
        self._name(record)
        self._save(record)
        return record

    def delete(self, owner: str, name: str) -> None:
        """Raises NO_SUCH_SESSION."""
        record = self.get(owner, name)
        for index, turn in enumerate(self.turns(record)):
            self.txn.delete(_place(record.id, index), db=self.db["turns"])
            self._unanswer(owner, record.id, index, turn)
        self.txn.delete(record.id.encode(), db=self.db["sessions"])
        self.txn.delete(_owned(owner, name), db=self.db["names"])

    def adopt(self, owner: str, name: str, record: SessionRecord, turns: list[TurnRecord]) -> SessionRecord:
        """Stores an imported session under a new id. Raises INVALID_PARAMETER when the name is taken."""
        self._free(owner, name)
        record = msgspec.structs.replace(record, id=os.urandom(8).hex(), owner=owner, name=name, updated=self.now)
        self._name(record)
        return self._fill(record, turns)

    # --- parts -----------------------------------------------------------------------------------------

    def _record(self, session_id: str) -> SessionRecord:
        value = self.txn.get(session_id.encode(), db=self.db["sessions"])
        if value is None:
            raise ErrorReply(ErrorCode.NO_SUCH_SESSION, f"session {session_id} is gone")
        return _session.decode(_open(value, f"session {session_id}"))

    def _scan(self, database: str, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        cursor = self.txn.cursor(db=self.db[database])
        found = cursor.set_range(prefix)
        while found and cursor.key().startswith(prefix):
            yield cursor.item()
            found = cursor.next()

    def _free(self, owner: str, name: str) -> None:
        if self.find(owner, check_name(name)):
            raise invalid(f"there is a session {name!r} already")

    def _name(self, record: SessionRecord) -> None:
        self.txn.put(_owned(record.owner, record.name), _seal(record.id.encode()), db=self.db["names"])

    def _save(self, record: SessionRecord) -> None:
        self.txn.put(record.id.encode(), _seal(_encode(record)), db=self.db["sessions"])

    def _fill(self, record: SessionRecord, turns: list[TurnRecord]) -> SessionRecord:
        """Writes all turns and the record that sums them up."""
        for index, turn in enumerate(turns):
            self.txn.put(_place(record.id, index), _seal(_encode(turn)), db=self.db["turns"])
        record.turns, record.tokens = len(turns), sum(turn.tokens for turn in turns)
        record.last_finish = turns[-1].finish_reason if turns else ""
        record.updated = self.now
        self._save(record)
        return record

    def _unanswer(self, owner: str, session_id: str, index: int, turn: TurnRecord) -> None:
        """A turn that is cut or gone no longer answers its request. A fork's turn never did."""
        key = _owned(owner, turn.rid)
        found = self.txn.get(key, db=self.db["rids"])
        if found is not None and found[:-4] == _place(session_id, index):
            self.txn.delete(key, db=self.db["rids"])


def _owned(owner: str, name: str) -> bytes:
    return f"{owner}\0{name}".encode()


def _place(session_id: str, index: int) -> bytes:
    return session_id.encode() + index.to_bytes(4, "big")


def _kept(turns: list[TurnRecord], count: int | None, tokens: int | None) -> list[TurnRecord]:
    """The first `count` turns or `tokens` tokens; all when neither is given."""
    total = sum(turn.tokens for turn in turns)
    if count is not None and tokens is not None:
        raise invalid("give a number of turns or of tokens, not both")
    if (count or 0) > len(turns) or (tokens or 0) > total:
        raise invalid(f"the session has {len(turns)} turns and {total} tokens")
    if tokens is None:
        return turns[:count]
    kept = [turn for turn in turns if turn.start + turn.tokens <= tokens]
    rest = tokens - sum(turn.tokens for turn in kept)
    return [*kept, turns[len(kept)].cut(rest)] if rest else kept
