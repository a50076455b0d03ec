"""SIGKILL of the client in the middle of a session's turn: the turn goes on, and is there for whoever asks again."""

from __future__ import annotations

import json
import random
import subprocess
import sys

from atlas_client import Client, ErrorReply
from world import Row, Turn, World, until

TOKENS = 48
PROGRAM = """
import json, sys
from atlas_client import Client
socket, session, rid, options = sys.argv[1:]
with Client(socket) as client:
    for event in client.session(session).generate(request_id=rid, **json.loads(options)):
        print(type(event).__name__, flush=True)
"""


def readers(world: World, runs: int, draw: random.Random) -> Row:
    """Each run: a client as a process of its own, killed after some of its events; one session, a turn each."""
    row = Row("kill client in mid-stream")
    session = f"client-{draw.randrange(10**6)}"
    history: list[int] = []
    with world.watched(row), Client(world.reference.socket) as reference:
        for number in range(runs):
            at = draw.randrange(len(world.text) - 150)
            turn = Turn(session, f"{session}.{number}", world.text[at : at + draw.randrange(1, 150)], TOKENS)
            kill_reader(world, turn, draw.randrange(1, TOKENS // 2))
            row.runs += 1
            with Client(world.daemon.socket) as client:
                _ask_again(world, row, client, turn, history)
            if turn.tokens is not None:
                world.judge(row, reference, history, turn)
                history += turn.prompt + turn.tokens
    world.check_accounts(row)
    return row


def kill_reader(world: World, turn: Turn, events: int) -> None:
    """Runs a client process and kills it when it has seen that many events."""
    arguments = [str(world.daemon.socket), turn.session, turn.rid, json.dumps(turn.options())]
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(events):
        process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()


def _ask_again(world: World, row: Row, client: Client, turn: Turn, history: list[int]) -> None:
    """The turn ends by itself; then the same request, and attaching to it, give what the log holds."""
    handle = client.session(turn.session, create=False)

    def committed() -> bool:
        try:
            return turn.rid in [each.rid for each in handle.show().turns]
        except ErrorReply:
            return False

    try:
        until(committed, 60, "the turn is committed")
    except TimeoutError:
        world.note(row, "lost_turns", f"{turn.rid} ended with its client")
        return
    stored = handle.token_ids()
    turn.tokens = stored[len(history) + len(turn.prompt) :]
    again = client.session(turn.session).generate(request_id=turn.rid, **turn.options()).result
    attached = client.attach(turn.rid).result
    if stored[: len(history) + len(turn.prompt)] != history + turn.prompt:
        world.note(row, "lost_turns", f"{turn.rid}: the session is not what was sent")
    if not again.tokens == attached.tokens == turn.tokens:
        world.note(row, "wrong_tokens", f"{turn.rid}: {turn.tokens}, then {again.tokens} and {attached.tokens}")
    if handle.token_ids() != stored or not again.durable:
        world.note(row, "undetected", f"{turn.rid} ran twice, or is not durable")
