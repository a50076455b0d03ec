"""A daemon is killed, its KV directory harmed, and started again: sessions go on with the same tokens, and it says why
it computes again what it should have had."""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import harms
from atlas_client import Client
from talk import Talk
from world import Row, World, until

PROMPT = 330  # tokens: five pages and a tail
Harm = Callable[[Path, list[harms.Record], random.Random], list[harms.Change]]  # of the session's pages


def _in_slot(name: str) -> Harm:
    def harm(directory: Path, pages: list[harms.Record], draw: random.Random) -> list[harms.Change]:
        page = draw.choice(pages)
        first, end = harms.slot_places(directory, page)[name]
        return [harms.spoil(directory, page.file, draw.randrange(first, end), draw.choice(harms.WAYS), draw)]

    return harm


def _in_segment(directory: Path, pages: list[harms.Record], draw: random.Random) -> list[harms.Change]:
    first, end = harms.SEGMENT_FIELDS[draw.choice(list(harms.SEGMENT_FIELDS))]
    return [harms.spoil(directory, pages[0].file, draw.randrange(first, end), draw.choice(harms.WAYS), draw)]


def _in_index(name: str) -> Harm:
    def harm(directory: Path, pages: list[harms.Record], draw: random.Random) -> list[harms.Change]:
        return [
            harms.spoil(directory, harms.INDEX, harms.index_place(directory, name, draw), way, draw)
            for way in harms.WAYS
        ]

    return harm


def _cut(directory: Path, pages: list[harms.Record], draw: random.Random) -> list[harms.Change]:
    page = draw.choice(pages)
    return [
        harms.Cut(page.file, harms.slot_offset(directory, page) + draw.randrange(harms.slot_bytes(directory, page)))
    ]


HARMS: dict[str, Harm] = {
    **{f"slot {name}": _in_slot(name) for name in ("payload", "tokens", "key", "digests", "identity", "checksum")},
    "segment header": _in_segment,
    **{f"index {name}": _in_index(name) for name in ("meta pages", "page records", "anywhere")},
    "index missing": lambda directory, pages, draw: [harms.Remove("index")],
    "segment cut": _cut,
    "segment missing": lambda directory, pages, draw: [harms.Remove(pages[0].file)],
    "slot copied": lambda directory, pages, draw: harms.copied(directory, *draw.sample(pages, k=2)),
    "slots exchanged": lambda directory, pages, draw: harms.exchanged(directory, *draw.sample(pages, k=2)),
    "payload of another": lambda directory, pages, draw: harms.crossed(directory, *draw.sample(pages, k=2)),
    "record to another slot": lambda directory, pages, draw: harms.repointed(*draw.sample(pages, k=2)),
    "record of another page": lambda directory, pages, draw: harms.renamed(*draw.sample(pages, k=2)),
}


def harmed(world: World, runs: int, draw: random.Random) -> Row:
    """Each run: a turn, a kill, a harm, a start, the next turn. The last one is restored from a copy: an old index."""
    row = Row("daemon on a harmed directory")
    kinds = [*draw.sample(list(HARMS), k=len(HARMS)), OLD]
    recomputed: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="atlas-") as root, world.watched(row):
        for number in range(runs):
            kind = kinds[number % len(kinds)]
            recomputed[kind] = _one(world, row, kind, Path(root), draw)
            row.runs += 1
    world.check_accounts(row)
    world.notes.append(f"{row.scenario}: tokens computed again {recomputed}")
    return row


OLD = "index of an hour ago"


def _one(world: World, row: Row, kind: str, root: Path, draw: random.Random) -> int:
    directory = world.daemon.state / "kv"
    world.revive(ready=True)
    shutil.rmtree(root / "old", ignore_errors=True)
    shutil.copytree(directory / "index", root / "old" / "index")
    talk = Talk(world, row, world.daemon, draw)
    done = talk.say(PROMPT)
    if done is None or not done.kv_durable:
        world.note(row, "undetected", f"{kind}: the pages of an undisturbed turn are not durable: {talk.errors}")
        return 0
    world.daemon.kill()
    pages = harms.records(directory)[-(PROMPT // 64) :]
    harms.apply(directory, harms.older(root / "old") if kind == OLD else HARMS[kind](directory, pages, draw))
    world.revive(ready=True)
    before = len(talk.history)
    done = talk.say(20)
    missing = before - (done.usage.restored + done.usage.reused) if done else before
    by_choice = done is not None and "was faster" in done.reset_reason
    told = kind == OLD or missing <= 1 or by_choice or says_why(world)  # the last token is always computed
    if done is None or not told:
        world.note(row, "undetected", f"{kind}: {missing} of {before} tokens are computed again and nobody says why")
    talk.audit()
    with Client(world.reference.socket) as reference:
        talk.judge(reference)
    return missing


def says_why(world: World, limit: float = 5.0) -> bool:
    """Whether status does, with the engine's next beat."""

    def said() -> bool:
        status = world.status()
        return status is not None and bool(status.warnings and status.counters.get("disk_pages_damaged"))

    with contextlib.suppress(TimeoutError):
        return bool(until(said, limit, "a warning"))
    return False
