"""One turn: what is known of it, how its request is checked, and what is kept of it when it is done."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import time
from collections.abc import Sequence

import msgspec
from atlas_client.protocol import Accepted, Error, Generate, Tokens

from ..engine.messages import Finished
from .calls import Call
from .outbox import Outbox
from .sessions import SessionRecord, TurnRecord, check_name, invalid, unpack
from .streams import Key, Stream


class Phase(enum.Enum):
    LOOKUP = enum.auto()
    HELD = enum.auto()
    SUBMITTED = enum.auto()
    STARTED = enum.auto()
    STORING = enum.auto()


@dataclasses.dataclass(slots=True, eq=False)
class Turn:
    stream: Stream
    digest: bytes
    request: Generate
    append_only: bool
    detach: bool
    arrived: float  # monotonic seconds
    deadline: float | None
    phase: Phase = Phase.LOOKUP
    session: SessionRecord | None = None
    tokens: bytes = b""  # the session's token ids before the turn
    submits: int = 0
    submitted: float = 0.0
    ending: Error | None = None  # the terminal reply it is to get

    @property
    def rid(self) -> str:
        return self.stream.key[1]

    @property
    def ticket(self) -> str:
        """The request's name in the engine, where all owners' requests meet."""
        return "/".join(self.stream.key)

    @property
    def lock(self) -> Key | None:
        return (self.stream.key[0], self.request.session) if self.request.session is not None else None


def replay(outbox: Outbox, stream: Stream, digest: bytes, record: TurnRecord, session: str | None) -> None:
    """Answers a request from the log: ACCEPTED, TOKENS with the whole text, DONE."""
    if digest and digest != record.digest:
        outbox.end(stream, Error.of(invalid(f"request id {record.rid!r} was used for another request")))
        return
    outbox.push(stream, Accepted(0))
    if record.generated_ids:
        outbox.push(stream, Tokens(0, unpack(record.generated_ids), record.text))
    outbox.end(stream, record.done(session))


def record_of(turn: Turn, message: Finished, raw: Sequence[bytes]) -> TurnRecord:
    """The durable form of a finished turn; times count from arrival at the broker. `raw`: prompt ids, generated ids."""
    held = (turn.submitted - turn.arrived) * 1000
    timings = msgspec.structs.replace(
        message.timings, queue_ms=message.timings.queue_ms + held, ttft_ms=message.timings.ttft_ms + held
    )
    return TurnRecord(
        rid=turn.rid, digest=turn.digest, start=len(turn.tokens) // 4, prompt_ids=raw[0], generated_ids=raw[1],
        finish_reason=message.finish_reason, created=time.time(), prompt_text=message.prompt_text, text=message.text,
        sampling=turn.request.sampling, usage=message.usage, timings=timings, seed=message.seed,
        kv_durable=message.kv_durable, reset_reason=message.reset_reason,
    )  # fmt: skip


def check(request: Generate) -> None:
    """Raises INVALID_PARAMETER for what the message types do not rule out."""
    given = [value for value in (request.prompt, request.tokens, request.messages) if value is not None]
    if len(given) != 1:
        raise invalid("give exactly one of prompt, tokens and messages")
    if request.messages == []:
        raise invalid("messages is empty")
    if request.tokens and max(request.tokens) >= 2**32:
        raise invalid("a token id is below 2^32")
    if request.session is not None:
        check_name(request.session)


def seeded(call: Call, request: Generate) -> Generate:
    """The request with a seed. One that was not given follows from owner and request id, so that a request sent again
    after a restart of the daemon yields the tokens its client has seen already."""
    if request.sampling.seed is not None:
        return request
    drawn = hashlib.blake2b("/".join(call.stream.key).encode(), digest_size=8).digest()
    sampling = msgspec.structs.replace(request.sampling, seed=int.from_bytes(drawn, "little") >> 1)
    return msgspec.structs.replace(request, sampling=sampling)
