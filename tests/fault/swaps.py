"""Other weights under the same path, with the same size and times: no page of the old ones is used, and it is said."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from pathlib import Path

from atlas_client import Client
from atlas_client.protocol import Done
from conftest import Daemon
from families import make
from talk import Talk
from world import HURT, UNHURT, Row, World

WAYS = (
    "another file, while it is down",
    "other bytes, while it is down",
    "another file, then loaded again",
    "another file, then the engine dies",
)
PROMPT = 200


def swaps(world: World, runs: int, draw: random.Random) -> Row:
    """Each run: a session, a swap, the session goes on as a daemon says that never had other weights."""
    row = Row("model swapped under its path")
    with tempfile.TemporaryDirectory(prefix="atlas-", ignore_cleanup_errors=True) as root:
        kept = [make("qwen3", Path(root, f"weights{seed}"), seed=seed, max_position_embeddings=2048) for seed in (1, 2)]
        served = Path(root, "served")
        shutil.copytree(kept[0], served)
        daemon = Daemon(Path(root, "d"), *HURT, model=str(served))
        references = [Daemon(Path(root, f"r{n}"), *UNHURT, model=str(path)) for n, path in enumerate(kept)]
        try:
            for each in (daemon, *references):
                each.root.mkdir()
                each.start(ready=False)
            for each in (daemon, *references):
                each.wait_state("ready")
            for number in range(runs):
                _swap(world, row, daemon, references, kept, WAYS[number % len(WAYS)], number, draw)
                row.runs += 1
        finally:
            for each in (daemon, *references):
                if each.process is not None and each.process.poll() is None:
                    each.kill()
    return row


def _swap(
    world: World, row: Row, daemon: Daemon, references: list[Daemon], kept: list[Path], way: str, number: int,
    draw: random.Random,
) -> None:  # fmt: skip
    talk = Talk(world, row, daemon, draw)
    before = talk.say(PROMPT)
    served = Path(daemon.flags[daemon.flags.index("--model") + 1])
    if way.endswith("down"):
        daemon.kill()
    _replace(served / "model.safetensors", kept[(number + 1) % 2] / "model.safetensors", way.startswith("other bytes"))
    if way.endswith("down"):
        daemon.start()
    else:
        with Client(daemon.socket) as client:
            if way.endswith("dies"):
                os.kill(client.status().engine_pid, signal.SIGKILL)
            else:
                client.unload_model()  # loading the model that runs is answered without doing anything
                client.load_model(str(served))
        daemon.wait_state("ready")
    after = talk.say(20)
    if before is None or after is None:
        world.note(row, "undetected", f"{way}: {talk.errors}")
        return
    judge_pages(world, row, way, after)
    talk.audit()
    first, second = talk.turns
    for turn, history, weights in ((first, [], number), (second, first.prompt + (first.tokens or []), number + 1)):
        with Client(references[weights % 2].socket) as reference:
            world.judge(row, reference, history, turn)


def judge_pages(world: World, row: Row, way: str, after: Done) -> None:
    """The first turn after a swap uses no page, and says why."""
    if after.usage.restored or after.usage.reused:
        world.note(row, "wrong_tokens", f"{way}: {after.usage} after the swap: pages of other weights were used")
    if not after.reset_reason:
        world.note(row, "undetected", f"{way}: no reset_reason")


def _replace(target: Path, source: Path, in_place: bool) -> None:
    stat = target.stat()
    if in_place:
        with target.open("r+b") as file:
            file.write(source.read_bytes())
    else:
        draft = target.with_name("draft")
        shutil.copy(source, draft)
        draft.rename(target)
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    if target.stat().st_size != stat.st_size:
        raise RuntimeError("the other weights have another size: this shows nothing")
