"""Random sessions, forks, restarts and damage over small tiers, against content that follows from the tokens alone."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from atlas_tiers.base import OutOfBlocks, Ticket
from atlas_tiers.errors import PageDamaged
from atlas_tiers.sequence import Sequence
from atlas_tiers.store import TieredStore
from tiers_support import PATIENCE_S, assert_content, disk_config, some_tokens, store, until_ready, write

STEPS = 500


class World:
    """The store under test, the sessions as plain token lists, and the sequences that run now."""

    def __init__(self, path: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.path = path
        self.sessions: list[tuple[str, list[int]]] = [(owner, some_tokens(30, seed)) for owner in ("ann", "bob")]
        self.running: list[tuple[Sequence, str, list[int], int]] = []
        self.tickets: list[Ticket] = []
        self.restored = 0
        self.harmed = False
        self.tiered = self.start()

    def start(self) -> TieredStore:
        return store(self.path, blocks=14, host_pages=5, disk=disk_config(self.path, pages=20))

    def begin(self) -> None:
        """A request on a session, a fork of one in its middle, or a new one."""
        owner, base = self.rng.choice(self.sessions)
        cut = self.rng.choice([len(base), self.rng.randrange(1, len(base) + 1)])
        tokens = base[:cut] + self.rng.choices(range(9), k=self.rng.randrange(1, 90))
        if len(tokens) > 400:
            tokens = tokens[:20]
        try:
            sequence = self.tiered.open(tokens, owner, durable=self.rng.random() < 0.7)
        except OutOfBlocks:
            return
        self.running.append((sequence, owner, tokens, 0))

    def go_on(self) -> None:
        """Computes some tokens of a running sequence, or ends it."""
        place = self.rng.randrange(len(self.running))
        sequence, owner, tokens, steps = self.running[place]
        if self.rng.random() < 0.1:  # cancelled, perhaps while it is being restored
            sequence.release()
            del self.running[place]
            return
        until_ready(self.tiered, sequence)
        self.restored += sequence.restored if not steps else 0
        try:
            assert_content(self.tiered, sequence, tokens, owner)
        except PageDamaged:  # one that is away: who reads it begins again
            assert self.harmed
            sequence.release()
            del self.running[place]
            return
        if sequence.length < len(tokens):
            try:
                write(self.tiered, sequence, tokens[: sequence.length + self.rng.randrange(1, 100)], owner)
            except OutOfBlocks:
                sequence.release()
                del self.running[place]
                return
            self.running[place] = (sequence, owner, tokens, steps + 1)
            return
        self.tickets.append(sequence.persist())
        sequence.release()
        del self.running[place]
        self.sessions = [*self.sessions[-8:], (owner, tokens)]

    def restart(self) -> None:
        for sequence, *_ in self.running:
            sequence.release()
        self.running = []
        idle(self.tiered)
        self.tiered.check()
        self.tiered.close()
        assert all(ticket.done for ticket in self.tickets)
        self.tiered = self.start()

    def damage(self) -> None:
        """Overwrites a few bytes somewhere in a segment."""
        files = sorted(self.path.glob("seg-*.kv"))
        if not files:
            return
        file = self.rng.choice(files)
        self.harmed = True
        with file.open("r+b") as handle:
            handle.seek(self.rng.randrange(4096, file.stat().st_size - 8))
            handle.write(self.rng.randbytes(8))
        os.sync()


def idle(tiered: TieredStore) -> None:
    """Every read and write that was asked for is done."""
    deadline = time.monotonic() + PATIENCE_S
    while tiered.writing:
        assert time.monotonic() < deadline
        tiered.wait(0.05)
        tiered.poll()


@pytest.mark.parametrize("seed", range(4))
def test_random_sessions(tmp_path: Path, seed: int) -> None:
    world = World(tmp_path, seed)
    for _ in range(STEPS):
        roll = world.rng.random()
        if roll < 0.01:
            world.restart()
        elif roll < 0.02 and seed % 2:
            world.damage()
        elif roll < 0.03:
            owner, tokens = world.rng.choice(world.sessions)
            world.tiered.purge(tokens, owner)
        elif roll < 0.3 or not world.running:
            world.begin()
        else:
            world.go_on()
        world.tiered.poll()
    world.restart()
    world.tiered.check()
    counts = world.tiered.counters()
    world.tiered.close()
    assert world.restored > 500, counts
    assert any(ticket.durable for ticket in world.tickets)
