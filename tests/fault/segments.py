"""Segment files that are cut at any length, missing, or under each other's names."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

import harms
import vault
from world import Row, World

PAGES = range(30)
KINDS = ("cut", "cut while open", "missing", "swapped", "all cut")


def segments(world: World, runs: int, draw: random.Random) -> Row:
    """Each run: a fresh copy of a directory of four segments, one kind of harm."""
    row = Row("segments cut, missing, swapped")
    with tempfile.TemporaryDirectory(prefix="atlas-") as root:
        base, copy = Path(root, "base"), Path(root, "copy")
        vault.in_child(vault.build, base, PAGES)
        for number in range(runs):
            kind = KINDS[number % len(KINDS)]
            shutil.copytree(base, copy)
            changes, touched = harmed(copy, kind, draw)
            running = kind == "cut while open"
            if not running:
                harms.apply(copy, changes)
            report = vault.audit(copy, PAGES, changes if running else [])
            vault.judge(world, row, f"{kind}: {changes}", report, there=set(PAGES) - touched, maybe=touched)
            row.runs += 1
            shutil.rmtree(copy)
    return row


def harmed(directory: Path, kind: str, draw: random.Random) -> tuple[list[harms.Change], set[int]]:
    """What is done, and the pages that it may cost."""
    files = draw.sample(harms.segment_files(directory), k=2)
    match kind:
        case "missing":
            return [harms.Remove(files[0])], _touched(directory, {files[0]: 0})
        case "swapped":
            return [harms.Swap(*files)], _touched(directory, dict.fromkeys(files, 0))
        case "all cut":
            lengths = {file: _length(directory, file, draw) for file in harms.segment_files(directory)}
        case _:
            lengths = {files[0]: _length(directory, files[0], draw)}
    return [harms.Cut(file, length) for file, length in lengths.items()], _touched(directory, lengths)


def _length(directory: Path, file: str, draw: random.Random) -> int:
    """Nothing, inside the header, at the edges of slots and sectors, one byte beside them, anywhere."""
    whole = (directory / file).stat().st_size
    edge = harms.SECTOR + draw.randrange(8) * vault.SLOT_BYTES
    at = draw.choice((0, draw.randrange(harms.SECTOR), edge, edge + harms.SECTOR, draw.randrange(whole), whole - 1))
    return min(whole - 1, max(0, at + draw.choice((0, 0, -1, 1, 512))))


def _touched(directory: Path, lengths: dict[str, int]) -> set[int]:
    """Pages that do not lie whole in what is left; all of a file without its own header's sector."""
    numbers = {vault.page(number).key: number for number in PAGES}
    return {
        numbers[record.key]
        for record in harms.records(directory)
        if record.file in lengths
        and (
            lengths[record.file] < harms.SECTOR
            or harms.slot_offset(directory, record) + vault.SLOT_BYTES > lengths[record.file]
        )
    }
