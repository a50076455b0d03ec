"""Framing: messages to ZeroMQ frames and back; the one place where bytes become types and bad ones are refused.

Frames on the wire, after ZeroMQ's identity frame:

    ["ATL1"] [Header as msgpack] [body as msgpack, a map with a "type" tag] [raw frame]*
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from .protocol import ControlRequest, Header, Reply, Request

MAGIC = b"ATL1"


class _Tag(msgspec.Struct):
    type: str


_encoder = msgspec.msgpack.Encoder()
_header = msgspec.msgpack.Decoder(Header)
_request = msgspec.msgpack.Decoder(Request)
_control = msgspec.msgpack.Decoder(ControlRequest)
_reply = msgspec.msgpack.Decoder(Reply)


class BadFrame(ValueError):
    """A message that does not follow the protocol. `rid` is set when its header could be read."""

    def __init__(self, message: str, rid: str | None = None, *, version: bool = False, parameter: bool = False) -> None:
        super().__init__(message)
        self.rid = rid
        self.parameter = parameter  # well-formed and known, but a field's value is not allowed
        self.version = version  # the magic names another protocol version


def encode(header: Header, body: Any, raw: Sequence[bytes] = ()) -> list[bytes]:
    """The frames of one message, without ZeroMQ's identity."""
    return [MAGIC, _encoder.encode(header), _encoder.encode(body), *raw]


def decode_header(frames: Sequence[bytes]) -> Header:
    """Checks the framing and reads the header. Raises BadFrame."""
    if len(frames) < 3:
        raise BadFrame(f"{len(frames)} frames; a message has a magic, a header and a body")
    if frames[0] != MAGIC:
        raise BadFrame(f"magic {bytes(frames[0][:8])!r}, expected {MAGIC!r}", version=bytes(frames[0][:3]) == MAGIC[:3])
    try:
        return _header.decode(frames[1])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadFrame(f"header: {error}") from None


def decode_request(frames: Sequence[bytes]) -> tuple[Header, Any, Sequence[bytes]]:
    """Header, one of Request, raw frames. Raises BadFrame."""
    return _decode(frames, _request)


def decode_control(frames: Sequence[bytes]) -> tuple[Header, Any, Sequence[bytes]]:
    """Header, one of ControlRequest, raw frames. Raises BadFrame."""
    return _decode(frames, _control)


def decode_reply(frames: Sequence[bytes]) -> tuple[Header, Any, Sequence[bytes]]:
    """Header, one of Reply, raw frames. Raises BadFrame."""
    return _decode(frames, _reply)


def _decode(frames: Sequence[bytes], decoder: msgspec.msgpack.Decoder[Any]) -> tuple[Header, Any, Sequence[bytes]]:
    header = decode_header(frames)
    try:
        return header, decoder.decode(frames[2]), frames[3:]
    except msgspec.ValidationError as error:
        raise BadFrame(str(error), header.rid, parameter=_typed(frames[2], error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadFrame(f"body: {error}", header.rid) from None


def _typed(body: bytes, error: msgspec.ValidationError) -> bool:
    """Whether a body that was refused is of a known type, so that only a field's value is wrong."""
    try:
        msgspec.msgpack.decode(body, type=_Tag)
    except msgspec.DecodeError:
        return False
    return "`$.type`" not in str(error)
