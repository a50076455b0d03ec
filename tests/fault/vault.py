"""A KV directory whose pages follow from their numbers: what is found in it can be judged without the code under test.

It is always opened in a process of its own, which a damaged file may crash.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import random
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from atlas_tiers.base import KVGroup, PageLayout
from atlas_tiers.counters import Counters
from atlas_tiers.disk import DiskConfig, DiskTier
from atlas_tiers.keys import PageId, pack
from world import Row, World

LAYOUT = PageLayout((KVGroup((0, 2), 2, 4), KVGroup((1,), 1, 9)), "float32")  # does not fill its last sector
IDENTITY, ROOT = b"i" * 32, b"r" * 32
SLOT_BYTES = 4096 + -(-LAYOUT.page_bytes // 4096) * 4096
ROOMY = 2000  # pages
LIMIT_S = 60.0  # for what a child process does
CONTEXT = multiprocessing.get_context("fork")  # children use files, LMDB and a hash: nothing that minds threads


def page(number: int) -> PageId:
    """Every fifth is a tail."""
    count = 64 if number % 5 else 1 + number % 63
    return PageId.of(ROOT, pack([number, *range(1, count)]))


def payload(number: int) -> memoryview:
    """What page `number` must hold."""
    return memoryview(bytearray(random.Random(number).randbytes(LAYOUT.page_bytes)))


def fill_with(number: int) -> Callable[[memoryview], None]:
    """Writes the page's payload where a tier says."""

    def fill(into: memoryview) -> None:
        into[:] = payload(number)

    return fill


@contextlib.contextmanager
def tier(path: Path, pages: int = ROOMY, identity: bytes = IDENTITY) -> Iterator[DiskTier]:
    """The directory, open, with room for about that many pages in segments of 8."""
    cap = (1 << 20) + pages * (SLOT_BYTES + 2048)
    config = DiskConfig(path, cap, free_floor_bytes=0, segment_bytes=8 * SLOT_BYTES, lock_wait_s=5.0)
    opened = DiskTier(LAYOUT, identity, config, Counters())
    try:
        yield opened
    finally:
        opened.close()


def store(opened: DiskTier, numbers: Sequence[int]) -> list[int]:
    """Those that are durable now."""
    done = opened.store([(page(number), fill_with(number)) for number in numbers])
    return [number for number, stored in zip(numbers, done, strict=True) if stored]


def build(path: Path, numbers: Iterable[int], dropped: Iterable[int] = (), erased: Iterable[int] = ()) -> None:
    """A directory with these pages, some of which were removed again."""
    with tier(path) as opened:
        if missing := set(numbers) - set(store(opened, list(numbers))):
            raise RuntimeError(f"pages {missing} can't be stored")
        opened.drop_all([page(number).key for number in dropped])
        opened.drop_all([page(number).key for number in erased], erase=True)


@dataclasses.dataclass
class Report:
    """What a process found in a directory. `said`: it counted damage or warned. `held`: pages there when it left.
    `crash`: how it died instead."""

    found: set[int] = dataclasses.field(default_factory=set)
    wrong: set[int] = dataclasses.field(default_factory=set)
    held: set[int] = dataclasses.field(default_factory=set)
    said: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    crash: str = ""


def inspect(path: Path, numbers: Iterable[int], harm: Sequence[Any] = (), pages: int = ROOMY) -> Report:
    """Opens the directory, does `harm` to it, reads everything, checks the accounts, stores what is missing and reads
    again: damage must not stop the tier from going on."""
    report, numbers = Report(), list(numbers)
    with tier(path, pages) as opened:
        for change in harm:
            change.apply(path)
        report.found, report.wrong = read(opened, numbers)
        counts, warnings = opened._counters.counts(), opened._counters.warnings()
        report.said = [*warnings, *(["damaged pages"] if counts.get("disk_pages_damaged") else [])]
        _account(opened, report, "after reading")
        lacking = [number for number in numbers if number not in report.found][:20]
        stored = store(opened, lacking)
        again, wrong = read(opened, stored)
        if again != set(stored) or wrong or len(stored) < len(lacking):
            report.problems.append(f"stored {lacking} again: {stored}, found {again}, wrong {wrong}")
        _account(opened, report, "after storing again")
        report.held = {number for number in numbers if opened.find(page(number).key)}
    return report


def read(opened: DiskTier, numbers: Iterable[int]) -> tuple[set[int], set[int]]:
    """(found, found with other bytes)"""
    found, wrong = set(), set()
    into = memoryview(bytearray(LAYOUT.page_bytes))
    for number in numbers:
        header = opened.get(page(number).key, into)
        if header is not None:
            found.add(number)
            if header != page(number).header or into != payload(number):
                wrong.add(number)
    return found, wrong


def _account(opened: DiskTier, report: Report, when: str) -> None:
    try:
        opened.check()
    except AssertionError as error:
        report.problems.append(f"{when}: {error}")
    stats = opened.stats()
    if stats.free + stats.open + stats.sealed != stats.total:
        report.problems.append(f"{when}: {stats}")


def audit(path: Path, numbers: Iterable[int], harm: Sequence[Any] = (), pages: int = ROOMY) -> Report:
    """inspect() in another process."""
    try:
        report: Report = in_child(inspect, path, set(numbers), list(harm), pages)
    except ChildDied as error:
        return Report(crash=str(error))
    return report


def judge(
    world: World, row: Row, what: str, report: Report, *, there: set[int], maybe: set[int], silent: bool = False
) -> None:
    """Pages `there` must be found, `maybe` may; none may be wrong, none besides be found. When one that may be missing
    is, somebody must have said so, unless `silent`."""
    if report.crash:
        world.note(row, "crashes", f"{what}: {report.crash}")
        return
    for number in sorted(report.wrong):
        world.note(row, "wrong_tokens", f"{what}: page {number} has other bytes")
    if lost := there - report.found:
        world.note(row, "lost_turns", f"{what}: pages {sorted(lost)} were durable and are gone ({report.said})")
    if risen := report.found - there - maybe:
        world.note(row, "undetected", f"{what}: pages {sorted(risen)} were removed and are found")
    if maybe - report.found and not report.said and not silent:
        world.note(row, "undetected", f"{what}: nobody says that {sorted(maybe - report.found)} are gone")
    for problem in report.problems:
        world.note(row, "undetected", f"{what}: {problem}")


class ChildDied(Exception):
    """A child process ended without an answer, or raised: how."""


def in_child(function: Callable[..., Any], *arguments: Any, limit: float = LIMIT_S) -> Any:
    """The function's result, computed in a fresh process. Raises ChildDied."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_answer, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit):
            process.kill()
            raise ChildDied(f"no answer in {limit:g} s")
        result, error = ours.recv()
    except EOFError:
        process.join()
        raise ChildDied(f"exit status {process.exitcode}") from None
    finally:
        ours.close()
        process.join()
    if error:
        raise ChildDied(error)
    return result


def _answer(pipe: multiprocessing.connection.Connection, function: Callable[..., Any], arguments: Any) -> None:
    try:
        pipe.send((function(*arguments), ""))
    except Exception:
        pipe.send((None, traceback.format_exc(limit=-3)))
