"""A short `make fault`: files are damaged, processes killed, disks full; no acknowledged turn is lost, no token wrong.

And the judges themselves are tested: each sees what it is there to see.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "fault"))

import cuts
import deaths
import dying
import harmed
import harms
import ioerrors
import ledger
import neighbours
import swaps
import vault
from atlas_client import Client
from scenarios import SCENARIOS
from talk import Talk
from world import Row, World, world
from writer import Trap, Writer

from atlasd.broker.log import Log


@pytest.fixture(scope="module")
def hurt() -> Iterator[World]:
    with world() as made:
        yield made


@pytest.fixture
def row() -> Row:
    return Row("damaged by the test")


SHORT = {
    "flips": 60, "segments": 10, "planted": 10, "deaths": 42, "calls": 4, "cuts": 6, "maps": 3, "full": 8,
    "ioerrors": 2, "kills": 3, "clients": 1, "points": 1, "harmed": 2, "neighbours": 3,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "runs"), SHORT.items())
def test_nothing_acknowledged_is_lost_and_no_token_is_wrong(hurt: World, name: str, runs: int) -> None:
    problems, notes = len(hurt.problems), len(hurt.notes)
    found = SCENARIOS[name].run(hurt, runs, random.Random())
    assert found.good, "\n".join(hurt.problems[problems:])
    if found.runs < runs:
        reasons = [note for note in hurt.notes[notes:] if "not run" in note]
        assert reasons, f"{found.runs} of {runs} runs"
        pytest.skip("; ".join(reasons))


def test_the_judges_see_a_lost_turn_and_a_wrong_token(hurt: World, row: Row) -> None:
    hurt.start()
    session = "judged"
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


def test_the_judges_of_a_single_session_see_the_same(hurt: World, row: Row) -> None:
    hurt.start()
    talk = Talk(hurt, row, hurt.daemon, random.Random())
    talk.settle()
    second = talk.settle()
    talk.audit()
    assert row.good, hurt.problems
    swaps.judge_pages(hurt, row, "same weights", second)
    assert (row.wrong_tokens, row.undetected) == (1, 1), "pages that were used after a swap"
    neighbours.judge_refusal(hurt, row, "state directory", 0, "")
    assert row.undetected == 2, "a second daemon that runs"
    known = talk.turns.pop()
    talk.audit()
    assert row.undetected == 3, "a turn that is there and was not acknowledged"
    talk.turns.append(known)
    with Client(hurt.daemon.socket) as client:
        client.session(talk.session).truncate(turns=1)
    talk.audit()
    assert row.lost_turns == 1
    status = hurt.status()
    assert status is not None
    status.warnings, status.counters = [*status.warnings], dict(status.counters)
    assert not ioerrors.says_so(hurt, status, talk, hurt.daemon.log.stat().st_size, limit=0.2)
    hurt.daemon.kill()
    hurt.revive(ready=True)
    assert not harmed.says_why(hurt, limit=0.2), "nothing was harmed"


def test_the_judge_of_pages_sees_wrong_lost_silent_and_risen_ones(tmp_path: Path, hurt: World, row: Row) -> None:
    path, numbers = tmp_path / "kv", set(range(6))
    vault.build(path, numbers, dropped=[5])
    victim = next(record for record in harms.records(path) if record.key == vault.page(2).key)
    assert vault.audit(path, numbers - {5}).wrong == set()
    harms.apply(path, harms.forged(path, victim, vault.LAYOUT.group_bytes[0] // 2))
    report = vault.audit(path, numbers - {5})
    assert report.wrong == {2}
    vault.judge(hurt, row, "forged", report, there=numbers - {5}, maybe=set())
    assert (row.wrong_tokens, row.lost_turns, row.undetected) == (1, 0, 0)
    vault.judge(hurt, row, "lost", report, there={0, 1, 2, 3, 4, 5}, maybe=set())
    assert row.lost_turns == 1
    vault.judge(hurt, row, "silent", report, there=numbers - {5}, maybe={5})
    vault.judge(hurt, row, "risen", report, there={0, 1, 2, 3}, maybe=set())
    assert row.undetected == 2
    vault.judge(hurt, row, "crash", vault.audit(tmp_path / "file" / "kv", numbers), there=set(), maybe=set())
    (tmp_path / "plain").touch()
    vault.judge(hurt, row, "crash", vault.audit(tmp_path / "plain", numbers), there=set(), maybe=set())
    assert row.crashes == 1, "a directory that can't be opened"


def test_the_judge_of_deaths_sees_bytes_that_should_be_gone(tmp_path: Path) -> None:
    vault.build(tmp_path / "kv", range(4), dropped=[1], erased=[2])
    assert deaths.readable(tmp_path / "kv", {0, 1, 2}) == [0, 1]
    promise = deaths.Promise()
    for line in ("maybe 1 2", "put 1 2", "maybe 3", "put 3", "maybe 2", "erase 2", "maybe 4"):
        promise.take(line)
    assert (promise.there, promise.maybe, promise.erased) == ({1, 3}, {4}, {2})


def test_a_death_comes_at_its_point_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    promise = deaths.Promise()
    assert deaths.die(tmp_path / "kv", promise, random.Random(1), "between fdatasync and commit")
    assert promise.all
    monkeypatch.setitem(dying.POINTS, "nowhere", dying.Point("call", "no_such_function"))
    assert not deaths.die(tmp_path / "kv", promise, random.Random(1), "nowhere", life_s=0.5)


def test_the_judge_of_session_logs_sees_lost_and_damaged_turns(tmp_path: Path, hurt: World, row: Row) -> None:
    log = Log(tmp_path / "log")
    for number in range(7):
        ledger.add(log, number)
    numbers, wrong = ledger.found(log)
    assert (sorted(numbers), wrong) == (list(range(7)), [])
    assert len(ledger.found(log, size=100)[1]) > 0, "turns with other tokens"
    log.close()
    ledger.judge(hurt, row, "right", range(7), numbers, [])
    assert row.good
    ledger.judge(hurt, row, "lost", range(8), numbers, [])
    assert row.lost_turns == 1
    ledger.judge(hurt, row, "more than was sent", range(4), numbers, ["turn 3"])
    assert (row.undetected, row.wrong_tokens) == (1, 1)


def test_a_cut_keeps_what_was_flushed_and_loses_of_the_rest(tmp_path: Path) -> None:
    """A journal of four writes, a flush after two: the first two are always there, the others not always."""
    journal, size = tmp_path / "journal", 8192
    with journal.open("wb") as file:
        for number in range(5):
            kind, length = (b"B", 0) if number == 2 else (b"W", size)
            file.write(cuts.NOTE.pack(kind, number * size, length) + bytes([number + 1]) * length)
    notes = list(cuts.read(journal))
    assert [note.kind for note in notes] == [b"W", b"W", b"B", b"W", b"W"]
    kept = set()
    for seed in range(40):
        target = tmp_path / "disk"
        target.write_bytes(bytes(5 * size))
        cuts.replay(target, journal, notes, random.Random(seed))
        data = target.read_bytes()
        assert data[: 2 * size] == b"\1" * size + b"\2" * size
        kept.add(tuple(data[at : at + size].count(bytes([at // size + 1])) for at in (3 * size, 4 * size)))
    assert {(0, 0), (size, size)} < kept
    assert any(0 < part < size for pair in kept for part in pair), "no write was torn"
