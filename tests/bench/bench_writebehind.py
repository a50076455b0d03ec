"""Decode of eight sessions while their pages are written behind, against the same without a disk.

Two daemons with one seeded model (32 KiB of KV a token), one of them with `--kv-disk-path none`; they take turns, so
that a change of the machine's load hits both alike. Tokens are counted from the last session's first to the first one's
last; the bytes written are the daemon's count over the whole round, prompts and tails included.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from atlas_client import Client
from atlas_client.protocol import Tokens
from conftest import Daemon
from families import VOCAB, make
from report import row

BUILD = Path(__file__).parent.parent.parent / "build"
SESSIONS, PROMPT, TOKENS = 8, 160, 320
ROUNDS = 9
BAR = 0.95


def main() -> None:
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="atlas-") as sockets, tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        model = make(
            "llama", Path(scratch) / "model", hidden_size=256, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=8, num_key_value_heads=8, head_dim=128, max_position_embeddings=2_000,
        )  # fmt: skip
        daemons = []
        try:
            for name, flags in (("kept", ()), ("none", ("--kv-disk-path", "none"))):
                (root := Path(sockets) / name).mkdir()
                daemons.append(Daemon(root, "--quant", "none", "--kv-ram-gb", "1", *flags, model=str(model)))
                daemons[-1].state = Path(scratch) / name  # on the file system to measure, not on a temporary one
                daemons[-1].start()
            rounds = [[rate(daemon, n) for daemon in daemons[:: 1 if n % 2 else -1]] for n in range(ROUNDS + 1)][1:]
        finally:
            for daemon in daemons:
                daemon.kill()
    report([pair[:: 1 if n % 2 else -1] for n, pair in enumerate(rounds, 1)])


def report(rounds: list[list[tuple[float, float]]]) -> None:
    kept, none = (statistics.median(pair[i][0] for pair in rounds) for i in (0, 1))
    written = statistics.median(pair[0][1] for pair in rounds)
    if not written or any(pair[1][1] for pair in rounds):
        raise SystemExit(f"{written} bytes were written where pages are kept, or some where none are")
    ratio = statistics.median(pair[0][0] / pair[1][0] for pair in rounds)
    row("writebehind", "pages written behind in a round", written / 1e6, "MB")
    against = f"without a disk: {none:.0f} tokens/s"
    row("writebehind", f"decode of {SESSIONS} sessions while pages are written behind", kept, "tokens/s",
        against=against, ratio=ratio, bar=BAR, higher_is_better=True)  # fmt: skip


def rate(daemon: Daemon, number: int) -> tuple[float, float]:
    """Tokens per second of all sessions, and the bytes of pages written meanwhile."""
    stamps: list[list[float]] = [[] for _ in range(SESSIONS)]
    with Client(daemon.socket) as client:
        before = client.status().counters.get("disk_bytes_written", 0)
    threads = [threading.Thread(target=decode, args=(daemon.socket, number, n, stamps[n])) for n in range(SESSIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    start, end = max(each[0] for each in stamps), min(each[-1] for each in stamps)
    time.sleep(1.5)  # counters come with the engine's beat
    with Client(daemon.socket) as client:
        written = client.status().counters.get("disk_bytes_written", 0) - before
    return sum(sum(start < t <= end for t in each) for each in stamps) / (end - start), float(written)


def decode(socket: Path, number: int, session: int, stamps: list[float]) -> None:
    """One session's turn; notes when each token arrived."""
    prompt = [7 + (number * 17 + session * 31 + i) % (VOCAB - 7) for i in range(PROMPT)]
    with Client(socket) as client:
        name = f"s{number}-{session}"
        for event in client.generate(tokens=prompt, session=name, max_tokens=TOKENS, temperature=0, ignore_eos=True):
            if isinstance(event, Tokens) and event.ids:
                stamps.append(time.monotonic())


if __name__ == "__main__":
    main()
