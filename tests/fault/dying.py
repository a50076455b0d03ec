"""A process that writes to a KV directory and dies of SIGKILL at a named point. Store, files and LMDB are real.

The interpreter's profiler sees every call and return, of Python functions and of system calls. So the code under test
holds nothing for the tests, and a point can lie between any two steps of it.
"""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import harms
import vault
from atlas_tiers.disk import DiskTier

TIGHT = 24  # pages under a tight cap


@dataclasses.dataclass(frozen=True)
class Point:
    """Where to die: an event ("call", "return", "c_call", "c_return") of a function, `within` another if one is named.
    `work` is what gets there."""

    event: str
    function: str
    within: str = ""
    work: str = "mixed"


# In the order of the table "What survives" of tiers/FORMAT.md.
POINTS = {
    "a slot half written": Point("torn", "pwritev", work="mixed"),
    "slots written, not synced": Point("c_return", "pwritev", "DiskTier._store"),
    "written, fdatasync not called": Point("c_call", "fdatasync", "DiskTier._publish"),
    "between fdatasync and commit": Point("c_return", "fdatasync", "DiskTier._publish"),
    "transaction open, records put": Point("return", "IndexFile._write", "DiskTier._publish"),
    "committed, nobody told": Point("return", "IndexFile.apply", "DiskTier._publish"),
    "removal put, not committed": Point("return", "IndexFile._write", "DiskTier._remove"),
    "removal committed, slot not free": Point("return", "IndexFile.apply", "DiskTier._remove"),
    "slot free again": Point("return", "Space.give_back"),
    "a freed slot half overwritten": Point("torn", "pwritev", work="tight"),
    "page half erased": Point("torn", "pwritev", "DiskTier._erase"),
    "page erased, not synced": Point("c_return", "pwritev", "DiskTier._erase"),
    "page erased, record there": Point("return", "DiskTier._erase"),
    "segment file named, empty": Point("c_call", "posix_fallocate", "create_segment"),
    "segment allocated, no header": Point("c_return", "posix_fallocate", "create_segment"),
    "segment header not synced": Point("c_return", "pwrite", "create_segment"),
    "segment made, no record": Point("return", "create_segment"),
    "segment recorded, not used": Point("return", "Space.make_segment"),
    "segment's record gone, file there": Point("call", "Space.remove", work="shrink"),
    "segment's file gone": Point("return", "Space.remove", work="shrink"),
    "rebuild: slots scanned": Point("return", "_scan", work="rebuild"),
    "rebuild: new index written": Point("return", "IndexFile.apply", "_rebuild", work="rebuild"),
    "rebuild: old index gone": Point("call", "Path.rename", "_rebuild", work="rebuild"),
    "rebuild: new index named": Point("return", "Path.rename", "_rebuild", work="rebuild"),
    "opening: before strays go": Point("call", "_remove_strays", work="stray"),
    "opening: strays gone": Point("return", "_remove_strays", work="stray"),
    "closing: stamps committed": Point("call", "IndexFile.close", "DiskTier.close", work="close"),
}


class Executioner:
    """Kills this process at the `count`-th time a point is reached, in whatever thread."""

    def __init__(self, point: Point, count: int) -> None:
        self.point = point
        self._left = count
        if point.event == "torn":
            self._tear()
        else:
            threading.setprofile(self._event)
            sys.setprofile(self._event)

    def _event(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != self.point.event:
            return
        if event.startswith("c_"):
            name = getattr(argument, "__name__", "")
            inside: FrameType | None = frame
        else:
            name, inside = frame.f_code.co_qualname, frame.f_back
        if name == self.point.function and self._within(inside):
            self._strike()

    def _within(self, frame: FrameType | None) -> bool:
        while frame is not None and self.point.within:
            if frame.f_code.co_qualname == self.point.within:
                return True
            frame = frame.f_back
        return not self.point.within

    def _strike(self) -> None:
        self._left -= 1
        if self._left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def _tear(self) -> None:
        """The system call writes a part of what it was given; then the process is dead. In this process only."""
        whole = os.pwritev

        def torn(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            if self._within(sys._getframe(1)):
                if self._left == 1:
                    data = buffers[0]
                    os.pwrite(descriptor, data[: len(data) // 1024 * 512], offset)
                self._strike()
            return whole(descriptor, buffers, offset)

        os.pwritev = torn  # type: ignore[assignment]


Tell = Callable[[str, list[int]], None]


def teller(say: int) -> Tell:
    """Writes lines to a pipe; one that is out arrives, whatever happens to the writer."""

    def tell(verb: str, numbers: list[int]) -> None:
        os.write(say, f"{verb} {' '.join(map(str, numbers))}\n".encode())

    return tell


def work(path: Path, say: int, first: int, seed: int, name: str, count: int) -> None:
    """Stores pages from number `first` on, drops and erases some, saying on the descriptor `say` what is done:
    "put n", "drop n" and "erase n" once durable, "maybe n" before any of them. Dies at the point `name`, if one is
    named, reached for the `count`-th time."""
    draw, point = random.Random(seed), POINTS.get(name)
    kind = point.work if point else draw.choice(("mixed", "mixed", "tight"))
    tell = teller(say)
    first = _prepare(path, kind, first, tell)
    executioner = Executioner(point, count) if point else None
    tell("ready", [])
    with vault.tier(path, TIGHT if kind in ("tight", "shrink") else vault.ROOMY) as opened:
        while kind not in ("stray", "rebuild", "close"):
            first = step(opened, draw, first, tell)
        stored = list(range(first, first + 3))
        tell("maybe", stored)
        tell("put", vault.store(opened, stored))
    del executioner


def _prepare(path: Path, kind: str, first: int, tell: Tell) -> int:
    """What the work needs to find: pages enough, no index, a file without a record. Returns the next number."""
    if kind in ("shrink", "rebuild", "stray"):
        numbers = list(range(first, first + (3 * TIGHT if kind == "shrink" else 5)))
        with vault.tier(path) as opened:
            tell("maybe", numbers)
            tell("put", vault.store(opened, numbers))
        first += len(numbers)
    if kind == "rebuild":
        shutil.rmtree(path / "index")
    elif kind == "stray":
        shutil.copy(path / harms.segment_files(path)[0], path / "seg-00099999.kv")
    return first


def step(opened: DiskTier, draw: random.Random, first: int, tell: Tell) -> int:
    """Stores one to five pages from `first` on, removes some of them again; returns the next number."""
    numbers = list(range(first, first + draw.randrange(1, 6)))
    tell("maybe", numbers)
    tell("put", vault.store(opened, numbers))
    if draw.random() < 0.5:
        erase = draw.random() < 0.5
        victims = [number for number in numbers if draw.random() < 0.5] or numbers[:1]
        tell("maybe", victims)
        opened.drop_all([vault.page(number).key for number in victims], erase=erase)
        tell("erase" if erase else "drop", victims)
    return first + len(numbers)
