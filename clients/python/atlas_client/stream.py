"""One request's replies as its caller sees them, whatever happens to the connection. No I/O.

Replies of one broker are ordered by Header.seq. A broker that was started again knows nothing of them, gets the request
a second time and begins anew at token 0: what the caller has is then skipped by its place (Tokens.index) and compared.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Sequence
from typing import Any

from .errors import AtlasError, DaemonUnavailable, ErrorCode, ErrorReply
from .protocol import (
    STREAMING,
    Attach,
    Done,
    Error,
    Generate,
    SessionDelete,
    SessionFork,
    SessionImport,
    SessionRename,
    Tokens,
)

MAX_RESENDS = 3  # without a single reply in between
NOT_REPEATABLE = (SessionFork, SessionRename, SessionImport, SessionDelete)  # a second time they answer otherwise
NOT_RETRIED = ("DEADLINE", "SLOW_CONSUMER")
FIRST_RETRY_S = 0.1  # doubled with each attempt


class Stream:
    """Replies go in with `feed`, events come out of `events`; `finished` when none will follow."""

    def __init__(self, body: Any, raw: Sequence[bytes] = (), *, rid: str | None = None, retries: int = 0) -> None:
        self.rid = rid or uuid.uuid4().hex
        self.body = body
        self.raw = raw
        self.retries = retries
        self.attempts = 0
        self.events: deque[Any] = deque()
        self.reply: Any = None  # the terminal reply
        self.reply_raw: Sequence[bytes] = ()
        self.error: AtlasError | None = None
        self.last_seq = body.last_seq if isinstance(body, Attach) else 0
        self.resends = 0
        # Delivered so far: ids [base, base + len(ids)) and `chars` characters. The broker that is heard now has sent
        # ids [base, base + _at_id) and `_at_char` characters; after a restart these run behind for a while.
        self.ids: list[int] = []
        self.chars = 0
        self._base: int | None = None if self.last_seq else 0
        self._at_id = 0
        self._at_char = 0

    @property
    def finished(self) -> bool:
        return self.reply is not None or self.error is not None

    def feed(self, seq: int, reply: Any, raw: Sequence[bytes] = ()) -> None:
        """Takes one reply. A repeated one is skipped; one that contradicts what was delivered ends the stream."""
        if self.finished or (seq and seq <= self.last_seq) or self._early(reply):
            return
        self.last_seq = seq or self.last_seq
        self.resends = 0
        try:
            if isinstance(reply, Error):
                self.error = reply.exception()
            elif isinstance(reply, Tokens):
                self._tokens(reply)
            elif isinstance(reply, STREAMING):
                self.events.append(reply)
            else:
                self._finish(reply, raw)
        except ErrorReply as error:
            self.error = error

    def _early(self, reply: Any) -> bool:
        """Tokens beyond what is due were on their way before this stream was attached: they come again in place."""
        if not isinstance(self.body, Attach) or not isinstance(reply, Tokens) or self._base is None:
            return False
        return reply.index - self._base > self._at_id

    def restart(self) -> None:
        """What comes next is from the start again, from a broker that has not sent any of it."""
        self.last_seq = self.body.last_seq if isinstance(self.body, Attach) else 0
        self._at_id = self._at_char = 0

    def resend(self, reason: str) -> bool:
        """Whether the request may be sent again, under the same id; else the stream has ended with an error."""
        self.resends += 1
        if isinstance(self.body, NOT_REPEATABLE):
            self.error = DaemonUnavailable(
                f"{reason} before it answered; what was asked may or may not have been done",
                "look with `atlasctl session list`, then ask again",
            )
        elif self.resends > MAX_RESENDS:
            self.error = ErrorReply(ErrorCode.INTERNAL, f"the daemon lost the request {MAX_RESENDS} times")
        else:
            self.restart()
        return self.error is None

    def retry(self) -> float | None:
        """After a retryable error with attempts left: seconds to wait before sending it again, same id. Else None."""
        error = self.error
        if not isinstance(error, ErrorReply) or not error.retryable or error.code in NOT_RETRIED:
            return None
        if self.attempts >= self.retries:
            return None
        self.attempts += 1
        self.error = None
        self.restart()
        return float(FIRST_RETRY_S * 2 ** (self.attempts - 1))

    def _tokens(self, event: Tokens) -> None:
        if self._base is None:
            self._base = event.index
        if event.index - self._base != self._at_id:
            raise _differs(f"token {self._base + self._at_id} was due and token {event.index} came")
        known = self.ids[self._at_id : self._at_id + len(event.ids)]
        if event.ids[: len(known)] != known:
            raise _differs("it gave other tokens than before")
        skip_chars = min(max(self.chars - self._at_char, 0), len(event.text))
        self._at_id += len(event.ids)
        self._at_char += len(event.text)
        self._deliver(_after(event, len(known), skip_chars) if known or skip_chars else event)

    def _deliver(self, event: Tokens) -> None:
        self.ids += event.ids
        self.chars += len(event.text)
        if event.ids or event.text:
            self.events.append(event)

    def _finish(self, reply: Any, raw: Sequence[bytes]) -> None:
        if isinstance(reply, Done):
            self._complete(reply)
            self.events.append(reply)
        self.reply, self.reply_raw = reply, raw

    def _complete(self, done: Done) -> None:
        """A broker that finds the turn in its log answers with DONE alone: the rest is made into one event."""
        if not isinstance(self.body, Generate) or not self.body.stream:
            return
        shared = min(len(self.ids), len(done.tokens))
        if done.tokens[:shared] != self.ids[:shared]:
            raise _differs("it gave other tokens than before")
        self._deliver(Tokens(len(self.ids), done.tokens[len(self.ids) :], done.text[self.chars :]))


def _after(event: Tokens, ids: int, chars: int) -> Tokens:
    logprobs = event.logprobs[ids:] if len(event.logprobs) == len(event.ids) else event.logprobs
    return Tokens(event.index + ids, event.ids[ids:], event.text[chars:], logprobs)


def _differs(how: str) -> ErrorReply:
    return ErrorReply(
        ErrorCode.ENGINE_DIED,
        f"the answer could not be continued after an interruption: {how}",
        "discard what was received and send the request again",
    )
