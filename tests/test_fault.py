"""A short `make fault`: real daemons on the bundled model are killed; no acknowledged turn is lost, no token wrong."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "fault"))

from scenarios import SCENARIOS
from world import World, world


@pytest.fixture(scope="module")
def hurt() -> Iterator[World]:
    with world() as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize(("name", "runs"), [("kills", 3), ("clients", 1), ("points", 1)])
def test_nothing_acknowledged_is_lost_and_no_token_is_wrong(hurt: World, name: str, runs: int) -> None:
    before = len(hurt.problems)
    row = SCENARIOS[name][0](hurt, runs, random.Random())
    assert row.good, "\n".join(hurt.problems[before:])
    assert row.runs == runs or any("not run" in note for note in hurt.notes)
