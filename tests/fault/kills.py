"""SIGKILL of broker, engine or both, at any moment of a turn, while several sessions are at work."""

from __future__ import annotations

import collections
import itertools
import random

from world import Row, World
from writer import PHASES, Trap, at_work, audit

VICTIMS = ("broker", "engine", "both")
ANY = "any"  # a moment of the clock, whatever runs
WAIT_S = 25.0  # for a phase to come; then the kill happens anyway
MAX_ENGINE_DEATHS = 3  # in a row: after five within a minute a broker gives up, which is another test's matter


def points(draw: random.Random) -> collections.abc.Iterator[tuple[str, str]]:
    """Victims and phases: all of them in random order, again and again. The last moments of a turn come more often."""
    phases = (*PHASES, "last token", "done", ANY)
    while True:
        yield from draw.sample(list(itertools.product(VICTIMS, phases)), k=len(VICTIMS) * len(phases))


def kills(world: World, runs: int, draw: random.Random) -> Row:
    """`runs` kills; each is followed by an audit of the log, all by a comparison with the undisturbed daemon."""
    row, trap = Row("kill broker, engine, both"), Trap()
    hits: collections.Counter[str] = collections.Counter()
    with world.watched(row), at_work(world, row, trap, draw) as writers:
        engine_deaths = 0
        for victim, phase in itertools.islice(points(draw), runs):
            engine_deaths = engine_deaths + 1 if victim == "engine" else 0
            if engine_deaths > MAX_ENGINE_DEATHS:
                victim, engine_deaths = "both", 0
            hits[_kill(world, trap, draw, victim, phase)] += 1
            row.runs += 1
            world.revive(ready=False)
            audit(writers)
    turns = sum(len(turns) for writer in writers for turns in writer.sent.values())
    restored = sum(writer.restored for writer in writers)
    world.notes.append(f"{row.scenario}: {turns} turns, {restored} tokens restored; killed at {dict(hits)}")
    return row


def _kill(world: World, trap: Trap, draw: random.Random, victim: str, phase: str) -> str:
    """Kills at the phase; returns the phase it was."""
    delay = draw.choice((0.0, draw.uniform(0.0, 0.004), draw.uniform(0.0, 0.03)))
    trap.set(phase, lambda: world.kill(victim), skip=0 if phase == "restore" else draw.randrange(5), delay=delay)
    if trap.sprung.wait(draw.uniform(0.0, 9.0) if phase == ANY else WAIT_S):
        return phase
    trap.force()
    return ANY
