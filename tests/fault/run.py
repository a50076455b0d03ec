"""`make fault`: hurts a real daemon on the bundled model and counts what should never happen.

Prints a table, writes build/fault.json, and exits with 1 when a token was wrong, an acknowledged turn lost, a fault
went unnoticed or a process crashed by itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
from scenarios import SCENARIOS
from world import Row, World, world

RESULT = Path(__file__).parent.parent.parent / "build" / "fault.json"
LOG = RESULT.with_suffix(".log")  # the hurt daemon's, when something was wrong


def main() -> int:
    arguments = parse()
    isolate()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the daemons are ended on the way out
    wanted = [name for name in SCENARIOS if not arguments.only or name in arguments.only]
    with world() as made:
        rows = [_run(made, name, arguments) for name in wanted]
        if made.problems and made.daemon.log.exists():
            LOG.parent.mkdir(exist_ok=True)
            shutil.copy(made.daemon.log, LOG)
    report(made, rows)
    return 0 if all(row.good for row in rows) else 1


def isolate() -> None:
    """Goes on in a mount namespace of its own, where that is permitted: what scenarios mount ends with them."""
    if os.geteuid() or shutil.which("unshare") is None:
        return
    own, parent = (os.readlink(f"/proc/{pid}/ns/mnt") for pid in (os.getpid(), os.getppid()))
    if own == parent and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0:
        os.execvp("unshare", ["unshare", "-m", sys.executable, *sys.argv])


def parse() -> argparse.Namespace:
    """--runs, --only, --seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=float, default=1.0, help="multiplies each scenario's number of faults")
    parser.add_argument("--only", action="append", choices=list(SCENARIOS), help="this scenario; may be repeated")
    parser.add_argument("--seed", type=int, default=None, help="of what is drawn; the moments stay random")
    arguments = parser.parse_args()
    arguments.seed = arguments.seed if arguments.seed is not None else random.randrange(10**6)
    return arguments


def _run(made: World, name: str, arguments: argparse.Namespace) -> Row:
    scenario = SCENARIOS[name]
    began = time.monotonic()
    try:
        row = scenario.run(made, round(scenario.runs * arguments.runs), random.Random(arguments.seed))
    except (Exception, pytest.fail.Exception):  # the other scenarios still count
        row = Row(name)
        made.note(row, "undetected", f"the scenario broke off: {traceback.format_exc()}")
    made.notes.append(f"{row.scenario}: {time.monotonic() - began:.0f} s, seed {arguments.seed}")
    print(f"{row.scenario}: {row.runs} runs, {'good' if row.good else 'BAD'}", flush=True)
    return row


def report(made: World, rows: list[Row]) -> None:
    """The table, for a person, and the rows, for programs."""
    columns = [field.name for field in dataclasses.fields(Row)]
    width = max(len(row.scenario) for row in rows)
    print("\n" + f"{'scenario':{width}}  " + "  ".join(columns[1:]))
    for row in rows:
        values = dataclasses.asdict(row)
        print(f"{row.scenario:{width}}  " + "  ".join(f"{values[name]:>{len(name)}}" for name in columns[1:]))
    for line in [*made.notes, f"greedy choices too close to call: {made.close_calls}", *made.problems]:
        print(line)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
