"""SIGKILL of a writing process at random moments: what it reported durable is there, and nothing found is wrong."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiers_support import disk_config, opened, settled, some_tokens, store, write

KILLS = 15
SESSIONS = 6
TINY_CAP_PAGES = 20
CONTEXT = multiprocessing.get_context("forkserver")  # torch is imported once, in a process without threads
CONTEXT.set_forkserver_preload(["atlas_tiers.store"])


def script(session: int) -> list[int]:
    """All tokens that a session will ever have."""
    return some_tokens(4000, seed=session)


def work(report: str, path: Path, lengths: list[int], pages: int, seed: int) -> None:
    """Goes on with the sessions, writing a line for each durable turn to the pipe `report`, until it is killed."""
    pipe = os.open(report, os.O_WRONLY)
    tiered = store(path, blocks=200, disk=disk_config(path, pages=pages))
    rng = random.Random(seed)
    os.write(pipe, b"ready\n")
    while True:
        session = rng.randrange(SESSIONS)
        tokens = script(session)[: lengths[session] + rng.randrange(1, 100)]
        sequence = opened(tiered, tokens)
        write(tiered, sequence, tokens, "ann")
        ticket = sequence.persist()
        sequence.release()
        if settled(tiered, ticket).durable:
            os.write(pipe, b"%d %d\n" % (session, len(tokens)))
        lengths[session] = len(tokens) if len(tokens) < 3800 else 0


def run_and_kill(path: Path, lengths: list[int], pages: int, rng: random.Random) -> Iterator[tuple[int, int]]:
    """(session, tokens) of every turn that was reported durable before the kill."""
    report = path.with_suffix(".pipe")
    report.unlink(missing_ok=True)
    os.mkfifo(report)
    arguments = (str(report), path, lengths, pages, rng.randrange(10**9))
    process = CONTEXT.Process(target=work, args=arguments)
    process.start()
    with report.open() as lines:
        assert lines.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, 0.25))  # the moment of the kill, not a wait for something
        process.kill()
        for line in lines:
            session, tokens = line.split()
            yield int(session), int(tokens)
    process.join()


@pytest.mark.parametrize("pages", [20_000, TINY_CAP_PAGES])
def test_killed_while_writing(tmp_path: Path, pages: int) -> None:
    """With room for all, every durable turn is whole; with a tiny cap pages go, but none is wrong."""
    rng = random.Random(pages)
    lengths = [0] * SESSIONS
    reported = 0
    for _ in range(KILLS if pages > TINY_CAP_PAGES else KILLS // 2):
        for session, tokens in run_and_kill(tmp_path / "kv", lengths, pages, rng):
            lengths[session] = tokens
            reported += 1
        tiered = store(tmp_path / "kv", blocks=200, disk=disk_config(tmp_path / "kv", pages=pages))
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
