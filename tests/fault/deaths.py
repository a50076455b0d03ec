"""SIGKILL of a writing process at every step of tiers/FORMAT.md's table, and at random moments; then another opens."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import dying
import vault
from points import available
from world import Row, World

RANDOM_SHARE = 3  # every third death comes at a moment of the clock
FRESH = 25  # deaths in one directory
CALLS = ("pwrite64,pwritev,pwritev2,writev", "fdatasync", "fsync,fallocate,ftruncate", "rename,unlink,unlinkat")
LIFE_S = 20.0  # of a writer that does not reach its point
KEPT = 4  # under a tight cap the latest pages must be there


@dataclasses.dataclass
class Promise:
    """What a directory's writers said of its pages before they died."""

    there: set[int] = dataclasses.field(default_factory=set)
    maybe: set[int] = dataclasses.field(default_factory=set)  # being stored or removed, or evicted
    dropped: set[int] = dataclasses.field(default_factory=set)
    erased: set[int] = dataclasses.field(default_factory=set)
    last: list[int] = dataclasses.field(default_factory=list)

    @property
    def all(self) -> set[int]:
        return self.there | self.maybe | self.dropped | self.erased

    def take(self, line: str) -> None:
        """One line of a writer."""
        verb, *words = line.split()
        numbers = set(map(int, words))
        for each in (self.there, self.maybe, self.dropped, self.erased):
            each -= numbers
        where = {"put": self.there, "maybe": self.maybe, "drop": self.dropped, "erase": self.erased}
        if verb in where:
            where[verb] |= numbers
        self.last = [n for n in self.last if n not in numbers] + (sorted(numbers) if verb == "put" else [])

    def begin(self, held: set[int]) -> None:
        """Another writer comes to a directory that holds these."""
        self.there, self.maybe, self.dropped, self.erased, self.last = set(held), set(), set(), set(), []

    def loosen(self) -> None:
        """Pages may have been evicted, all but the latest."""
        kept = self.there & set(self.last[-KEPT:])
        self.maybe |= self.there - kept
        self.there = kept


def deaths(world: World, runs: int, draw: random.Random) -> Row:
    """Deaths at the named points in turn, and at random moments between."""
    row = Row("kill at every write step")
    hits: dict[str, int] = dict.fromkeys(dying.POINTS, 0)
    names = itertools.cycle(draw.sample(list(dying.POINTS), k=len(dying.POINTS)))
    with tempfile.TemporaryDirectory(prefix="atlas-") as root:
        for number in range(runs):
            if number % FRESH == 0:
                path, promise = Path(root, str(number)), Promise()
            name = "" if number % RANDOM_SHARE == RANDOM_SHARE - 1 else next(names)
            died = die(path, promise, draw, name)
            if name and died:
                hits[name] += 1
            elif name:
                world.note(row, "undetected", f"the point {name!r} is never reached: is it still in the code?")
            _audit(world, row, path, promise, name or "random moment")
            row.runs += 1
            if number % FRESH == FRESH - 1:
                shutil.rmtree(path)
    world.notes.append(f"{row.scenario}: died at {hits}, else at random moments")
    return row


def die(path: Path, promise: Promise, draw: random.Random, name: str, life_s: float = LIFE_S) -> bool:
    """One writer's life, to the point of that name or, without one, to a random moment. True: it was killed there."""
    point = dying.POINTS.get(name)
    first = max(promise.all, default=-1) + 1
    count = draw.randrange(1, 12) if point and point.work in ("mixed", "tight") else 1
    if point and point.within in ("DiskTier._erase", "DiskTier._remove", "create_segment"):
        count = draw.randrange(1, 4)
    moment = None if point else draw.uniform(0.0, 0.15)
    told, exitcode = _live(path, (first, draw.randrange(10**9), name, count), moment, life_s)
    for line in told:
        promise.take(line)
    work = point.work if point else "tight"
    if work in ("tight", "shrink"):
        promise.loosen()
    if work == "rebuild":  # what was dropped may come back
        promise.maybe |= promise.dropped
        promise.dropped = set()
    return exitcode == -9


