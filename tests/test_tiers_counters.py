"""What the tiers count: bytes, the time that moving them took, bytes of today."""

from __future__ import annotations

import struct
import threading
import time
from pathlib import Path

import lmdb
from atlas_tiers.counters import Counters, DailyBytes, Meter
from disk_support import SLOT, counts, fill, page, survivors, tier
from tiers_support import LAYOUT


def test_bytes_and_times_are_counted(tmp_path: Path) -> None:
    slots = SLOT * 8
    start = time.perf_counter()
    with tier(tmp_path / "kv") as opened:
        fill(opened, range(8))
        first = counts(opened)
        assert first["disk_bytes_written"] == first["disk_bytes_written_today"] == slots
        assert survivors(opened, range(8)) == set(range(8))
        entry = opened.pin(page(1))
        assert entry is not None
        for part in (0, 1):
            opened.load_parts(entry, part, part + 1, memoryview(bytearray(LAYOUT.parts[part][1])))
        opened.unpin(entry)
        last = counts(opened)
        assert last["disk_bytes_read"] == slots + 4096 + sum(size for _, size in LAYOUT.parts[:2])
        passed_us = 1e6 * (time.perf_counter() - start)
        assert 0 < last["disk_read_us"] < passed_us
        assert 0 < last["disk_write_us"] < passed_us


def test_bytes_of_today_survive_and_end_with_the_day(tmp_path: Path) -> None:
    with tier(tmp_path / "kv") as opened:
        fill(opened, range(3))
        assert counts(opened)["disk_bytes_written_today"] == 3 * SLOT
        opened.drop(page(0).key, erase=True)  # zeros are written as well
    with tier(tmp_path / "kv") as again:
        assert counts(again)["disk_bytes_written_today"] == 4 * SLOT
        assert "disk_bytes_written" not in counts(again)
        fill(again, range(5, 7))
        assert counts(again)["disk_bytes_written_today"] == 6 * SLOT
    env = lmdb.open(str(tmp_path / "kv" / "index"), max_dbs=4, lib_version=0)
    with env.begin(write=True) as txn:
        meta = env.open_db(b"meta", txn=txn)
        day, written = struct.unpack("<QQ", txn.get(b"written", db=meta))
        assert (day, written) == (int(time.time() // 86400), 6 * SLOT)
        txn.put(b"written", struct.pack("<QQ", day - 1, written), db=meta)
    env.close()
    with tier(tmp_path / "kv") as next_day:
        assert counts(next_day)["disk_bytes_written_today"] == 0
        fill(next_day, range(20, 21))
        assert counts(next_day)["disk_bytes_written_today"] == SLOT


def test_a_day_passes_while_running() -> None:
    now = 10.5 * 86400
    written = DailyBytes(10, 100, lambda: now)
    written.add(20)
    assert (written.today(), written.record()) == (120, (10, 120))
    now += 86400
    assert (written.today(), written.record()) == (0, (11, 0))
    written.add(7)
    assert written.record() == (11, 7)


def test_a_meter_counts_overlapping_work_once() -> None:
    """Three threads inside for as long as each other: the time counted is that of one."""
    counters = Counters()
    meter = Meter(counters, "work_us")
    together = threading.Barrier(3)

    def work() -> None:
        with meter:
            together.wait()
            time.sleep(0.05)
            together.wait()

    start = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    passed_us = 1e6 * (time.perf_counter() - start)
    assert 49_000 < counters.counts()["work_us"] <= passed_us
    time.sleep(0.01)  # nobody inside
    before = counters.counts()["work_us"]
    with meter:
        pass
    assert counters.counts()["work_us"] < before + 10_000
