"""Power cuts on a real file system: a disk's writes are recorded, and the disk made as a cut at any point leaves it.

What was flushed is there; of what was written since, each write is there, missing, or there in part. An
acknowledgement is noted with the journal's length at that moment: cuts at or after it must find what it promised.
"""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import disks
import dying
import ledger
import vault
from deaths import Promise
from world import Row, World

NOTE = struct.Struct("<cQQ")  # as recorder.py writes it
DISK = 48 * disks.MIB
STEPS = 60  # of the workload, or turns
SINCE = 0.5  # share of the unflushed writes that reach the disk
TORN = 0.3  # share of those that reach it in part
SECTOR = 512


@dataclasses.dataclass(frozen=True)
class Note:
    """One entry of the journal: [at, at + length) holds the bytes, `start` is where the entry begins."""

    kind: bytes
    offset: int
    length: int
    at: int
    start: int


Said = list[tuple[int, str]]  # the journal's length when it was said, and what


def cuts(world: World, runs: int, draw: random.Random) -> Row:
    """Half of the cuts in a KV directory's life, half in a session log's."""
    row = Row("power cuts")
    try:
        for work, check, share in (
            (write_pages, _check_pages, runs - runs // 2),
            (ledger.write, _check_log, runs // 2),
        ):
            with tempfile.TemporaryDirectory(prefix="atlas-") as root:
                _recorded(world, row, Path(root), work, check, share, draw)
    except disks.NotRun as error:
        world.notes.append(f"{row.scenario}: not run: {error}")
    return row


Check = Callable[[World, Row, Path, Said, str], None]


def _recorded(
    world: World, row: Row, root: Path, work: Callable[..., None], check: Check, count: int, draw: random.Random
) -> None:
    image, base, journal = disks.make_image(root / "disk", DISK), root / "base", root / "journal"
    shutil.copy(image, base)
    journal.touch()
    places = {"IMAGE": str(image), "JOURNAL": str(journal)}
    with disks.over_nbd(root, "python", disks.RECORDER, environment=places) as path:
        began = journal.stat().st_size
        vault.in_child(work, path / "d", journal, root / "said", draw.randrange(10**9), limit=240)
        ended = journal.stat().st_size
    said = [(int(at), text) for at, text in (line.split(" ", 1) for line in (root / "said").read_text().splitlines())]
    notes = list(read(journal))
    inside = [number for number, note in enumerate(notes) if began <= note.start <= ended]
    for _ in range(count):
        number, seed = draw.choice(inside), draw.randrange(10**9)
        shutil.copy(base, root / "cut")
        replay(root / "cut", journal, notes[:number], random.Random(seed))
        known = [(at, text) for at, text in said if at <= notes[number].start]
        with disks.mounted(root / "again", "-o", "loop", root / "cut") as path:
            check(world, row, path / "d", known, f"cut before entry {number} of {len(notes)}")
        row.runs += 1
    kinds = {kind.decode(): sum(note.kind == kind for note in notes) for kind in (b"W", b"F", b"B")}
    world.notes.append(
        f"{row.scenario}: {work.__module__}.{work.__name__}: {count} cuts, recorded {kinds}, said {len(said)}"
    )


def read(journal: Path) -> Iterator[Note]:
    """The journal's entries; their bytes stay in the file."""
    with journal.open("rb") as file:
        while len(head := file.read(NOTE.size)) == NOTE.size:
            kind, offset, length = NOTE.unpack(head)
            yield Note(kind, offset, length, file.tell(), file.tell() - NOTE.size)
            file.seek(length, os.SEEK_CUR)


def replay(target: Path, journal: Path, notes: list[Note], draw: random.Random) -> None:
    """Makes of `target`, the disk as it was at first, the disk after a cut behind these entries."""
    flushed = max((number for number, note in enumerate(notes) if note.kind == b"B"), default=-1)
    with target.open("r+b") as disk, journal.open("rb") as bytes_:
        for number, note in enumerate(notes):
            if number > flushed and note.kind == b"W" and draw.random() > SINCE:
                continue
            length = note.length
            if number > flushed and note.kind == b"W" and draw.random() < TORN:
                length = draw.randrange(length // SECTOR + 1) * SECTOR
            disk.seek(note.offset)
            bytes_.seek(note.at)
            disk.write(bytes_.read(length))


# --- a KV directory ---------------------------------------------------------------------------------------------


def write_pages(path: Path, journal: Path, said: Path, seed: int) -> None:
    """Stores, drops and erases pages, noting each promise."""
    draw, first = random.Random(seed), 0
    with said.open("w", buffering=1) as notes, vault.tier(path) as opened:

        def tell(verb: str, numbers: list[int]) -> None:
            notes.write(f"{journal.stat().st_size} {verb} {' '.join(map(str, numbers))}\n")

        for _ in range(STEPS):
            first = dying.step(opened, draw, first, tell)


def _check_pages(world: World, row: Row, path: Path, said: Said, what: str) -> None:
    promise = Promise()
    for _, text in said:
        promise.take(text)
    if not path.exists():
        if promise.there:
            world.note(row, "lost_turns", f"{what}: the KV directory is gone")
        return
    report = vault.audit(path, promise.all)
    vault.judge(world, row, what, report, there=promise.there, maybe=promise.maybe, silent=True)


# --- a session log ----------------------------------------------------------------------------------------------


def _check_log(world: World, row: Row, path: Path, said: Said, what: str) -> None:
    acknowledged: list[Any] = [text for _, text in said]
    try:
        found = vault.in_child(ledger.check, path) if path.exists() else ([], [])
    except vault.ChildDied as error:
        world.note(row, "crashes", f"{what}: {error}")
        return
    ledger.judge(world, row, what, acknowledged, *found)
