"""Every byte class of segment headers, slots and the index: a bit, a byte or a sector of it is changed."""

from __future__ import annotations

import itertools
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import harms
import vault
from world import Row, World

PAGES = range(20)
DROPPED, ERASED = {3, 11}, {5}
CLASSES = [
    *(("segment", name) for name in harms.SEGMENT_FIELDS),
    *(
        ("slot", name)
        for name in (*harms.SLOT_FIELDS, "first payload byte", "payload", "last payload byte", "after the payload")
    ),
    *(("index", name) for name in harms.INDEX_CLASSES * 3),  # the largest by far
]


def flips(world: World, runs: int, draw: random.Random) -> Row:
    """Each run: a fresh copy of a directory, one place changed, closed or (slots) under the open tier."""
    row = Row("bytes changed")
    lost: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="atlas-") as root:
        base, copy = Path(root, "base"), Path(root, "copy")
        vault.in_child(vault.build, base, PAGES, DROPPED, ERASED)
        for number, ((where, name), way) in enumerate(itertools.islice(_kinds(draw), runs)):
            shutil.copytree(base, copy)
            change, touched = spoiled(copy, where, name, way, draw)
            running = where == "slot" and number % 2 == 1
            if not running:
                change.apply(copy)
            report = vault.audit(copy, PAGES, [change] if running else [])
            there, maybe = set(PAGES) - DROPPED - ERASED - touched, set(touched)
            if where == "index":  # a rebuilt index finds removed pages, erased ones never
                maybe |= DROPPED & report.found if report.said else set()
            what = f"{where}: {way} of {name} at {change.file}:{change.offset}"
            vault.judge(world, row, what, report, there=there, maybe=maybe)
            kind = f"{where} {name}"
            lost[kind] = lost.get(kind, 0) + len((set(PAGES) - DROPPED - ERASED) - report.found)
            row.runs += 1
            shutil.rmtree(copy)
    world.notes.append(f"{row.scenario}: pages dropped by class {lost}")
    return row


def _kinds(draw: random.Random) -> Iterator[tuple[tuple[str, str], str]]:
    while True:
        every = list(itertools.product(CLASSES, harms.WAYS))
        yield from draw.sample(every, k=len(every))


def spoiled(directory: Path, where: str, name: str, way: str, draw: random.Random) -> tuple[harms.Write, set[int]]:
    """The change, and the pages that it may cost."""
    numbers = {vault.page(number).key: number for number in PAGES}
    every = harms.records(directory)
    if where == "index":
        change = harms.spoil(directory, harms.INDEX, harms.index_place(directory, name, draw), way, draw)
        return change, {numbers[record.key] for record in every}
    victim = draw.choice(every)
    if where == "segment":
        first, end = harms.SEGMENT_FIELDS[name]
        change = harms.spoil(directory, victim.file, draw.randrange(first, end), way, draw)
        return change, {numbers[record.key] for record in every if record.segment == victim.segment}
    places = harms.slot_places(directory, victim)
    first, end = places.get(name, places["zeros"])
    return harms.spoil(directory, victim.file, draw.randrange(first, end), way, draw), {numbers[victim.key]}
