"""Sessions at work: threads that send turn after turn, whatever happens to the daemon, and keep what they were told.

A turn that breaks off is sent again under the same request id until it is acknowledged, as any client would.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator

from atlas_client import Client, DaemonUnavailable, ErrorReply
from atlas_client.protocol import Done, Progress, Tokens
from world import Row, Turn, World

LIMIT_S = 120.0  # for one turn, kills and restarts included
FULL = 1300  # tokens; then the writer goes on with a new session
PHASES = ("sent", "accepted", "restore", "prefill", "decode", "last token", "done")


class Trap:
    """Runs an action in the very thread that sees a turn enter a phase. One at a time."""

    def __init__(self) -> None:
        self.seen = dict.fromkeys(PHASES, 0)
        self.sprung = threading.Event()
        self._lock = threading.Lock()
        self._action: Callable[[], None] | None = None
        self._phase = ""
        self._skip = 0
        self._delay = 0.0

    def set(self, phase: str, action: Callable[[], None], *, skip: int = 0, delay: float = 0.0) -> None:
        """`action` runs `delay` seconds after the phase was entered for the (skip + 1)-th time from now."""
        with self._lock:
            self.sprung.clear()
            self._phase, self._action, self._skip, self._delay = phase, action, skip, delay

    def enter(self, phase: str) -> None:
        with self._lock:
            self.seen[phase] += 1
            if self._action is None or phase != self._phase:
                return
            self._skip -= 1
            if self._skip >= 0:
                return
            self._spring()

    def force(self) -> None:
        """Runs the action now, if it has not run."""
        with self._lock:
            if self._action is not None:
                self._spring()

    def _spring(self) -> None:
        action, self._action = self._action, None
        time.sleep(self._delay)
        if action:
            action()
        self.sprung.set()


class Writer(threading.Thread):
    """One thread, one session after the other."""

    def __init__(self, world: World, row: Row, trap: Trap, name: str, seed: int) -> None:
        super().__init__(name=name, daemon=True)
        self.world = world
        self.row = row
        self.trap = trap
        self.draw = random.Random(seed)
        self.sent: dict[str, list[Turn]] = {}  # by session, in order
        self.restored = 0  # tokens read from disk instead of computed
        self._ending = threading.Event()
        self._session = f"{name}-0"
        self._length = 0

    def run(self) -> None:
        while not self._ending.is_set():
            self.send_one()

    def send_one(self) -> None:
        """One turn, until it is acknowledged."""
        self._work(self._next())

    def finish(self) -> None:
        """Lets the running turn end."""
        self._ending.set()
        self.join(LIMIT_S + 30)

    def _next(self) -> Turn:
        if self._length > FULL:
            self._session = f"{self.name}-{len(self.sent)}"
            self._length = 0
        turns = self.sent.setdefault(self._session, [])
        size = self.draw.randrange(1, 30) if self.draw.random() < 0.7 else self.draw.randrange(100, 400)
        at = self.draw.randrange(len(self.world.text) - size)
        turn = Turn(
            self._session, f"{self._session}.{len(turns)}", self.world.text[at : at + size],
            self.draw.randrange(1, 24), 0.8 if self.draw.random() < 0.15 else 0.0,
        )  # fmt: skip
        turns.append(turn)
        return turn

    def _work(self, turn: Turn) -> None:
        end = time.monotonic() + LIMIT_S
        while turn.tokens is None and time.monotonic() < end:
            try:
                with Client(self.world.daemon.socket, reconnect=2.0) as client:
                    self._attempt(client, turn)
            except (DaemonUnavailable, ErrorReply) as error:
                if isinstance(error, ErrorReply) and not error.retryable:
                    self.world.note(self.row, "undetected", f"{turn.rid}: {error}")
                    break
                time.sleep(0.05)
        if turn.tokens is None:
            self.world.note(self.row, "undetected", f"{turn.rid} has no answer")
            self._ending.set()
        else:
            self._length += len(turn.prompt) + len(turn.tokens)

    def _attempt(self, client: Client, turn: Turn) -> None:
        generation = client.session(turn.session).generate(request_id=turn.rid, **turn.options())
        self.trap.enter("sent")
        try:
            for event in generation:
                match event:
                    case Done():
                        self._take(turn, event)
                        self.trap.enter("done")
                    case Tokens():
                        last = len(generation.tokens) == turn.max_tokens
                        self.trap.enter("last token" if last else "decode")
                    case Progress():
                        if event.phase in PHASES:
                            self.trap.enter(event.phase)
                    case _:
                        self.trap.enter("accepted")
        finally:
            turn.begun.append(generation.tokens)

    def _take(self, turn: Turn, done: Done) -> None:
        if not done.durable:
            self.world.note(self.row, "undetected", f"{turn.rid} was acknowledged without being durable")
        self.restored += done.usage.restored
        turn.tokens = done.tokens

    # --- judging ----------------------------------------------------------------------------------------------

    def audit(self, client: Client) -> None:
        """What was acknowledged is in the log, exactly and once; at most the turn under way is there besides.
        May run while the writer goes on."""
        for session, turns in list(self.sent.items()):
            known = [turn for turn in list(turns) if turn.tokens is not None]
            try:
                detail = client.session(session, create=False).show()
                stored = client.session(session, create=False).token_ids()
            except ErrorReply:
                if known:
                    self.world.note(self.row, "lost_turns", f"session {session} is gone with {len(known)} turns")
                continue
            right = [token for turn in known for token in (*turn.prompt, *(turn.tokens or ()))]
            rids = [turn.rid for turn in detail.turns]
            if rids[: len(known)] != [turn.rid for turn in known] or stored[: len(right)] != right:
                self.world.note(self.row, "lost_turns", f"session {session}: {rids}, stored {len(stored)} tokens")
            elif rids != [turn.rid for turn in list(turns)][: len(rids)]:
                self.world.note(self.row, "undetected", f"session {session} has turns nobody sent, or twice: {rids}")

    def judge(self, client: Client) -> None:
        """Every turn of every session against the undisturbed daemon."""
        for turns in self.sent.values():
            history: list[int] = []
            for turn in turns:
                if turn.tokens is None:
                    break
                self.world.judge(self.row, client, history, turn)
                history += turn.prompt + turn.tokens


def audit(writers: list[Writer]) -> None:
    """All writers' audits, with one client."""
    with Client(writers[0].world.daemon.socket) as client:
        for writer in writers:
            writer.audit(client)


def judge(writers: list[Writer]) -> None:
    """All writers' turns against the undisturbed daemon, side by side."""

    def one(writer: Writer) -> None:
        with Client(writer.world.reference.socket) as client:
            writer.judge(client)

    threads = [threading.Thread(target=one, args=(writer,)) for writer in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextlib.contextmanager
def at_work(world: World, row: Row, trap: Trap, draw: random.Random, count: int = 4) -> Iterator[list[Writer]]:
    """Writers that run meanwhile; then they finish, and all they were told is judged."""
    tag = f"{row.scenario.split()[0]}{draw.randrange(1000)}"
    writers = [Writer(world, row, trap, f"{tag}-{n}", draw.randrange(10**9)) for n in range(count)]
    for writer in writers:
        writer.start()
    yield writers
    world.revive(ready=True)
    for writer in writers:
        writer.finish()
    audit(writers)
    judge(writers)
    world.check_accounts(row)
