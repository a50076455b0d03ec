"""Session archives: what export writes and import reads. Portable: truth only, no KV.

"ATLSESS" | version byte 1 | SHA-256 of the rest (32 bytes) | msgpack of Content
"""

from __future__ import annotations

import hashlib

import msgspec
from atlas_client.errors import ErrorReply

from .sessions import SessionRecord, TurnRecord, invalid

MAGIC = b"ATLSESS"
VERSION = 1
_PREFIX = len(MAGIC) + 1 + 32


class Content(msgspec.Struct):
    """The session with its name and lineage, and its turns in order."""

    session: SessionRecord
    turns: list[TurnRecord]


_decoder = msgspec.msgpack.Decoder(Content)


def pack(session: SessionRecord, turns: list[TurnRecord]) -> bytes:
    """The archive of a session."""
    body = msgspec.msgpack.encode(Content(session, turns))
    return MAGIC + bytes([VERSION]) + hashlib.sha256(body).digest() + body


def unpack(data: bytes) -> Content:
    """Reads an archive. Raises INVALID_PARAMETER when it is damaged, of another version, or contradicts itself."""
    if len(data) < _PREFIX or data[: len(MAGIC)] != MAGIC:
        raise _bad("it is no session archive")
    if data[len(MAGIC)] != VERSION:
        raise _bad(f"its version is {data[len(MAGIC)]}, this daemon reads {VERSION}")
    body = data[_PREFIX:]
    if hashlib.sha256(body).digest() != data[len(MAGIC) + 1 : _PREFIX]:
        raise _bad("it is damaged or cut short")
    try:
        content = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _bad(str(error)) from None
    _check(content)
    return content


def _check(content: Content) -> None:
    start = 0
    for turn in content.turns:
        if turn.start != start or len(turn.prompt_ids) % 4 or len(turn.generated_ids) % 4:
            raise _bad("its turns do not follow each other")
        start += turn.tokens
    if start != content.session.tokens:
        raise _bad("its turns and its token count differ")


def _bad(why: str) -> ErrorReply:
    return invalid(f"the archive can't be imported: {why}")
