"""Whole slots, payloads and index records in the wrong place: each right in itself, none where it belongs."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

import harms
import vault
from world import Row, World

PAGES = range(24)
LATER = range(24, 40)  # stored after the index was copied
KINDS = (
    "slot copied", "slots exchanged", "payload of another", "record to another slot", "record of another page",
    "slot of another model",
    "stale slot", "index of yesterday", "slots of yesterday", "segment of yesterday",
)  # fmt: skip


def planted(world: World, runs: int, draw: random.Random) -> Row:
    """Each run: a fresh copy of a directory whose earlier state is known too, one kind of harm."""
    row = Row("pages in another's place")
    with tempfile.TemporaryDirectory(prefix="atlas-") as root:
        old, base, copy, foreign = (Path(root, name) for name in ("old", "base", "copy", "foreign"))
        vault.in_child(build_foreign, foreign)
        vault.in_child(vault.build, old, PAGES)
        shutil.copytree(old, base)
        vault.in_child(grow, base)
        for number in range(runs):
            kind = KINDS[number % len(KINDS)]
            shutil.copytree(base, copy)
            changes, touched = harmed(copy, old, foreign, kind, draw)
            running = number // len(KINDS) % 2 == 1 and all(isinstance(change, harms.Write) for change in changes)
            running = running and kind != "index of yesterday"
            if not running:
                harms.apply(copy, changes)
            report = vault.audit(copy, (*PAGES, *LATER), changes if running else [])
            there = (set(PAGES) | set(LATER)) - REMOVED - touched
            vault.judge(world, row, kind, report, there=there, maybe=touched)
            row.runs += 1
            shutil.rmtree(copy)
    return row


REMOVED = {2, 9, 10, 17}  # their slots are used again, or lie there with their old bytes


def grow(path: Path) -> None:
    """A later state of the directory: pages removed, their slots used again."""
    with vault.tier(path) as opened:
        opened.drop_all([vault.page(number).key for number in REMOVED])
        vault.store(opened, list(LATER))
        for number in (0, 1):
            opened.get(vault.page(number).key, memoryview(bytearray(vault.LAYOUT.page_bytes)))


def build_foreign(path: Path) -> None:
    """Another model's pages under our keys, which it would never give them."""
    with vault.tier(path, identity=b"j" * 32) as opened:
        opened.store([(vault.page(number), vault.fill_with(number + 10**6)) for number in set(PAGES) - REMOVED])


def harmed(
    directory: Path, old: Path, foreign: Path, kind: str, draw: random.Random
) -> tuple[list[harms.Change], set[int]]:
    """What is done, and the pages that it may cost."""
    numbers = {vault.page(number).key: number for number in (*PAGES, *LATER)}
    every = harms.records(directory)
    source, target = draw.sample(every, k=2)
    both, one = {numbers[source.key], numbers[target.key]}, {numbers[target.key]}
    reused = [record for record in every if numbers[record.key] in LATER]
    match kind:
        case "slot copied":
            return harms.copied(directory, source, target), one
        case "slots exchanged":
            return harms.exchanged(directory, source, target), both
        case "payload of another":
            return harms.crossed(directory, source, target), one
        case "record to another slot":  # the slot has one page: which of the two keeps it is not promised
            return harms.repointed(source, target), both
        case "record of another page":
            return harms.renamed(source, target), both
        case "slot of another model":  # the same key, tokens and place; other identity and payload
            theirs = draw.choice(harms.records(foreign))
            ours = next(record for record in every if record.key == theirs.key)
            at = harms.slot_offset(directory, ours)
            return [harms.Write(ours.file, at, harms.slot(foreign, theirs))], {numbers[ours.key]}
        case "stale slot":  # a page's slot as it was before: another page's, or one that was removed
            record = draw.choice([record for record in reused if record.slot_in(old)])
            at = harms.slot_offset(directory, record)
            return [harms.Write(record.file, at, harms.read(old / record.file, at, vault.SLOT_BYTES))], {
                numbers[record.key]
            }
        case "index of yesterday":  # knows nothing of the later pages, and points to slots that were used again
            return harms.older(old), set(LATER) | REMOVED
        case "segment of yesterday":
            file = draw.choice(harms.segment_files(old))
            return [harms.Write(file, 0, (old / file).read_bytes())], {numbers[r.key] for r in every if r.file == file}
    changes: list[harms.Change] = []
    for file in harms.segment_files(old):
        changes.append(harms.Write(file, harms.SECTOR, (old / file).read_bytes()[harms.SECTOR :]))
    return changes, set(LATER)
