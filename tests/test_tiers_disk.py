"""The disk tier against damage, full disks, caps and neighbours: what is found is right, and the accounts hold."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest
from atlas_tiers.base import KVGroup, PageLayout
from atlas_tiers.errors import StoreLocked
from disk_support import OTHER, SLOT, counts, fill, page, payload, survivors, tier
from tiers_support import LAYOUT, disk_config


def all_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_pages_survive_closing(tmp_path: Path) -> None:
    with tier(tmp_path / "kv") as first:
        fill(first, range(20))
        first.drop(page(3).key)
    with tier(tmp_path / "kv") as second:
        assert survivors(second, range(20)) == set(range(20)) - {3}
        assert counts(second).get("disk_pages_damaged", 0) == 0


def test_directories_and_files_are_private(tmp_path: Path) -> None:
    with tier(tmp_path / "kv") as opened:
        fill(opened, range(3))
        assert_private(tmp_path / "kv")


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_modes_under_any_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with tier(tmp_path / "kv") as opened:
            fill(opened, range(20))
            assert_private(tmp_path / "kv")
    finally:
        os.umask(before)


def test_lax_modes_are_mended(tmp_path: Path) -> None:
    """A directory that was copied or unpacked, and a link in it that is none of ours."""
    with tier(tmp_path / "kv") as opened:
        fill(opened, range(20))
    outside = tmp_path / "outside"
    outside.write_text("not a segment")
    outside.chmod(0o644)
    for entry in [tmp_path / "kv", *(tmp_path / "kv").rglob("*")]:
        entry.chmod(0o777 if entry.is_dir() else 0o666)
    (tmp_path / "kv" / "seg-00000077.kv").symlink_to(outside)
    with tier(tmp_path / "kv") as again:
        assert_private(tmp_path / "kv")
        assert survivors(again, range(20)) == set(range(20))
    assert stat.S_IMODE(outside.stat().st_mode) == 0o644
    shutil.rmtree(tmp_path / "kv" / "index")  # an index that is rebuilt is private as well
    with tier(tmp_path / "kv") as third:
        assert_private(tmp_path / "kv")
        assert survivors(third, range(20)) == set(range(20))


def assert_private(directory: Path) -> None:
    entries = [directory, *directory.rglob("*")]
    assert {entry.name for entry in entries} >= {"lock", "index", "data.mdb", "lock.mdb", "seg-00000001.kv"}
    for entry in entries:
        assert stat.S_IMODE(entry.stat().st_mode) == (0o700 if entry.is_dir() else 0o600), entry


def test_a_second_engine_is_refused(tmp_path: Path) -> None:
    with tier(tmp_path / "kv"), pytest.raises(StoreLocked, match="atlasctl down"), tier(tmp_path / "kv", lock_wait_s=0):
        pass


def test_a_dying_predecessor_is_waited_for(tmp_path: Path) -> None:
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(1, flush=True); time.sleep(0.5)"
    )
    (tmp_path / "kv").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path / "kv" / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with tier(tmp_path / "kv"):
            assert holder.wait() == 0


SLOT_BYTES = {
    "magic": 3,
    "version": 8,
    "kind": 12,
    "count": 14,
    "payload length": 17,
    "parts": 24,
    "reserved": 29,
    "identity": 40,
    "layout": 70,
    "key": 100,
    "parent": 140,
    "tokens": 180,
    "first digest": 416,
    "last digest": 416 + 8 * len(LAYOUT.parts) - 1,
    "header padding": 2000,
    "header checksum": 4090,
    "first payload byte": 4096,
    "payload": 9000,
    "last payload byte": 4096 + LAYOUT.page_bytes - 1,
}


@pytest.mark.parametrize("where", SLOT_BYTES)
def test_a_flipped_bit_is_never_served(tmp_path: Path, where: str) -> None:
    """Flips one bit of that class in each of 8 slots, then reads them all, in the running tier."""
    with tier(tmp_path / "kv") as opened:
        fill(opened, range(8))
        rng = random.Random(where)
        (segment,) = (tmp_path / "kv").glob("seg-*.kv")
        with segment.open("r+b") as file:
            for slot in range(8):
                offset = 4096 + slot * SLOT + SLOT_BYTES[where]
                file.seek(offset)
                old = file.read(1)[0]
                file.seek(offset)
                file.write(bytes([old ^ 1 << rng.randrange(8)]))
        os.sync()
        assert survivors(opened, range(8)) == set()
        assert counts(opened)["disk_pages_damaged"] == 8
        assert survivors(opened, range(8)) == set()
        assert counts(opened)["disk_pages_damaged"] == 8, "a damaged page was tried again"
        fill(opened, range(8))
        assert survivors(opened, range(8)) == set(range(8))


def test_a_page_of_another_session_under_a_right_key(tmp_path: Path) -> None:
    with tier(tmp_path / "kv") as opened:
        fill(opened, range(2))
        (segment,) = (tmp_path / "kv").glob("seg-*.kv")
        data = bytearray(segment.read_bytes())
        first, second = slice(4096, 4096 + SLOT), slice(4096 + SLOT, 4096 + 2 * SLOT)
        data[first], data[second] = data[second], data[first]
        with segment.open("r+b") as file:
            file.write(data)
        os.sync()
        assert survivors(opened, range(2)) == set()


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("keep", [0, 4096, 4096 + 3 * SLOT, 4096 + 3 * SLOT + 5000])
def test_a_truncated_segment_keeps_its_beginning(tmp_path: Path, keep: int, running: bool) -> None:
    whole = max(0, keep - 4096) // SLOT
    with tier(tmp_path / "kv") as opened:
        fill(opened, range(8))
        if running:
            os.truncate(tmp_path / "kv" / "seg-00000001.kv", keep)
            assert survivors(opened, range(8)) == set(range(whole))
            fill(opened, range(8))
            assert survivors(opened, range(8)) == set(range(8))
            return
    os.truncate(tmp_path / "kv" / "seg-00000001.kv", keep)
    with tier(tmp_path / "kv") as again:
        assert survivors(again, range(8)) == set(range(whole))
        assert counts(again)["disk_pages_damaged"] == 8 - whole
        fill(again, range(8))
        assert survivors(again, range(8)) == set(range(8))


def test_a_missing_segment_costs_its_pages(tmp_path: Path) -> None:
    with tier(tmp_path / "kv") as opened:
        fill(opened, range(20))
    (tmp_path / "kv" / "seg-00000001.kv").unlink()
    with tier(tmp_path / "kv") as again:
        left = survivors(again, range(20))
        assert 0 < len(left) < 20
        assert counts(again)["disk_pages_damaged"] == 20 - len(left)


def test_an_unknown_segment_file_is_removed(tmp_path: Path) -> None:
    with tier(tmp_path / "kv") as opened:
        fill(opened, range(2))
    stray = tmp_path / "kv" / "seg-00000099.kv"
    shutil.copy(tmp_path / "kv" / "seg-00000001.kv", stray)
    with tier(tmp_path / "kv") as again:
        assert not stray.exists()
        assert survivors(again, range(2)) == {0, 1}


@pytest.mark.parametrize("harm", ["missing", "empty", "noise", "cut", "text", "lmdb 1.0", "other format", "empty key"])
def test_a_damaged_index_is_rebuilt_from_the_slots(tmp_path: Path, harm: str) -> None:
    with tier(tmp_path / "kv") as opened:
        fill(opened, range(20))
        opened.drop(page(5).key, erase=True)
    index = tmp_path / "kv" / "index"
    spoil(index, harm)
    with tier(tmp_path / "kv") as again:
        assert survivors(again, range(20)) == set(range(20)) - {5}
        assert any("rebuilt" in warning for warning in again._counters.warnings())
    with tier(tmp_path / "kv") as third:
        assert survivors(third, range(20)) == set(range(20)) - {5}
        assert third._counters.warnings() == []


def spoil(index: Path, harm: str) -> None:
    data = index / "data.mdb"
    match harm:
        case "missing":
            shutil.rmtree(index)
        case "empty":
            data.write_bytes(b"")
        case "noise":
            data.write_bytes(random.Random(1).randbytes(data.stat().st_size))
        case "cut":
            os.truncate(data, 5000)
        case "text":
            data.write_text("not an index")
        case "lmdb 1.0":
            shutil.rmtree(index)
            lmdb.open(str(index), lib_version=1).close()
        case "empty key":  # a key length of 0 in a leaf: LMDB can read it and can't delete it
            parts = data.read_bytes().split(page(7).key)
            data.write_bytes(page(7).key.join([*(part[:-2] + bytes(2) for part in parts[:-1]), parts[-1]]))
        case "other format":
            env = lmdb.open(str(index), max_dbs=4, lib_version=0)
            with env.begin(write=True) as txn:
                txn.put(b"format", (7).to_bytes(8, "little"), db=env.open_db(b"meta", txn=txn))
            env.close()


def test_flips_in_the_index_never_lie(tmp_path: Path) -> None:
    """Bits flipped all over the index file: opening it works every time and what is found is right."""
    with tier(tmp_path / "kv") as opened:
        fill(opened, range(40))
    rng = random.Random(7)
    found = 0
    for attempt in range(40):
        copy = tmp_path / f"copy{attempt}"
        shutil.copytree(tmp_path / "kv", copy)
        data = bytearray((copy / "index" / "data.mdb").read_bytes())
        used = len(bytes(data).rstrip(b"\0"))
        data[rng.randrange(used)] ^= 1 << rng.randrange(8)
        (copy / "index" / "data.mdb").write_bytes(data)
        with tier(copy) as again:
            found += len(survivors(again, range(40)))
        shutil.rmtree(copy)
    assert found > 40 * 30


def test_the_cap_counts_every_byte(tmp_path: Path) -> None:
    config = disk_config(tmp_path / "kv", pages=40)
    with tier(tmp_path / "kv", pages=40) as opened:
        for number in range(200):
            assert opened.put(page(number).header, payload(number))
            assert all_bytes(tmp_path / "kv") <= config.cap_bytes
        assert opened.stats().bytes_used == all_bytes(tmp_path / "kv")
        left = survivors(opened, range(200))
        assert left == set(range(200 - len(left), 200))
        assert len(left) >= 30
        assert counts(opened)["disk_pages_evicted"] == 200 - len(left)


def test_a_lowered_cap_is_met_at_start(tmp_path: Path) -> None:
    with tier(tmp_path / "kv", pages=200) as opened:
        fill(opened, range(150))
    small = disk_config(tmp_path / "kv", pages=30)
    with tier(tmp_path / "kv", pages=30) as again:
        assert all_bytes(tmp_path / "kv") <= small.cap_bytes
        left = survivors(again, range(150))
        assert left
        assert min(left) > 75, "the older pages should have gone"


def test_a_cap_too_small_for_anything(tmp_path: Path) -> None:
    with tier(tmp_path / "kv", cap_bytes=300_000) as opened:
        assert not opened.put(page(1).header, payload(1))
        assert opened.last_error == "no room under the disk cap"
        assert counts(opened)["disk_writes_dropped"] == 1


def test_other_models_pages_count_and_go_first(tmp_path: Path) -> None:
    config = disk_config(tmp_path / "kv", pages=60)
    with tier(tmp_path / "kv", identity=OTHER, pages=60) as other:
        fill(other, range(40))
    with tier(tmp_path / "kv", pages=60) as own:
        assert survivors(own, range(40)) == set(), "another model's pages were found"
        assert own.stats().sealed == 40
        fill(own, range(100, 180))
        assert survivors(own, range(100, 180)) == set(range(100, 180)), "own pages went before foreign ones"
        assert all_bytes(tmp_path / "kv") <= config.cap_bytes
    with tier(tmp_path / "kv", identity=OTHER, pages=60) as other:
        assert 0 < len(survivors(other, range(40))) < 40


def test_another_layouts_segments_make_room(tmp_path: Path) -> None:
    wide = PageLayout((KVGroup((0,), 4, 16),), "float32")
    config = disk_config(tmp_path / "kv", pages=40)
    with tier(tmp_path / "kv", identity=OTHER, layout=wide, pages=40) as other:
        for number in range(1000, 1012):
            assert other.put(page(number).header, payload(number, wide.page_bytes))
    with tier(tmp_path / "kv", pages=40) as own:
        fill(own, range(35))
        assert all_bytes(tmp_path / "kv") <= config.cap_bytes
        assert len(survivors(own, range(35))) >= 30


def test_the_floor_stops_growth(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path)
    with tier(tmp_path / "kv", free_floor_bytes=2 * free.f_bavail * free.f_frsize) as opened:
        assert not opened.put(page(1).header, payload(1))
    with tier(tmp_path / "kv") as opened:
        fill(opened, range(8))
    with tier(tmp_path / "kv", free_floor_bytes=2 * free.f_bavail * free.f_frsize) as opened:
        fill(opened, range(8, 16))
        assert survivors(opened, range(16)) == set(range(8, 16)), "in the room it has, the tier goes on"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1.5 MB."""
    path = tmp_path / "small"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", str(path)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a tmpfs takes root")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_drops_writes_and_goes_on(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    with tier(small_disk / "kv") as opened:
        fill(opened, range(8))
        with contextlib.suppress(OSError):
            ballast.write_bytes(bytes(1 << 21))
        stored = [opened.put(page(number).header, payload(number)) for number in range(8, 40)]
        assert all(stored), "slots it has can still be used"
        assert survivors(opened, range(40)) == set(range(32, 40))
        assert any("no room" in warning for warning in opened._counters.warnings())
    with tier(small_disk / "kv") as again:
        assert survivors(again, range(40)) == set(range(32, 40))


def test_a_disk_that_is_full_from_the_start(small_disk: Path) -> None:
    with tier(small_disk / "kv") as opened:
        with contextlib.suppress(OSError):
            (small_disk / "ballast").write_bytes(bytes(1 << 21))
        assert not opened.put(page(1).header, payload(1))
        assert "free-space floor" in opened.last_error
        for _ in range(50):
            assert not opened.put(page(1).header, payload(1))
        assert counts(opened)["disk_write_errors"] == 1, "it must not be tried in a tight loop"
        (small_disk / "ballast").unlink()
        opened._paused_until = opened._grow_after = 0.0  # as if the pause were over
        assert opened.put(page(1).header, payload(1))
        assert survivors(opened, range(2)) == {1}


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes past `size` bytes into any file fail with EFBIG, by the kernel."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_write_errors_lose_only_that_write(tmp_path: Path) -> None:
    """The fifth slot can't be written: what came before it is kept, what comes after it is not tried."""
    with tier(tmp_path / "kv", segment_bytes=64 * SLOT) as opened:
        fill(opened, range(2))
        with file_size_limit(4096 + 4 * SLOT):
            batch = [(page(n), lambda into, n=n: into.__setitem__(slice(None), payload(n))) for n in range(2, 8)]
            done = opened.store(batch)
            assert done.count(False) >= 4
            assert opened.last_error == "File too large"
            assert not opened.put(page(9).header, payload(9)), "tried again at once"
            assert counts(opened)["disk_write_errors"] == 1
        kept = {0, 1, *(n for n, stored in zip(range(2, 8), done, strict=True) if stored)}
        assert survivors(opened, range(10)) == kept
        opened.check()
        opened._paused_until = 0.0  # as if the pause were over
        fill(opened, range(10))
        assert survivors(opened, range(10)) == set(range(10))
    with tier(tmp_path / "kv") as again:
        assert survivors(again, range(10)) == set(range(10))


@pytest.mark.parametrize("pages", [100, 8])
def test_a_disk_that_refuses_writes_keeps_what_it_has(tmp_path: Path, pages: int) -> None:
    """Neither a segment that can't be made nor an eviction that can't be committed costs a page."""
    with tier(tmp_path / "kv", pages=pages) as opened:
        numbers = range(8 * opened._space.new_slots if pages == 8 else 8)
        for number in numbers:
            opened.put(page(number).header, payload(number))
        there = survivors(opened, numbers)
        with file_size_limit(8192):
            for number in range(1000, 1010):
                assert not opened.put(page(number).header, payload(number))
                opened._paused_until = 0.0  # as if the pause were over
            opened.check()
        assert survivors(opened, numbers) == there
        assert counts(opened)["disk_write_errors"] == 10
        opened._paused_until = 0.0
        assert opened.put(page(1000).header, payload(1000))
    with tier(tmp_path / "kv", pages=pages) as again:
        left = survivors(again, numbers)
        assert left == there if pages == 100 else len(there - left) == 1


@pytest.mark.parametrize("erase", [False, True])
def test_a_removal_that_the_index_refuses(tmp_path: Path, erase: bool) -> None:
    """The page is not found any more, its slot is not used again before its record is gone."""
    with tier(tmp_path / "kv", segment_bytes=8 * SLOT) as opened:
        fill(opened, range(8))
        with file_size_limit(8192):
            if erase:
                with pytest.raises(OSError, match="too large"):
                    opened.drop(page(3).key, erase=True)
            else:
                assert opened.drop(page(3).key)
            assert not opened.find(page(3).key)
            opened.check()
            assert opened.stats().open == 1
        fill(opened, range(20, 24))
        assert opened.stats().open == 0
        assert survivors(opened, range(8)) == set(range(8)) - {3}
    with tier(tmp_path / "kv") as again:
        assert survivors(again, range(24)) == {0, 1, 2, 4, 5, 6, 7, 20, 21, 22, 23}


def test_erased_bytes_are_gone(tmp_path: Path) -> None:
    with tier(tmp_path / "kv") as opened:
        fill(opened, range(3))
        opened.drop_all([page(0).key, page(1).key], erase=True)
        data = (tmp_path / "kv" / "seg-00000001.kv").read_bytes()
        index = (tmp_path / "kv" / "index" / "data.mdb").read_bytes()
    assert bytes(payload(0))[:64] not in data
    assert bytes(payload(1))[-64:] not in data
    assert bytes(payload(2))[:64] in data
    assert page(0).packed not in data
    assert page(2).packed in index


def test_the_index_grows_past_its_map(tmp_path: Path) -> None:
    with tier(tmp_path / "kv", pages=3000) as opened:
        for start in range(0, 1500, 250):
            numbers = range(start, start + 250)
            done = opened.store(
                [(page(n), lambda into, n=n: into.__setitem__(slice(None), payload(n))) for n in numbers]
            )
            assert all(done)
    with tier(tmp_path / "kv", pages=3000) as again:
        assert len(survivors(again, range(1500))) == 1500
