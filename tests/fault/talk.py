"""One session, turn by turn, on any daemon: what was acknowledged is kept, and judged at the end."""

from __future__ import annotations

import os
import random

from atlas_client import Client, ErrorReply
from atlas_client.protocol import Done
from conftest import Daemon
from world import Row, Turn, World

HONEST = ("DISK_FULL", "INTERNAL", "ENGINE_DIED")  # codes that a fault may be answered with
ATTEMPTS = 20


class Talk:
    """Sends turns one after the other. `errors`: what was answered instead of DONE."""

    def __init__(self, world: World, row: Row, daemon: Daemon, draw: random.Random) -> None:
        self.world, self.row, self.daemon, self.draw = world, row, daemon, draw
        self.session = f"talk-{os.urandom(6).hex()}"  # of no other scenario with the same seed
        self.turns: list[Turn] = []
        self.errors: list[ErrorReply] = []

    @property
    def history(self) -> list[int]:
        """Tokens of the acknowledged turns."""
        known = (turn for turn in self.turns if turn.tokens is not None)
        return [token for turn in known for token in (*turn.prompt, *(turn.tokens or ()))]

    def say(self, size: int = 150, tokens: int = 8) -> Done | None:
        """One more turn, or the last one again if it was not acknowledged. None: the answer was an error."""
        if not self.turns or self.turns[-1].tokens is not None:
            at = self.draw.randrange(len(self.world.text) - size)
            rid = f"{self.session}.{len(self.turns)}"
            self.turns.append(Turn(self.session, rid, self.world.text[at : at + size], tokens))
        turn = self.turns[-1]
        try:
            with Client(self.daemon.socket) as client:
                done: Done = client.session(self.session).generate(request_id=turn.rid, **turn.options()).result
        except ErrorReply as error:
            self.errors.append(error)
            if error.code.value not in HONEST:
                self.world.note(self.row, "undetected", f"{turn.rid}: {error}")
            if not error.retryable:  # this id is answered so for good: what was refused must never be stored
                turn.rid += "x"
            return None
        if not done.durable:
            self.world.note(self.row, "undetected", f"{turn.rid} was acknowledged without being durable")
        turn.tokens = done.tokens
        return done

    def settle(self) -> Done:
        """say() until it is acknowledged: the fault is over. Raises TimeoutError."""
        for _ in range(ATTEMPTS):
            if done := self.say():
                return done
        raise TimeoutError(f"{self.turns[-1].rid} is still refused: {self.errors[-1]}")

    def audit(self) -> None:
        """The log holds what was acknowledged, exactly and once, and nothing that was refused."""
        known = [turn for turn in self.turns if turn.tokens is not None]
        try:
            with Client(self.daemon.socket) as client:
                detail = client.session(self.session, create=False).show()
                stored = client.session(self.session, create=False).token_ids()
        except ErrorReply as error:
            if known:
                self.world.note(self.row, "lost_turns", f"session {self.session}: {error}")
            return
        rids = [turn.rid for turn in detail.turns]
        if rids[: len(known)] != [turn.rid for turn in known] or stored[: len(self.history)] != self.history:
            self.world.note(self.row, "lost_turns", f"session {self.session}: {rids}, stored {len(stored)} tokens")
        elif len(rids) > len(known):
            self.world.note(self.row, "undetected", f"session {self.session}: refused turns are there: {rids}")

    def judge(self, reference: Client) -> None:
        """All turns against an undisturbed daemon."""
        history: list[int] = []
        for turn in self.turns:
            if turn.tokens is None:
                break
            self.world.judge(self.row, reference, history, turn)
            history += turn.prompt + turn.tokens
