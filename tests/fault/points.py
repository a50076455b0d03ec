"""SIGKILL between two writes: on entering the n-th system call of a kind, in the broker or in the engine.

The order of a commit is pwrite of the data, fdatasync, then the record; so a death on entering fdatasync is one between
the pages and their sync, and a death on entering LMDB's pwrite or writev is one between the pages' sync and their
record, or between two parts of a record. Needs strace and the permission to attach; without, there are no runs.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
from pathlib import Path

from world import Row, World, until
from writer import Trap, at_work, audit

CALLS = {
    "broker": ("fdatasync", "pwrite64,pwritev,writev", "write", "sendto,sendmsg"),
    "engine": ("fdatasync", "pwrite64,pwritev,writev", "write", "fallocate,ftruncate,fsync"),
}
WAIT_S = 10.0  # some calls are rare: then the process is killed at that moment instead
POINTS = [(victim, calls) for victim, kinds in CALLS.items() for calls in kinds]


def points(world: World, runs: int, draw: random.Random) -> Row:
    """`runs` deaths, over all kinds of calls."""
    row, trap = Row("kill between two writes"), Trap()
    if not available():
        world.notes.append(f"{row.scenario}: not run: strace is not there, or may not attach")
        return row
    hits: dict[str, int] = {}
    order: list[tuple[str, str]] = []
    with world.watched(row), at_work(world, row, trap, draw) as writers:
        for _ in range(runs):
            order = order or draw.sample(POINTS, k=len(POINTS))
            victim, calls = order.pop()
            world.revive(ready=True)
            died = die_in(world, victim, calls, draw.randrange(1, 12))
            hits[f"{victim} {calls if died else 'any'}"] = hits.get(f"{victim} {calls if died else 'any'}", 0) + 1
            row.runs += 1
            world.revive(ready=False)
            audit(writers)
    world.notes.append(f"{row.scenario}: {sum(writer.restored for writer in writers)} tokens restored; died at {hits}")
    return row


def available() -> bool:
    """Whether processes of ours can be traced here."""
    if shutil.which("strace") is None:
        return False
    inject = ["strace", "-f", "-o", "/dev/null", "-e", "trace=fdatasync", "-e", "inject=fdatasync:signal=SIGKILL"]
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        tracer = subprocess.Popen([*inject, "-p", str(sleeper.pid)], stderr=subprocess.PIPE)
        assert tracer.stderr is not None
        attached = b"attached" in tracer.stderr.readline()
        sleeper.kill()
        tracer.kill()
        tracer.communicate()
    return attached


def die_in(world: World, victim: str, calls: str, count: int) -> bool:
    """Waits until the process died on entering one of the calls for the `count`-th time; False: it had to be killed."""
    pids = [world.broker_pid] if victim == "broker" else world.engine_pids
    inject = f"inject={calls}:signal=SIGKILL:when={count}"
    command = ["strace", "-f", "-o", "/dev/null", "-e", f"trace={calls}", "-e", inject]
    tracer = subprocess.Popen(
        [*command, *(part for pid in pids for part in ("-p", str(pid)))], stderr=subprocess.DEVNULL
    )
    try:
        with contextlib.suppress(TimeoutError):
            until(lambda: any(map(ended, pids)), WAIT_S, "death")
            return True
        world.kill(victim)
        return False
    finally:
        tracer.kill()  # a tracer may wait for ever for threads that died; they are reaped when it is gone
        tracer.wait()


def ended(pid: int) -> bool:
    """Whether a process is dead, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True
