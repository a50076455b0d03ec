"""SIGKILL of a writing process at random moments: what it reported durable is there, and nothing that is found is wrong."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiers_support import disk_config, opened, settled, some_tokens, store, write

KILLS = 15
SESSIONS = 6
TINY_CAP_PAGES = 20


def script(session: int) -> list[int]:
    """All tokens that a session will ever have."""
    return some_tokens(4000, seed=session)


def child(path: Path, start: str, pages: int, seed: int) -> None:
    """Goes on with the sessions, from the lengths in `start`, printing each durable turn, until it is killed."""
    lengths = [int(length) for length in start.split(",")]
    tiered = store(path, blocks=200, disk=disk_config(path, pages=pages))
    rng = random.Random(seed)
    print("ready", flush=True)
    while True:
        session = rng.randrange(SESSIONS)
        tokens = script(session)[: lengths[session] + rng.randrange(1, 100)]
        sequence = opened(tiered, tokens)
        write(tiered, sequence, tokens, "ann")
        ticket = sequence.persist()
        sequence.release()
        if settled(tiered, ticket).durable:
            print(f"durable {session} {len(tokens)}", flush=True)
        lengths[session] = len(tokens) if len(tokens) < 3800 else 0


def run_and_kill(path: Path, lengths: list[int], pages: int, rng: random.Random) -> Iterator[tuple[int, int]]:
    """(session, tokens) of every turn that was reported durable before the kill."""
    arguments = [str(path), ",".join(map(str, lengths)), str(pages), str(rng.randrange(10**9))]
    with subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, 0.25))
        process.send_signal(signal.SIGKILL)
        reported = process.stdout.read()
    for line in reported.splitlines(keepends=True):
        if line.endswith("\n"):
            _, session, tokens = line.split()
            yield int(session), int(tokens)


@pytest.mark.parametrize("pages", [20_000, TINY_CAP_PAGES])
def test_killed_while_writing(tmp_path: Path, pages: int) -> None:
    """With room for all, every durable turn is whole; with a tiny cap pages go, but none is wrong."""
    rng = random.Random(pages)
    lengths = [0] * SESSIONS
    reported = 0
    for _ in range(KILLS if pages > TINY_CAP_PAGES else KILLS // 2):
        for session, tokens in run_and_kill(tmp_path, lengths, pages, rng):
            lengths[session] = tokens
            reported += 1
        tiered = store(tmp_path, blocks=200, disk=disk_config(tmp_path, pages=pages))
        for session, length in enumerate(lengths):
            sequence = opened(tiered, script(session)[: length + 1])  # compares every restored value
            if pages > TINY_CAP_PAGES:
                assert sequence.length == length, f"session {session}: {length} tokens were durable"
            sequence.release()
        assert tiered.counters()["disk_pages_damaged"] == 0
        assert tiered.warnings == []
        tiered.check()
        tiered.close()
    assert reported > KILLS


if __name__ == "__main__":
    child(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
