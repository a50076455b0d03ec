"""Turns: the life of GENERATE and SESSION.APPEND from the client's request to its one terminal reply.

    LOOKUP     the log is asked for the session, and whether it has answered this request before
    HELD       accepted; no engine is ready to take it
    SUBMITTED  given to the engine; if it dies now, the next engine gets the turn
    STARTED    the engine computes; if it dies now, the turn ends with ENGINE_DIED
    STORING    finished; the turn is on its way to the disk, and can no longer be cancelled

A turn that is to end early (`ending`) gets its terminal reply when the engine has let go of it, so that its session is
free again by then. Sessions are locked by name from the request until the terminal reply.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from atlas_client.errors import ErrorCode, ErrorReply
from atlas_client.protocol import Accepted, Error, Generate, Progress, Sampling, SessionAppend

from ..config import Config
from ..engine.messages import Failed, Finished, Relay, Started, State, Submit
from .calls import Call
from .log import Log
from .outbox import Outbox
from .sessions import Sessions, TurnRecord
from .streams import Key, Stream
from .supervisor import Supervisor
from .turn import Phase, Turn, check, record_of, replay, seeded

log = logging.getLogger("atlasd.turns")
MAX_SUBMITS = 3  # a request that was in the queue of that many engines that died is no longer offered
EARLY_CANCEL_S = 5.0  # CANCEL may overtake its request: they travel on two sockets
PHASES = {"starting": "load", "downloading": "download", "loading": "load", "quantizing": "quantize"}


class Turns:
    """All turns that have no terminal reply yet."""

    def __init__(self, config: Config, outbox: Outbox, sessions: Log, engine: Supervisor) -> None:
        self.config = config
        self.outbox = outbox
        self.sessions = sessions
        self.engine = engine
        self.live: dict[str, Turn] = {}  # by ticket, in order of arrival
        self.locks: dict[Key, str] = {}  # owner, session name -> rid of the request that changes it
        self.paused = False  # a model switch waits: nothing new goes to the engine
        self._early: dict[str, float] = {}  # tickets cancelled before their request was read

    @property
    def waiting(self) -> int:
        return sum(turn.phase in (Phase.LOOKUP, Phase.HELD, Phase.SUBMITTED) for turn in self.live.values())

    @property
    def in_engine(self) -> int:
        return sum(turn.phase in (Phase.SUBMITTED, Phase.STARTED) for turn in self.live.values())

    @property
    def running(self) -> int:
        return sum(turn.phase is Phase.STARTED for turn in self.live.values())

    # --- requests ----------------------------------------------------------------------------------------

    def generate(self, call: Call) -> None:
        """GENERATE. Raises ErrorReply when it is refused at once."""
        self._accept(call, call.request, append_only=False)

    def append(self, call: Call) -> None:
        """SESSION.APPEND."""
        asked: SessionAppend = call.request
        request = Generate(
            prompt=asked.prompt, tokens=asked.tokens, messages=asked.messages, session=asked.session,
            sampling=Sampling(max_tokens=0),
        )  # fmt: skip
        self._accept(call, request, append_only=True)

    def _accept(self, call: Call, request: Generate, append_only: bool) -> None:
        check(request)
        now = time.monotonic()
        turn = Turn(
            call.stream, call.digest, seeded(call, request), append_only,
            detach=request.session is not None if request.detach is None else request.detach, arrived=now,
            deadline=now + request.deadline_ms / 1000 if request.deadline_ms else None,
        )  # fmt: skip
        if turn.lock is None:
            self._admit(turn)
        elif turn.lock in self.locks:
            self._answered_or_busy(turn)
        else:
            self.locks[turn.lock] = turn.rid
            self.live[turn.ticket] = turn
            self._look_up(turn)

    def _look_up(self, turn: Turn) -> None:
        owner, rid = turn.stream.key
        name = turn.request.session or ""

        def work(sessions: Sessions) -> Any:
            if answer := sessions.answered(owner, rid):
                return answer
            record = sessions.open(owner, name)
            return record, sessions.tokens(record)

        def report(result: Any, error: ErrorReply | None) -> None:
            if turn.ticket not in self.live:
                return
            if error is not None:
                self._end(turn, Error.of(error))
            elif isinstance(result[1], TurnRecord):
                self._end_answered(turn, result[1])
            else:
                turn.session, turn.tokens = result
                self._readmit(turn)

        self.sessions.submit(work, report)

    def _readmit(self, turn: Turn) -> None:
        try:
            self._admit(turn)
        except ErrorReply as error:
            self._end(turn, Error.of(error))

    def _answered_or_busy(self, turn: Turn) -> None:
        """The session is in use; but the request may be one that the log has an answer to."""
        owner, rid = turn.stream.key

        def report(result: Any, error: ErrorReply | None) -> None:
            if result is not None:
                replay(self.outbox, turn.stream, turn.digest, result[1], turn.request.session)
            else:
                busy = ErrorReply(ErrorCode.SESSION_BUSY, f"session {turn.request.session!r} has a running turn")
                self.outbox.end(turn.stream, Error.of(error or busy))

        self.sessions.submit(lambda sessions: sessions.answered(owner, rid), report)

    def _end_answered(self, turn: Turn, record: TurnRecord) -> None:
        self._drop(turn)
        replay(self.outbox, turn.stream, turn.digest, record, turn.request.session)

    def _admit(self, turn: Turn) -> None:
        """Takes the turn into the queue. Raises ErrorReply."""
        self._check_model(turn)
        ahead = self.waiting - (turn.ticket in self.live)
        if ahead >= self.config.max_queue:
            raise ErrorReply(ErrorCode.QUEUE_FULL, f"{ahead} requests are waiting")
        self.live[turn.ticket] = turn
        turn.phase = Phase.HELD
        if turn.ending is None and self._early.pop(turn.ticket, None) is not None:
            turn.ending = _cancelled()
        if turn.ending is not None:
            self._end(turn, turn.ending)
            return
        self.outbox.push(turn.stream, Accepted(ahead))
        if self.engine.ready and not self.paused:
            self._submit(turn)
        else:
            self._tell_state(turn, self.engine.state)

    def _check_model(self, turn: Turn) -> None:
        state = self.engine.state
        if state.state == "failed":
            code = ErrorCode(state.error.code) if state.error else ErrorCode.ENGINE_DIED
            raise ErrorReply(code, self.engine.error, "mend that, then `atlasctl model load NAME`")
        if state.state == "stopped":
            raise ErrorReply(ErrorCode.MODEL_NOT_LOADED, "no model is loaded", "load one: `atlasctl model load NAME`")
        names = {self.engine.model, state.model.name if state.model else self.engine.model}
        if turn.request.model is not None and turn.request.model not in names:
            raise ErrorReply(
                ErrorCode.MODEL_NOT_LOADED, f"{turn.request.model!r} is not loaded; {self.engine.model!r} is"
            )

    # --- to the engine -----------------------------------------------------------------------------------

    def resume(self) -> None:
        """Submits what is held. Called when an engine has become ready."""
        if not self.engine.ready or self.paused:
            return
        for turn in [turn for turn in self.live.values() if turn.phase is Phase.HELD]:
            try:
                self._check_model(turn)
                self._submit(turn)
            except ErrorReply as error:
                self._end(turn, Error.of(error))

    def _submit(self, turn: Turn) -> None:
        session = turn.session
        if session and session.tokens and session.tokenizer != self.engine.state.tokenizer:
            raise ErrorReply(
                ErrorCode.MODEL_MISMATCH, f"session {session.name!r} was made with {session.model!r}, another tokenizer"
            )
        turn.phase = Phase.SUBMITTED
        turn.submits += 1
        turn.submitted = time.monotonic()
        message = Submit(
            turn.ticket, turn.stream.key[0], session.id if session else None, turn.request, turn.append_only,
            session.kv_identity if session else "", session.last_finish if session else "",
        )  # fmt: skip
        self.engine.send(message, turn.tokens)

    # --- from the engine ---------------------------------------------------------------------------------

    def take(self, message: Any, raw: Sequence[bytes]) -> None:
        """STARTED, RELAY, FINISHED and FAILED. Those of a turn that is gone are ignored."""
        turn = self.live.get(message.rid)
        if turn is None:
            return
        match message:
            case Relay():
                if turn.ending is None:
                    self.outbox.relay(turn.stream, raw[0], progress=message.progress)
            case Started():
                turn.phase = Phase.STARTED
            case Finished():
                self._finish(turn, message, raw)
            case Failed():
                self._end(turn, turn.ending or message.error)

    def _finish(self, turn: Turn, message: Finished, raw: Sequence[bytes]) -> None:
        if turn.ending is not None:
            self._end(turn, turn.ending)
            return
        record = record_of(turn, message, raw)
        session = turn.session
        if session is None:
            self._end(turn, record.done(None))
            return
        turn.phase = Phase.STORING
        model = self.engine.state.model
        grown = msgspec.structs.replace(
            session, model=model.name if model else self.engine.model, tokenizer=message.tokenizer,
            kv_identity=message.kv_identity,
        )  # fmt: skip

        def report(result: Any, error: ErrorReply | None) -> None:
            self._end(turn, Error.of(error) if error else record.done(turn.request.session))

        self.sessions.submit(lambda sessions: sessions.append(grown, record), report)

    def tell_state(self, state: State) -> None:
        """Shows the engine's progress in loading to the turns that wait for it; ends them when it failed."""
        if state.state == "ready":
            self.resume()
            return
        for turn in [turn for turn in self.live.values() if turn.phase is Phase.HELD]:
            if state.state in ("failed", "stopped"):
                self._readmit_or_end(turn)
            else:
                self._tell_state(turn, state)

    def _readmit_or_end(self, turn: Turn) -> None:
        try:
            self._check_model(turn)
        except ErrorReply as error:
            self._end(turn, Error.of(error))

    def _tell_state(self, turn: Turn, state: State) -> None:
        if phase := PHASES.get(state.state):
            self.outbox.progress(turn.stream, Progress(phase, state.done, state.total, state.unit or "bytes"))

    def engine_died(self, reason: str) -> None:
        """Started turns end; submitted ones wait for the next engine."""
        for turn in list(self.live.values()):
            if turn.phase is Phase.STARTED or (turn.phase is Phase.SUBMITTED and turn.submits >= MAX_SUBMITS):
                self._end(turn, turn.ending or Error.of(ErrorReply(ErrorCode.ENGINE_DIED, reason)))
            elif turn.phase is Phase.SUBMITTED:
                turn.phase = Phase.HELD
                if turn.ending is not None:
                    self._end(turn, turn.ending)

    # --- ending early ------------------------------------------------------------------------------------

    def cancel(self, key: Key, now: float) -> None:
        """CANCEL from the client. One that comes before its request is remembered for a moment."""
        ticket = "/".join(key)
        turn = self.live.get(ticket)
        if turn is not None:
            self.interrupt(turn, _cancelled())
        elif self.outbox.table.find(key) is None and len(self._early) < 1000:
            self._early[ticket] = now

    def gone(self, stream: Stream) -> None:
        """The client vanished: its turn is cancelled unless it is to go on alone."""
        turn = self.live.get("/".join(stream.key))
        if turn is not None and turn.stream is stream and not turn.detach:
            self.interrupt(turn, _cancelled("the client went away"))

    def slow(self, stream: Stream) -> None:
        """The client does not read: its turn ends before it takes the daemon's memory."""
        turn = self.live.get("/".join(stream.key))
        if turn is not None and turn.stream is stream:
            self.interrupt(turn, Error.of(ErrorReply(ErrorCode.SLOW_CONSUMER, "the client does not read its events")))

    def interrupt(self, turn: Turn, error: Error) -> None:
        """Ends the turn with an error: at once if the engine does not have it, else when it lets go."""
        if turn.phase is Phase.STORING or turn.ending is not None:
            return
        turn.ending = error
        if turn.phase is Phase.HELD:
            self._end(turn, error)
        elif turn.phase in (Phase.SUBMITTED, Phase.STARTED):
            self.engine.cancel(turn.ticket)

    def interrupt_all(self, code: ErrorCode, message: str) -> None:
        """Ends every turn that can still be ended."""
        for turn in list(self.live.values()):
            self.interrupt(turn, Error.of(ErrorReply(code, message)))

    def tick(self, now: float) -> None:
        """Applies deadlines."""
        for turn in list(self.live.values()):
            if turn.deadline is not None and now >= turn.deadline:
                self.interrupt(turn, Error.of(ErrorReply(ErrorCode.DEADLINE, "the request's deadline has passed")))
        self._early = {key: since for key, since in self._early.items() if now - since < EARLY_CANCEL_S}

    def next_deadline(self) -> float:
        """When tick() is due; infinity without deadlines."""
        due = (turn.deadline for turn in self.live.values() if turn.deadline is not None and turn.ending is None)
        return min(due, default=float("inf"))

    # --- the end -----------------------------------------------------------------------------------------

    def _end(self, turn: Turn, reply: Any) -> None:
        self._drop(turn)
        code = reply.code if isinstance(reply, Error) else reply.finish_reason
        log.info("request ended rid=%s session=%a end=%s", turn.ticket, turn.request.session, code)
        self.outbox.end(turn.stream, reply)

    def _drop(self, turn: Turn) -> None:
        self.live.pop(turn.ticket, None)
        if turn.lock is not None and self.locks.get(turn.lock) == turn.rid:
            del self.locks[turn.lock]


def _cancelled(message: str = "cancelled by the client") -> Error:
    return Error.of(ErrorReply(ErrorCode.CANCELLED, message))
