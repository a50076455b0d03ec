"""Power cuts under a daemon: its state directory is on a recorded disk; a daemon is started on what a cut leaves."""

from __future__ import annotations

import random
import subprocess
import tempfile
from pathlib import Path

import cuts
import disks
from atlas_client import Client
from conftest import Daemon
from talk import Talk
from world import HURT, Row, World

DISK = 1400 * disks.MIB  # pages are kept only where a GiB is free beside them
TURNS = 12


def outages(world: World, runs: int, draw: random.Random) -> Row:
    """One life of a daemon; each run is a cut in it, and another life on the disk as it is then."""
    row = Row("power cuts under a daemon")
    with tempfile.TemporaryDirectory(prefix="atlas-") as root:
        try:
            _live_and_cut(world, row, Path(root), runs, draw)
        except disks.NotRun as error:
            world.notes.append(f"{row.scenario}: not run: {error}")
    return row


def _live_and_cut(world: World, row: Row, root: Path, runs: int, draw: random.Random) -> None:
    image, base, journal = disks.make_image(root / "disk", DISK), root / "base", root / "journal"
    copy(image, base)
    journal.touch()
    daemon = Daemon(root / "d", *HURT)
    daemon.root.mkdir()
    talk, acknowledged = Talk(world, row, daemon, draw), [0]
    with disks.over_nbd(
        root, "python", disks.RECORDER, environment={"IMAGE": str(image), "JOURNAL": str(journal)}
    ) as path:
        daemon.state = path / "state"
        daemon.start()
        began = journal.stat().st_size
        for _ in range(TURNS):
            talk.settle()
            acknowledged.append(journal.stat().st_size)
        daemon.kill()
    notes = list(cuts.read(journal))
    inside = [number for number, note in enumerate(notes) if note.start >= began]
    restored = []
    for _ in range(runs):
        number = draw.choice(inside)
        target = root / "cut"
        copy(base, target)
        cuts.replay(target, journal, notes[:number], random.Random(draw.randrange(10**9)))
        known = sum(at <= notes[number].start for at in acknowledged[1:])
        with disks.mounted(root / "again", "-o", "loop", target) as path:
            restored.append(_another_life(world, row, path, talk, known))
        row.runs += 1
    world.notes.append(f"{row.scenario}: tokens restored in the next life {restored}")


def _another_life(world: World, row: Row, path: Path, before: Talk, known: int) -> int:
    """At least the `known` turns are there; the conversation goes on from where it is."""
    daemon = Daemon(before.daemon.root, *HURT)
    daemon.state = path / "state"
    daemon.start()
    try:
        talk = Talk(world, row, daemon, before.draw)
        talk.session, talk.turns = before.session, before.turns[:known]
        with Client(daemon.socket) as client:
            handle = client.session(talk.session)
            if known and len(handle.show().turns) > known:  # stored, but not yet acknowledged at the cut
                talk.turns = before.turns[: len(handle.show().turns)]
        talk.audit()
        done = talk.settle()
        with Client(world.reference.socket) as reference:
            talk.judge(reference)
        return done.usage.restored
    finally:
        daemon.kill()


def copy(source: Path, target: Path) -> None:
    """With its holes."""
    subprocess.run(["cp", "--sparse=always", str(source), str(target)], check=True)
