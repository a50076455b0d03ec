"""Restore of a session from disk against a raw O_DIRECT sequential read of the same bytes.

    python tests/bench/bench_tiers.py [--tokens 6000] [--directory DIR] [--json FILE]

The page is the bundled model's in float32: 6 layers, 2 KV heads of 64, 6 KiB a token, 384 KiB a page.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from atlas_tiers.base import KVGroup, PageLayout
from atlas_tiers.disk import DiskConfig
from atlas_tiers.store import TieredStore

LAYOUT = PageLayout((KVGroup(tuple(range(6)), 2, 64),), "float32")
BUILD = Path(__file__).parent.parent.parent / "build"
ROUNDS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--directory", type=Path, default=BUILD, help="on the file system to measure")
    parser.add_argument("--json", type=Path, default=BUILD / "bench" / "tiers.json")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        rows = measure(Path(scratch), list(range(1, arguments.tokens + 1)))
    for row in rows:
        against = f"  {row['ratio']:.2f} of {row['against']}" if row["ratio"] else ""
        print(f"{row['name']:<22}{row['value']:>9.2f} {row['unit']}{against}")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def measure(scratch: Path, tokens: list[int]) -> list[dict[str, object]]:
    """Rows for the table: write, restore, and the raw figures of the same bytes."""
    pages = -(-len(tokens) // 64)
    size = pages * LAYOUT.page_bytes
    write_s = time_write(scratch / "kv", tokens)
    raw_write_s, read_raw = raw_file(scratch / "raw", size)
    restore, raw = [], []
    for _ in range(ROUNDS):  # interleaved, so that a change of the machine's load hits both
        restore.append(time_restore(scratch / "kv", tokens))
        raw.append(read_raw())
    restore_s, raw_s = statistics.median(restore), statistics.median(raw)
    return [
        row("tiers.restore_ms", 1e3 * restore_s, "ms", "raw sequential read", raw_s / restore_s),
        row("tiers.restore", size / restore_s / 1e9, "GB/s", "raw sequential read", raw_s / restore_s),
        row("tiers.raw_read", size / raw_s / 1e9, "GB/s", "", None),
        row("tiers.write", size / write_s / 1e9, "GB/s", "raw sequential write", raw_write_s / write_s),
    ]


def row(name: str, value: float, unit: str, against: str, ratio: float | None) -> dict[str, object]:
    """One row of the results. No bar is set here: on a busy machine the ratio says more than the time."""
    command = "python tests/bench/bench_tiers.py"
    names = ("name", "value", "unit", "against", "ratio", "bar", "met", "command")
    return dict(zip(names, (name, value, unit, against, ratio, None, None, command), strict=True))


def new_store(path: Path, pages: int) -> TieredStore:
    config = DiskConfig(path, cap_bytes=4 << 30, free_floor_bytes=0)
    return TieredStore(LAYOUT, b"bench", device_blocks=pages + 4, host_bytes=0, disk=config)


def time_write(path: Path, tokens: list[int]) -> float:
    """Seconds to make a computed session durable. The directory's segments are made beforehand by a first session."""
    store = new_store(path, 2 * len(tokens) // 64 + 4)
    for ids in ([0, *tokens[1:]], tokens):
        sequence = store.open(ids, "bench", durable=False)
        sequence.reserve(len(ids))
        sequence.commit(ids)
        sequence.release()
        start = time.perf_counter()
        ticket = store.persist(ids, "bench")
        while not ticket.done:
            store.wait(1.0)
            store.poll()
        elapsed = time.perf_counter() - start
        if not ticket.durable:
            raise RuntimeError(ticket.error)
    store.close()
    return elapsed


def time_restore(path: Path, tokens: list[int]) -> float:
    """Seconds from open() to a ready sequence in a new store."""
    store = new_store(path, len(tokens) // 64)
    for slab in store.slabs:
        slab.zero_()  # commits the memory: a daemon has done so by the time its model is loaded
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


def raw_file(path: Path, size: int) -> tuple[float, Callable[[], float]]:
    """Writes `size` bytes past the page cache; returns the seconds and a function that reads them back and times it."""
    chunk = 4 << 20
    buffer = mmap.mmap(-1, chunk)
    buffer[:] = os.urandom(chunk)
    offsets = range(0, size, chunk)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    os.posix_fallocate(descriptor, 0, len(offsets) * chunk)
    scale = size / (len(offsets) * chunk)

    def timed(operation: Callable[[int], object]) -> float:
        start = time.perf_counter()
        for offset in offsets:
            operation(offset)
        os.fdatasync(descriptor)
        return (time.perf_counter() - start) * scale

    timed(lambda offset: os.pwritev(descriptor, [buffer], offset))  # the first write also turns the extents into data
    written = timed(lambda offset: os.pwritev(descriptor, [buffer], offset))
    return written, lambda: timed(lambda offset: os.preadv(descriptor, [buffer], offset))


if __name__ == "__main__":
    main()
