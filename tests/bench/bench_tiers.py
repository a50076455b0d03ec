"""Sessions to disk and back, against raw O_DIRECT I/O of as many bytes on the same file system in the same run.

    python tests/bench/bench_tiers.py [--tokens 20000] [--directory DIR]

The page is the bundled model's in float32: 6 layers, 2 KV heads of 64, 6 KiB a token, 384 KiB a page. Every round does
each thing once, so that a change of the machine's load hits all alike; values are medians, ratios medians of the
rounds' ratios.

The limits: blocks of 4 MiB, one at a time and three at a time, whichever is faster; a write ends with fdatasync. The
rows `huge` are no bar: three at a time out of huge pages, as the store's own buffers are, the most the device gives.
`fresh` files are allocated and not yet written (a session into new segments; making these is in its time, allocating
the raw file is not), `reused` ones were written before (a session into slots of purged pages).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from atlas_tiers.base import KVGroup, PageLayout
from atlas_tiers.disk import DiskConfig
from atlas_tiers.store import TieredStore
from raw import Raw
from report import row

LAYOUT = PageLayout((KVGroup(tuple(range(6)), 2, 64),), "float32")
BUILD = Path(__file__).parent.parent.parent / "build"
ROUNDS = 7
DEPTHS = (1, 3)
RESTORE_BAR, WRITE_BAR = 0.80, 0.70


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--directory", type=Path, default=BUILD, help="on the file system to measure")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        tokens = list(range(1, arguments.tokens + 1))
        rounds = [measure(Path(scratch), tokens, number) for number in range(ROUNDS + 1)][1:]  # the first one warms up
    size = -(-len(tokens) // 64) * LAYOUT.page_bytes
    for name, limit, bar in (
        ("restore", "read", RESTORE_BAR),
        ("write_fresh", "write_fresh", WRITE_BAR),
        ("write_reused", "write_reused", WRITE_BAR),
    ):
        report(rounds, size, name, limit, bar)


def report(rounds: list[dict[str, float]], size: int, name: str, limit: str, bar: float) -> None:
    """One row for the store against the better of the raw ones, and one for each of these."""
    for depth in DEPTHS:
        speed = size / statistics.median(r[f"raw {limit} {depth}"] for r in rounds) / 1e9
        row("tiers", f"tiers.raw_{limit}_{depth}", speed, "GB/s")
    fastest = size / statistics.median(r[f"raw {limit} huge"] for r in rounds) / 1e9
    row("tiers", f"tiers.raw_{limit}_huge", fastest, "GB/s")
    best = [min(r[f"raw {limit} {depth}"] for depth in DEPTHS) for r in rounds]
    ratio = statistics.median(limit_s / r[name] for limit_s, r in zip(best, rounds, strict=True))
    seconds = statistics.median(r[name] for r in rounds)
    against = f"raw {limit.replace('_', ', ')} {size / statistics.median(best) / 1e9:.2f} GB/s"
    row("tiers", f"tiers.{name}_ms", 1e3 * seconds, "ms")
    speed = size / seconds / 1e9
    row("tiers", f"tiers.{name}", speed, "GB/s", against=against, ratio=ratio, bar=bar, higher_is_better=True)


def measure(scratch: Path, tokens: list[int], number: int) -> dict[str, float]:
    """Seconds of one round, by name."""
    size = -(-len(tokens) // 64) * LAYOUT.page_bytes
    kv = scratch / f"kv{number}"
    found = {}
    with Raw(scratch / "raw", size) as raw:
        for depth in DEPTHS:
            raw.allocate()
            found[f"raw write_fresh {depth}"] = raw.write(depth)
        raw.allocate()
        found["raw write_fresh huge"] = raw.write(max(DEPTHS), huge=True)
        found["write_fresh"], found["write_reused"] = time_writes(kv, tokens)
        for depth in DEPTHS:
            found[f"raw write_reused {depth}"] = raw.write(depth)
            found[f"raw read {depth}"] = raw.read(depth)
        found["raw write_reused huge"] = raw.write(max(DEPTHS), huge=True)
        found["raw read huge"] = raw.read(max(DEPTHS), huge=True)
        found["restore"] = time_restore(kv, tokens)
    for file in kv.glob("seg-*.kv"):
        file.unlink()
    return found


def new_store(path: Path, pages: int) -> TieredStore:
    config = DiskConfig(path, cap_bytes=4 << 30, free_floor_bytes=0)
    made = TieredStore(LAYOUT, b"bench", device_blocks=pages + 4, host_bytes=0, disk=config)
    for pages in made.pages.values():
        pages.values.fill_(1.5)  # commits the memory: a daemon has done so by the time its model is loaded
    return made


def time_writes(path: Path, tokens: list[int]) -> tuple[float, float]:
    """Seconds until a computed session is durable: in a new directory, and again after it was purged."""
    store = new_store(path, -(-len(tokens) // 64))
    seconds = []
    for _ in range(2):
        store.purge(tokens, "bench")
        sequence = store.open(tokens, "bench", durable=False)
        sequence.reserve(len(tokens))
        sequence.commit(tokens)
        sequence.release()
        start = time.perf_counter()
        ticket = store.persist(tokens, "bench")
        while not ticket.done:
            store.wait(1.0)
            store.poll()
        seconds.append(time.perf_counter() - start)
        if not ticket.durable:
            raise RuntimeError(ticket.error)
    store.close()
    return seconds[0], seconds[1]


def time_restore(path: Path, tokens: list[int]) -> float:
    """Seconds from open() to a ready sequence in a new store. Segments are read with O_DIRECT, past the page cache."""
    store = new_store(path, -(-len(tokens) // 64))
    start = time.perf_counter()
    sequence = store.open([*tokens, 1], "bench", durable=True)
    while not sequence.ready:
        store.wait(1.0)
        store.poll()
    elapsed = time.perf_counter() - start
    if sequence.restored != len(tokens):
        raise RuntimeError(f"{sequence.restored} of {len(tokens)} tokens restored: {sequence.reset_reason}")
    sequence.release()
    store.close()
    return elapsed


if __name__ == "__main__":
    main()
