"""LMDB maps that are full: index and session log grow and go on, or say that they can't."""

from __future__ import annotations

import random
import tempfile
import time
from array import array
from pathlib import Path

import disks
import ledger
import vault
from atlas_client import Client, ErrorReply
from atlas_client.protocol import Sampling, Timings, Usage
from talk import Talk
from world import Row, World

from atlasd.broker import archive
from atlasd.broker.log import FIRST_MAP_BYTES, Log
from atlasd.broker.sessions import SessionRecord, TurnRecord

PAGES = 1500  # their records need more than the index's first map
BIG = 1 << 20  # tokens of an imported session
SMALL_DISK = 700 << 10


def maps(world: World, runs: int, draw: random.Random) -> Row:
    """In turn: the index, a session log with room, one without, a daemon's."""
    row = Row("LMDB map full")
    kinds = (_index, _log, _log_without_room, _daemon)
    for number in range(runs):
        with tempfile.TemporaryDirectory(prefix="atlas-") as root:
            try:
                kinds[number % len(kinds)](world, row, Path(root), draw)
                row.runs += 1
            except disks.NotRun as error:
                world.notes.append(f"{row.scenario}: not run: {error}")
            except vault.ChildDied as error:
                world.note(row, "crashes", str(error))
    return row


def _index(world: World, row: Row, root: Path, draw: random.Random) -> None:
    batch = draw.choice((40, 250))
    before, after = vault.in_child(grow_index, root / "kv", batch)
    if after <= before:
        world.note(row, "undetected", f"the index did not outgrow its map of {before} bytes: this shows nothing")
    report = vault.audit(root / "kv", range(PAGES), pages=PAGES + 100)
    vault.judge(world, row, "index grown", report, there=set(range(PAGES)), maybe=set())


def grow_index(path: Path, batch: int) -> tuple[int, int]:
    """Stores pages until the index has outgrown its map. Returns the map's size before and after."""
    with vault.tier(path, PAGES + 100) as opened:
        sizes = [int(opened._file._env.info()["map_size"])]
        for first in range(0, PAGES, batch):
            vault.store(opened, list(range(first, min(PAGES, first + batch))))
        opened.check()
        return sizes[0], int(opened._file._env.info()["map_size"])


def _log(world: World, row: Row, root: Path, draw: random.Random) -> None:
    count, grown = vault.in_child(grow_log, root / "log", None)
    if not grown or count < ledger.TURNS:
        world.note(row, "undetected", f"{count} turns were stored, map grown: {grown}")
    _judge_log(world, row, root / "log", count, "session log grown")


def _log_without_room(world: World, row: Row, root: Path, draw: random.Random) -> None:
    with disks.tmpfs(root, SMALL_DISK) as path:
        count, grown = vault.in_child(grow_log, path / "log", "DISK_FULL")
        if not grown or count >= ledger.TURNS:
            world.note(row, "undetected", f"{count} turns were stored on a disk too small for them, map grown: {grown}")
        _judge_log(world, row, path / "log", count, "session log that can't grow")


def _judge_log(world: World, row: Row, path: Path, count: int, what: str) -> None:
    numbers, wrong = vault.in_child(read_log, path)
    ledger.judge(world, row, what, list(range(count)), numbers, wrong)
    if count in numbers:
        world.note(row, "undetected", f"{what}: turn {count} was refused and is there")


SIZE = 12_000  # tokens of a turn at most


def grow_log(path: Path, ends: str | None) -> tuple[int, bool]:
    """Stores turns until they are all there, or one is refused with the code `ends`. Returns how many, and whether
    the map has grown."""
    log = Log(path, map_bytes=2**18)
    try:
        for number in range(ledger.TURNS):
            try:
                ledger.add(log, number, SIZE)
            except ErrorReply as error:
                if error.code.value != ends:
                    raise
                return number, log.map_bytes > 2**18
        return ledger.TURNS, log.map_bytes > 2**18
    finally:
        log.close()


def read_log(path: Path) -> tuple[list[int], list[str]]:
    """What the log holds when it is opened again."""
    log = Log(path, map_bytes=2**18)
    try:
        return ledger.found(log, SIZE)
    finally:
        log.close()


def _daemon(world: World, row: Row, root: Path, draw: random.Random) -> None:
    """Imported sessions fill the first map of a daemon's log; its turns go on, also after a restart."""
    world.start()
    talk = Talk(world, row, world.daemon, draw)
    with world.watched(row):
        talk.settle()
        ids = array("I", draw.choices(range(4000), k=BIG)).tobytes()
        turn = TurnRecord(
            rid="big", digest=b"d", start=0, prompt_ids=ids, generated_ids=b"", finish_reason="length",
            created=time.time(), prompt_text="", text="", sampling=Sampling(), usage=Usage(), timings=Timings(),
        )  # fmt: skip
        record = SessionRecord(id="0" * 16, owner="1", name="a", created=1.0, updated=1.0, tokens=BIG, turns=1)
        names = [f"big-{draw.randrange(10**9)}" for _ in range(FIRST_MAP_BYTES // len(ids) + 2)]
        with Client(world.daemon.socket) as client:
            for name in names:
                client.import_session(name, archive.pack(record, [turn]))
        talk.settle()
        if "session log grown" not in world.daemon.log.read_text(errors="replace"):
            world.note(row, "undetected", "the session log did not outgrow its map: this shows nothing")
        world.daemon.kill()
        world.revive(ready=True)
        talk.settle()
        talk.audit()
        with Client(world.daemon.socket) as client:
            for name in names:
                if array("I", client.session(name).token_ids()).tobytes() != ids:
                    world.note(row, "lost_turns", f"session {name} is not what was imported")
                client.session(name).delete()
    with Client(world.reference.socket) as reference:
        talk.judge(reference)
