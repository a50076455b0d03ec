"""A short `make fault`: real daemons on the bundled model are killed; no acknowledged turn is lost, no token wrong."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "fault"))

from atlas_client import Client
from scenarios import SCENARIOS
from world import Row, World, world
from writer import Trap, Writer


@pytest.fixture(scope="module")
def hurt() -> Iterator[World]:
    with world() as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize(("name", "runs"), [("kills", 3), ("clients", 1), ("points", 1)])
def test_nothing_acknowledged_is_lost_and_no_token_is_wrong(hurt: World, name: str, runs: int) -> None:
    before = len(hurt.problems)
    row = SCENARIOS[name].run(hurt, runs, random.Random())
    assert row.good, "\n".join(hurt.problems[before:])
    assert row.runs == runs or any("not run" in note for note in hurt.notes)


def test_the_judges_see_a_lost_turn_and_a_wrong_token(hurt: World) -> None:
    hurt.start()
    row, session = Row("damaged by the test"), "judged"
    writer = Writer(hurt, row, Trap(), session, seed=1)
    with Client(hurt.daemon.socket) as client, Client(hurt.reference.socket) as reference:
        for _ in range(2):
            writer.send_one()
        writer.audit(client)
        writer.judge(reference)
        assert row.good, hurt.problems
        client.session(f"{session}-0").truncate(turns=1)
        writer.audit(client)
        assert row.lost_turns == 1
        first = writer.sent[f"{session}-0"][0]
        assert first.tokens is not None
        first.tokens[-1] ^= 1
        writer.judge(reference)
        assert row.wrong_tokens > 0
