"""Small real file systems that fill up under the disk tier and under a daemon, and are given room again."""

from __future__ import annotations

import itertools
import random
import tempfile
from pathlib import Path

import disks
import vault
from atlas_client import Client, ErrorReply
from conftest import Daemon
from talk import Talk
from world import HURT, Row, World

KINDS = {"tmpfs": disks.tmpfs, "ext4": disks.ext4}
STORE_DISK = 4 * disks.MIB
DAEMON_DISK = {"tmpfs": 24 * disks.MIB, "ext4": 1400 * disks.MIB}  # pages are kept only where a GiB is free beside them
DAEMON_SHARE = 8  # every eighth run is a daemon's
FORKS = 3000


def full(world: World, runs: int, draw: random.Random) -> Row:
    """Each run: the room is taken, used up to the end, and given back."""
    row = Row("disk full")
    for kind, make in KINDS.items():
        try:
            with tempfile.TemporaryDirectory(prefix="atlas-") as root:
                served = runs // 2 // DAEMON_SHARE
                with make(Path(root), STORE_DISK) as path:
                    for _ in range(runs // 2 - served):
                        _fill_store(world, row, path, kind, draw)
                if not served:
                    continue
                with make(Path(root), DAEMON_DISK[kind]) as path:
                    _fill_daemon(world, row, path, kind, served, draw)
        except disks.NotRun as error:
            world.notes.append(f"{row.scenario}: {kind} not run: {error}")
    return row


# --- the disk tier ----------------------------------------------------------------------------------------------


def _fill_store(world: World, row: Row, path: Path, kind: str, draw: random.Random) -> None:
    try:
        stored, problems = vault.in_child(use_up, path, draw.randrange(10**9))
    except vault.ChildDied as error:
        world.note(row, "crashes", f"{kind}: {error}")
        return
    for problem in problems:
        world.note(row, "undetected", f"{kind}: {problem}")
    report = vault.audit(path / "kv", stored)
    vault.judge(world, row, f"{kind}, opened again", report, there=set(stored), maybe=set())
    row.runs += 1


def use_up(path: Path, seed: int) -> tuple[list[int], list[str]]:
    """Stores pages while room comes and goes. Returns the latest pages that must be there, and what was wrong."""
    draw, ballast, problems = random.Random(seed), disks.Ballast(path), []
    first = draw.randrange(10**6)
    latest: list[int] = []
    with vault.tier(path / "kv") as opened:
        for _ in range(6):
            ballast.leave(draw.choice((0, 4096, 100_000, draw.randrange(STORE_DISK // 2))))
            for _ in range(draw.randrange(1, 30)):
                numbers = list(range(first, first + draw.randrange(1, 8)))
                first += len(numbers)
                latest = vault.store(opened, numbers) or latest
                if len(latest) < len(numbers) and not (opened.last_error or opened._counters.warnings()):
                    problems.append("a write was dropped and nobody says why")
                right, wrong = vault.read(opened, latest)
                if right != set(latest) or wrong:
                    problems.append(f"stored {latest}, found {right}, wrong {wrong}")
            opened.check()
            ballast.go()
            opened._paused_until = opened._grow_after = 0.0  # as if the pause were over
            numbers = list(range(first, first + 3))
            first += 3
            latest = vault.store(opened, numbers)
            if latest != numbers:
                problems.append(f"there is room again, and {opened.last_error}")
    return latest, problems


# --- a daemon ---------------------------------------------------------------------------------------------------


def _fill_daemon(world: World, row: Row, path: Path, kind: str, cycles: int, draw: random.Random) -> None:
    world.start()
    daemon, ballast = Daemon(path / "d", *HURT), disks.Ballast(path)
    daemon.root.mkdir()
    daemon.log = world.daemon.root / f"full-{kind}.log"
    try:
        daemon.start()
        talks = [Talk(world, row, daemon, draw) for _ in range(2)]
        for _ in range(cycles):
            for talk in talks:
                talk.settle()
            ballast.leave(draw.choice((0, 100_000, 500_000)))
            _brim(daemon, talks[0].session)
            refused = [talk for talk in talks if talk.say(300, 4) is None]
            if not refused or any(talk.errors[-1].code.value != "DISK_FULL" for talk in refused):
                world.note(row, "undetected", f"{kind}: turns on a full disk: {[talk.errors[-1:] for talk in talks]}")
            _says_why(world, row, daemon, kind)
            for talk in talks:
                talk.audit()
            ballast.go()
            for talk in talks:
                talk.settle()
                talk.audit()
            row.runs += 1
        with Client(world.reference.socket) as reference:
            for talk in talks:
                talk.judge(reference)
    finally:
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.kill()


def _brim(daemon: Daemon, session: str) -> None:
    """Fills what is left for the session log with forks, then frees none of it."""
    with Client(daemon.socket) as client:
        try:
            for number in itertools.count():
                client.session(session).fork(f"{session}-{number}-{random.randrange(10**9)}")
                if number > FORKS:
                    raise RuntimeError("the disk does not get full")
        except ErrorReply as error:
            if error.code.value != "DISK_FULL":
                raise


def _says_why(world: World, row: Row, daemon: Daemon, kind: str) -> None:
    """Turns that can't be stored and pages that are not kept on disk are a matter for `status`."""
    with Client(daemon.socket) as client:
        status = client.status()
    if status.engine_state != "ready":
        world.note(row, "crashes", f"{kind}: the engine is {status.engine_state}: {status.engine_error}")
    wanted = ["session log is full", *(["free-space floor"] if kind == "tmpfs" else [])]
    if silent := [text for text in wanted if not any(text in warning for warning in status.warnings)]:
        world.note(row, "undetected", f"{kind}: status says nothing of {silent}: {status.warnings}")
