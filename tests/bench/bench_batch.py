"""Tokens per second of eight sessions decoding together, against one alone, in turn on one daemon."""

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
from report import row

SESSIONS = 8
TOKENS = 200
ROUNDS = 5
BAR = 2.5


def decode(socket: Path, prompt: list[int], stamps: list[float]) -> None:
    """One generation; notes when each token arrived."""
    with Client(socket) as client:
        for event in client.generate(tokens=prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True):
            if isinstance(event, Tokens) and event.ids:
                stamps.append(time.monotonic())


def rate(socket: Path, sessions: int, round_: int) -> float:
    """Tokens per second of all sessions, from the last one's first token to the first one's last."""
    stamps: list[list[float]] = [[] for _ in range(sessions)]
    prompts = [[(round_ * 17 + n * 31 + i) % 4000 + 7 for i in range(100)] for n in range(sessions)]
    threads = [threading.Thread(target=decode, args=(socket, p, s)) for p, s in zip(prompts, stamps, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    start, end = max(s[0] for s in stamps), min(s[-1] for s in stamps)
    return sum(sum(start < t <= end for t in s) for s in stamps) / (end - start)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="atlas-") as path:
        daemon = Daemon(Path(path))
        daemon.start()
        rate(daemon.socket, 1, 0)
        pairs = [(rate(daemon.socket, 1, n), rate(daemon.socket, SESSIONS, n)) for n in range(1, ROUNDS + 1)]
        daemon.kill()
    one, many = (statistics.median(p[i] for p in pairs) for i in (0, 1))
    ratio = statistics.median(m / o for o, m in pairs)
    command = "make bench ONLY=batch"
    row("batch", "decode, one session", one, "tokens/s", command=command)
    name, against = f"decode, {SESSIONS} sessions", f"one session: {one:.0f} tokens/s"
    row("batch", name, many, "tokens/s", against=against, ratio=ratio, bar=BAR, higher_is_better=True, command=command)


if __name__ == "__main__":
    main()
