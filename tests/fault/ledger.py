"""A session log without a broker: turns that follow from their numbers, and what must be found of them."""

from __future__ import annotations

import functools
import random
import select
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atlas_client.errors import ErrorReply
from atlas_client.protocol import Sampling, Timings, Usage
from world import Row, World

from atlasd.broker.log import Log
from atlasd.broker.sessions import Sessions, TurnRecord

OWNER, SESSIONS, TURNS = "1", 5, 120


def do(log: Log, work: Callable[[Sessions], Any]) -> Any:
    """Runs work and waits until it is settled, as the broker's loop does. Raises ErrorReply."""
    results: list[tuple[Any, ErrorReply | None]] = []
    log.submit(work, lambda result, error: results.append((result, error)))
    while not results:
        select.select([log.fd], [], [], 30.0)
        log.deliver()
    result, error = results[0]
    if error is not None:
        raise error
    return result


def tokens(number: int, size: int = 400) -> list[int]:
    """Prompt and answer of turn `number`."""
    return [number, *random.Random(number).choices(range(50_000), k=number * 37 % size)]


def add(log: Log, number: int, size: int = 400) -> None:
    """Turn `number`, of session `number` % SESSIONS. Raises ErrorReply."""
    name = f"s{number % SESSIONS}"

    def work(sessions: Sessions) -> None:
        record = sessions.open(OWNER, name)
        turn = TurnRecord(
            rid=f"r{number}", digest=b"d", start=record.tokens, prompt_ids=array("I", tokens(number, size)).tobytes(),
            generated_ids=array("I", [number]).tobytes(), finish_reason="length", created=1.0, prompt_text="p",
            text="t", sampling=Sampling(), usage=Usage(), timings=Timings(),
        )  # fmt: skip
        sessions.append(record, turn)

    do(log, work)


def found(log: Log, size: int = 400) -> tuple[list[int], list[str]]:
    """(turns that are there, what is wrong with them)"""
    numbers: list[int] = []
    wrong: list[str] = []
    for name in (f"s{n}" for n in range(SESSIONS)):
        for turn in do(log, functools.partial(_turns, name)):
            number = int(turn.rid[1:])
            numbers.append(number)
            if array("I", turn.prompt_ids).tolist() != tokens(number, size) or number % SESSIONS != int(name[1:]):
                wrong.append(f"turn {number} in session {name} is not what was stored")
    return numbers, wrong


def _turns(name: str, sessions: Sessions) -> list[TurnRecord]:
    record = sessions.find(OWNER, name)
    return sessions.turns(record) if record else []


def write(path: Path, journal: Path, said: Path, seed: int) -> None:
    """Stores turns, noting each acknowledgement with the journal's length."""
    log = Log(path)
    with said.open("w", buffering=1) as notes:
        for number in range(TURNS):
            add(log, number)
            notes.write(f"{journal.stat().st_size} {number}\n")
    log.close()


def check(path: Path) -> tuple[list[int], list[str]]:
    """What a log holds; it must open and take one more turn."""
    log = Log(path)
    numbers, wrong = found(log)
    add(log, 10_000 + SESSIONS)
    if 10_000 + SESSIONS not in found(log)[0]:
        wrong.append("a turn stored afterwards is not there")
    log.close()
    return numbers, wrong


def judge(world: World, row: Row, what: str, acknowledged: list[Any], numbers: list[int], wrong: list[str]) -> None:
    """Every acknowledged turn once, at most the one under way besides."""
    known = {int(each) for each in acknowledged}
    if lost := known - set(numbers):
        world.note(row, "lost_turns", f"{what}: turns {sorted(lost)} were acknowledged and are gone")
    if len(set(numbers)) != len(numbers) or set(numbers) - known - {max(known, default=-1) + 1}:
        world.note(row, "undetected", f"{what}: {len(known)} turns acknowledged, found {numbers}")
    for text in wrong:
        world.note(row, "wrong_tokens", f"{what}: {text}")