def _live(
    path: Path, arguments: tuple[int, int, str, int], moment: float | None, life_s: float
) -> tuple[list[str], int | None]:
    reader, writer = os.pipe()
    process = vault.CONTEXT.Process(target=dying.work, args=(path, writer, *arguments))
    process.start()
    os.close(writer)
    with os.fdopen(reader) as lines:
        told = [lines.readline()]
        if moment is not None:
            time.sleep(moment)  # the moment of the kill, not a wait for something
            process.kill()
        end = threading.Timer(life_s, process.terminate)
        end.start()
        told += lines
        end.cancel()
    process.join()
    return told, process.exitcode


def _audit(world: World, row: Row, path: Path, promise: Promise, what: str) -> None:
    if promise.erased and (left := readable(path, promise.erased)):
        world.note(row, "undetected", f"{what}: erased pages {left} can be read in the files")
    report = vault.audit(path, promise.all)
    vault.judge(world, row, what, report, there=promise.there, maybe=promise.maybe, silent=True)
    missing = promise.maybe - report.found  # a page whose erasing was interrupted counts as damaged
    if not missing and any("rebuilt" not in said for said in report.said):
        world.note(row, "undetected", f"{what}: a death alone damaged something: {report.said}")
    promise.begin(report.held)


def readable(path: Path, numbers: set[int]) -> list[int]:
    """Those pages whose bytes lie in some segment, whatever the index says."""
    data = b"".join(file.read_bytes() for file in sorted(path.glob("seg-*.kv")))
    return [number for number in sorted(numbers) if bytes(vault.payload(number)[:64]) in data]


# --- at system calls ------------------------------------------------------------------------------------------------


def calls(world: World, runs: int, draw: random.Random) -> Row:
    """SIGKILL on entering the n-th system call of a kind, LMDB's own among them."""
    row = Row("kill at system calls of the store")
    if not available():
        world.notes.append(f"{row.scenario}: not run: strace is not there, or may not attach")
        return row
    hits: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="atlas-") as root:
        for number, kind in zip(range(runs), _kinds(draw), strict=False):
            if number % FRESH == 0:
                path, promise = Path(root, str(number)), Promise()
            died = _traced(path, promise, draw, kind)
            hits[kind if died else "ended first"] = hits.get(kind if died else "ended first", 0) + 1
            _audit(world, row, path, promise, f"on entering {kind}")
            row.runs += 1
    world.notes.append(f"{row.scenario}: died at {hits}")
    return row


def _kinds(draw: random.Random) -> Iterator[str]:
    while True:
        yield from draw.sample(CALLS, k=len(CALLS))


def _traced(path: Path, promise: Promise, draw: random.Random, kind: str) -> bool:
    reader, writer = os.pipe()
    go_reader, go = os.pipe()
    arguments = (path, writer, max(promise.all, default=-1) + 1, draw.randrange(10**9), go_reader)
    process = vault.CONTEXT.Process(target=wait_and_work, args=arguments)
    process.start()
    for descriptor in (writer, go_reader):
        os.close(descriptor)
    inject = ["-e", f"trace={kind}", "-e", f"inject={kind}:signal=SIGKILL:when={draw.randrange(1, 40)}"]
    command = ["strace", "-f", "-o", "/dev/null", *inject, "-p", str(process.pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as tracer, os.fdopen(reader) as lines:
        assert tracer.stderr is not None
        tracer.stderr.readline()  # "attached"
        os.write(go, b"g")
        os.close(go)
        end = threading.Timer(LIFE_S, process.kill)
        end.start()
        for line in lines:
            promise.take(line)
        end.cancel()
        tracer.kill()
    process.join()
    promise.loosen()
    return process.exitcode == -9


def wait_and_work(path: Path, say: int, first: int, seed: int, go: int) -> None:
    """Works once the tracer is there; ends by itself after a while."""
    os.read(go, 1)
    draw = random.Random(seed)
    tell = dying.teller(say)
    with vault.tier(path, draw.choice((dying.TIGHT, vault.ROOMY))) as opened:
        for _ in range(30):
            first = dying.step(opened, draw, first, tell)
