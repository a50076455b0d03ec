"""Time to first token of a 16,000-token session after SIGKILL, cold, against reading its bytes and two decode steps.

A seeded model with 24 KiB of KV a token. Every round kills the daemon, starts it again, drops its files from the page
cache (pages on disk are read past it anyway) and asks the session's next question. The limit is measured after each
turn: O_DIRECT reads of as many bytes from a file on the same file system, at the best of several depths. A decode step
is the same turn's own, the mean over its tokens.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from atlas_client import Client
from atlas_client.protocol import Done
from conftest import Daemon
from families import VOCAB, make
from raw import Raw
from report import row

BUILD = Path(__file__).parent.parent.parent / "build"
TOKENS = 16_000
ROUNDS = 5
DEPTHS = (1, 3, 6)
BAR = 1.3
SESSION = "long"


def main() -> None:
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="atlas-") as sockets, tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        model = make(
            "llama", Path(scratch) / "model", hidden_size=256, intermediate_size=512, num_hidden_layers=3,
            num_attention_heads=8, num_key_value_heads=8, head_dim=128, max_position_embeddings=20_000,
        )  # fmt: skip
        daemon = Daemon(Path(sockets), "--quant", "none", "--kv-ram-gb", "1", model=str(model))
        daemon.state = Path(scratch) / "state"  # on the file system to measure, not on a temporary one
        daemon.start()
        with Client(daemon.socket) as client:
            client.session(SESSION).append(tokens=[7 + n * 31 % (VOCAB - 7) for n in range(TOKENS)])
        try:
            rounds = [measure(daemon, Path(scratch)) for _ in range(ROUNDS)]
        finally:
            daemon.kill()
    report(rounds)


def measure(daemon: Daemon, scratch: Path) -> dict[str, float]:
    """Milliseconds of one resume by name, and its bytes."""
    daemon.kill()
    daemon.start()
    with Client(daemon.socket) as client:
        list(client.generate("warm up", max_tokens=4))
        before = client.status().counters.get("disk_bytes_read", 0)
    drop_cache(daemon.state)
    done = question(daemon)
    with Client(daemon.socket) as client:
        bytes_ = client.status().counters["disk_bytes_read"] - before
    if done.usage.restored < TOKENS:
        raise SystemExit(f"only {done.usage.restored} tokens were restored: {done.reset_reason}")
    with Raw(scratch / "raw", bytes_) as raw:
        raw.allocate()
        raw.write(1)
        read = min(raw.read(depth) for depth in DEPTHS)
    step = 1e3 / done.timings.decode_tokens_per_s
    times = done.timings
    return {
        "ttft": times.ttft_ms, "restore": times.restore_ms, "read": 1e3 * read, "step": step, "bytes": float(bytes_)
    }  # fmt: skip


def question(daemon: Daemon) -> Done:
    """The next turn of the session. Counters come with the engine's beat: the answer is long enough for one."""
    with Client(daemon.socket) as client:
        generation = client.generate(
            tokens=[101, 102, 103], session=SESSION, max_tokens=24, temperature=0, ignore_eos=True
        )
        return generation.result


def drop_cache(path: Path) -> None:
    """Has the kernel forget what it holds of the files under `path`."""
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def report(rounds: list[dict[str, float]]) -> None:
    median = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    row("resume16k", "bytes read for a 16,000-token session", median["bytes"] / 1e6, "MB")
    row("resume16k", "one decode step of it", median["step"], "ms")
    row("resume16k", "restore alone", median["restore"], "ms", against=f"raw read {median['read']:.0f} ms",
        ratio=statistics.median(r["restore"] / r["read"] for r in rounds))  # fmt: skip
    limits = [BAR * r["read"] + 2 * r["step"] for r in rounds]
    ratio = statistics.median(r["ttft"] / limit for r, limit in zip(rounds, limits, strict=True))
    against = f"{BAR} times the raw read + 2 decode steps: {statistics.median(limits):.0f} ms"
    row("resume16k", "time to first token, cold", median["ttft"], "ms", against=against, ratio=ratio, bar=1.0)


if __name__ == "__main__":
    main()
