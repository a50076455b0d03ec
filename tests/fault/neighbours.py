"""A second daemon on a directory that is in use: it is refused and says so, the first one goes on unharmed."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys

from atlas_client import Client, DaemonUnavailable
from conftest import Daemon
from talk import Talk
from world import HURT, Row, World, until

KINDS = ("state directory", "socket", "KV directory")


def neighbours(world: World, runs: int, draw: random.Random) -> Row:
    """Each run: a turn before, the second daemon meanwhile, a turn after."""
    row = Row("two daemons on one directory")
    with world.watched(row):
        for number in range(runs):
            kind = KINDS[number % len(KINDS)]
            talk = Talk(world, row, world.daemon, draw)
            talk.settle()
            (_share_pages if kind == "KV directory" else _start_twice)(world, row, kind)
            talk.settle()
            talk.audit()
            with Client(world.reference.socket) as reference:
                talk.judge(reference)
            row.runs += 1
    world.check_accounts(row)
    return row


def _start_twice(world: World, row: Row, kind: str) -> None:
    """The same state directory or socket: the second one ends at once."""
    first = world.daemon
    places = {"--socket": first.socket, "--state-dir": first.state}
    if kind == "state directory":
        places["--socket"] = first.root / "other"
    else:
        places["--state-dir"] = first.root / "other-state"
    flags = [str(part) for place in places.items() for part in place]
    command = [sys.executable, "-m", "atlasd", *flags, *first.flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    judge_refusal(world, row, kind, ended.returncode, ended.stderr)


def judge_refusal(world: World, row: Row, kind: str, status: int, said: str) -> None:
    """A daemon that may not run ends with an error that names the one that does, and the option to give."""
    if status == 0 or f"pid {world.broker_pid}" not in said or "--s" not in said:
        world.note(row, "undetected", f"same {kind}: exit status {status}, {said[-300:]}")


def _share_pages(world: World, row: Row, kind: str) -> None:
    """A state directory of its own, but the first one's pages: no model is served."""
    second = Daemon(world.daemon.root / "second", *HURT, "--kv-disk-path", str(world.daemon.state / "kv"))
    second.root.mkdir(exist_ok=True)
    second.start(ready=False)
    try:

        def failed() -> str:
            with contextlib.suppress(DaemonUnavailable), Client(second.socket) as client:
                return client.status().engine_error
            return ""

        said = until(failed, 60, "the second daemon's engine gives up")
        if "in use by another engine" not in said or "--kv-disk-path" not in said:
            world.note(row, "undetected", f"same {kind}: {said}")
    except TimeoutError as error:
        world.note(row, "undetected", f"same {kind}: {error}")
    finally:
        second.kill()
