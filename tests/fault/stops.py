"""An engine that stands still (SIGSTOP): for less than the heartbeat it just goes on, for longer it is replaced."""

from __future__ import annotations

import os
import random
import signal
import time

from atlas_client import Client, ErrorReply
from atlas_client.client import Generation
from world import HEARTBEAT_S, Row, Turn, World, until

TOKENS = 64


def stops(world: World, runs: int, draw: random.Random) -> Row:
    """Each run: one short and one long stop of the engine, in the middle of a turn."""
    row = Row("engine stands still")
    session = f"stop-{draw.randrange(10**6)}"
    history: list[int] = []
    with world.watched(row, hangs=True), Client(world.reference.socket) as reference:
        for number in range(2 * runs):
            world.revive(ready=True)
            at = draw.randrange(len(world.text) - 50)
            turn = Turn(session, f"{session}.{number}", world.text[at : at + 50], TOKENS)
            with Client(world.daemon.socket) as client:
                (_long if number % 2 else _short)(world, row, client, turn, draw)
                row.runs += 1
                world.judge(row, reference, history, turn)
                history += turn.prompt + (turn.tokens or [])
                if client.session(session).token_ids() != history:
                    world.note(row, "lost_turns", f"{turn.rid}: the log holds another session")
    world.check_accounts(row)
    return row


def _begin(client: Client, turn: Turn, tokens: int) -> Generation:
    """The turn, once some of its tokens are there."""
    generation = client.session(turn.session).generate(request_id=turn.rid, **turn.options())
    while len(generation.tokens) < tokens:
        next(generation)
    return generation


def _short(world: World, row: Row, client: Client, turn: Turn, draw: random.Random) -> None:
    engine = world.daemon.engine_pid
    generation = _begin(client, turn, draw.randrange(1, 10))
    os.kill(engine, signal.SIGSTOP)
    time.sleep(HEARTBEAT_S * 0.4)  # the fault itself
    os.kill(engine, signal.SIGCONT)
    turn.tokens = generation.result.tokens
    if world.daemon.engine_pid != engine:
        world.note(row, "crashes", "an engine was replaced that stood still for less than the heartbeat")


def _long(world: World, row: Row, client: Client, turn: Turn, draw: random.Random) -> None:
    engine = world.daemon.engine_pid
    generation = _begin(client, turn, draw.randrange(1, 10))
    os.kill(engine, signal.SIGSTOP)
    began = time.monotonic()
    try:
        list(generation)
        said = "DONE"
    except ErrorReply as error:
        said = error.code.value
    turn.begun.append(generation.tokens)
    if said != "ENGINE_DIED" or time.monotonic() - began > HEARTBEAT_S + 5:
        world.note(row, "undetected", f"an engine stood still for {time.monotonic() - began:.1f} s: {said}")
    until(lambda: world.daemon.engine_pid not in (0, engine), 30, "another engine")
    turn.tokens = client.session(turn.session).generate(request_id=turn.rid, **turn.options()).result.tokens
