"""I/O errors: system calls of engine and broker that fail with EIO, and a disk that refuses reads or writes."""

from __future__ import annotations

import collections
import contextlib
import random
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import disks
import vault
from atlas_client import Client
from atlas_client.protocol import StatusReply
from points import available
from talk import Talk
from world import Row, World, until

KINDS = [
    ("engine", "pread64,preadv,preadv2"),
    ("engine", "pwrite64,pwritev,pwritev2"),
    ("engine", "fdatasync"),
    ("broker", "pwrite64,pwritev"),
    ("broker", "fdatasync"),
]
TURNS = 4
DISK = 64 * disks.MIB


def ioerrors(world: World, runs: int, draw: random.Random) -> Row:
    """Half of the runs by strace on a daemon, half by a disk that fails under the disk tier."""
    row = Row("I/O errors")
    _calls(world, row, runs - runs // 2, draw)
    try:
        for number in range(runs // 2):
            with tempfile.TemporaryDirectory(prefix="atlas-") as root:
                _failing_disk(world, row, Path(root), ("pread", "pwrite")[number % 2], draw)
    except disks.NotRun as error:
        world.notes.append(f"{row.scenario}: a disk that fails not run: {error}")
    return row


# --- system calls of a daemon -----------------------------------------------------------------------------------


def _calls(world: World, row: Row, runs: int, draw: random.Random) -> None:
    if not available():
        world.notes.append(f"{row.scenario}: system calls not run: strace is not there, or may not attach")
        return
    world.start()
    injected: collections.Counter[str] = collections.Counter()
    with world.watched(row):
        for number in range(runs):
            victim, calls = KINDS[number % len(KINDS)]
            world.revive(ready=True)
            injected[f"{victim} {calls}"] += _one(world, row, victim, calls, draw)
            row.runs += 1
    world.check_accounts(row)
    world.notes.append(f"{row.scenario}: calls failed {dict(injected)}")


def _one(world: World, row: Row, victim: str, calls: str, draw: random.Random) -> int:
    talk = Talk(world, row, world.daemon, draw)
    talk.settle()
    if "pread" in calls:  # its pages are read from the disk only by an engine that has them nowhere else
        world.daemon.kill()
        world.revive(ready=True)
    before = world.status()
    assert before is not None
    mark = len(world.daemon.log.read_text(errors="replace"))
    pids = [world.broker_pid] if victim == "broker" else world.engine_pids
    with tempfile.NamedTemporaryFile(prefix="atlas-") as trace:
        when = f"{draw.randrange(1, 4)}+{draw.choice((1, 2, 5))}"
        with failing(pids, calls, when, Path(trace.name)):
            for _ in range(TURNS):
                talk.say()
        count = Path(trace.name).read_text(errors="replace").count("INJECTED")
    if count and not says_so(world, before, talk, mark):
        world.note(row, "undetected", f"{count} calls {calls} of the {victim} failed and nobody says so")
    talk.settle()
    talk.audit()
    with Client(world.reference.socket) as reference:
        talk.judge(reference)
    return count


def says_so(world: World, before: StatusReply, talk: Talk, mark: int, limit: float = 5.0) -> bool:
    """Whether status does, at the engine's next beat at the latest. `mark`: the daemon's log before."""

    def said() -> bool:
        after = world.status()
        if after is None:
            return False
        names = ("disk_write_errors", "disk_pages_damaged")
        grew = any(after.counters.get(name, 0) > before.counters.get(name, 0) for name in names)
        logged = world.daemon.log.read_text(errors="replace")[mark:]
        again = talk.errors or "session log anew" in logged or "commit failed" in logged
        return bool(grew or after.warnings != before.warnings or (after.warnings and again))  # each is said once

    with contextlib.suppress(TimeoutError):
        return bool(until(said, limit, "status says so"))
    return False


@contextlib.contextmanager
def failing(pids: list[int], calls: str, when: str, trace: Path) -> Iterator[None]:
    """These calls of the processes fail with EIO, the first and those after as `when` says."""
    inject = ["-e", f"trace={calls}", "-e", f"inject={calls}:error=EIO:when={when}"]
    targets = [part for pid in pids for part in ("-p", str(pid))]
    tracer = subprocess.Popen(["strace", "-f", "-o", str(trace), *inject, *targets], stderr=subprocess.PIPE)
    assert tracer.stderr is not None
    tracer.stderr.readline()  # "attached"
    try:
        yield
    finally:
        tracer.terminate()  # it lets go of the processes
        try:
            tracer.wait(10)
        except subprocess.TimeoutExpired:
            tracer.kill()
            tracer.wait()


# --- a disk that fails ------------------------------------------------------------------------------------------


def _failing_disk(world: World, row: Row, root: Path, what: str, draw: random.Random) -> None:
    image, trigger = disks.make_image(root / "disk", DISK), root / "fails"
    options = [f"error-{what}=EIO", f"error-{what}-rate={draw.choice((20, 100))}%", f"error-{what}-file={trigger}"]
    with disks.over_nbd(root, "--filter=error", "file", image, *options) as path:
        try:
            there, dropped, problems = vault.in_child(suffer, path / "kv", trigger, what, draw.randrange(10**9))
        except vault.ChildDied as error:
            world.note(row, "crashes", f"{what}: {error}")
            return
        finally:
            trigger.unlink(missing_ok=True)
    for problem in problems:
        world.note(row, "undetected", f"{what}: {problem}")
    with disks.mounted(root / "again", "-o", "loop", image) as path:
        report = vault.audit(path / "kv", there | dropped)
    vault.judge(world, row, f"{what} failed, opened again", report, there=there, maybe=dropped, silent=True)
    row.runs += 1


def suffer(path: Path, trigger: Path, what: str, seed: int) -> tuple[set[int], set[int], list[str]]:
    """Stores pages, then goes on while the disk fails. Returns (pages that must be there, that may be, what was
    wrong)."""
    draw, problems = random.Random(seed), []
    with vault.tier(path) as opened:
        there = set(vault.store(opened, list(range(40))))
        trigger.touch()
        dropped: set[int] = set()
        if what == "pread":
            found, wrong = vault.read(opened, draw.sample(range(40), k=20))
            dropped = there - {number for number in there if opened.find(vault.page(number).key)}
            if len(dropped) != opened._counters.counts().get("disk_pages_damaged", 0) or wrong:
                problems.append(f"{dropped} can't be read, wrong {wrong}, {opened._counters.counts()}")
        else:
            for first in range(40, 80, 4):
                numbers = list(range(first, first + 4))
                stored = vault.store(opened, numbers)
                there |= set(stored)
                dropped |= set(numbers) - set(stored)
                if len(stored) < 4 and not opened.last_error:
                    problems.append(f"{stored} of {numbers} are stored and nobody says why")
                opened._paused_until = 0.0  # as if the pause were over
        trigger.unlink()
        found, wrong = vault.read(opened, there - dropped)
        if found != there - dropped or wrong:
            problems.append(f"of {there - dropped} were found {found}, wrong {wrong}")
        opened.check()
    return there - dropped, dropped, problems
