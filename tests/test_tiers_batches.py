"""Several pages or parts of pages at once on the disk tier: each has an outcome of its own."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path

import pytest
from atlas_tiers.errors import PageDamaged
from disk_support import SLOT, counts, fill, page, payload, survivors, tier
from tiers_support import LAYOUT


def test_neighbours_are_read_together(tmp_path: Path) -> None:
    """Pages side by side and apart, one damaged, one whose sink fails: each has its own outcome."""
    with tier(tmp_path / "kv", segment_bytes=16 * SLOT) as opened:
        fill(opened, range(14))
        opened.drop(page(5).key)
        (segment,) = (tmp_path / "kv").glob("seg-*.kv")
        with segment.open("r+b") as file:
            file.seek(4096 + 8 * SLOT + 6000)
            file.write(b"damage")
        os.sync()
        found: dict[int, bytes] = {}

        def sink(number: int, data: memoryview) -> None:
            if number == 2:
                raise RuntimeError("no room on the device")
            found[number] = bytes(data)

        numbers = [n for n in range(14) if n != 5]
        entries = [opened.pin(page(n)) for n in numbers]
        wanted = [(e, functools.partial(sink, n)) for e, n in zip(entries, numbers, strict=True) if e is not None]
        outcomes = dict(zip(numbers, opened.load_all(wanted), strict=True))
        for entry, _ in wanted:
            opened.unpin(entry)
        assert isinstance(outcomes.pop(8), PageDamaged)
        assert str(outcomes.pop(2)) == "no room on the device"
        assert set(outcomes.values()) == {None}
        assert found == {n: bytes(payload(n)) for n in outcomes}
        assert survivors(opened, range(14)) == set(range(14)) - {5, 8}


def test_neighbours_beyond_the_end_of_the_file(tmp_path: Path) -> None:
    with tier(tmp_path / "kv") as opened:
        fill(opened, range(8))
        entries = [entry for n in range(8) if (entry := opened.pin(page(n))) is not None]
        os.truncate(tmp_path / "kv" / "seg-00000001.kv", 4096 + 5 * SLOT + 5000)
        outcomes = opened.load_all([(entry, lambda data: None) for entry in entries])
        for entry in entries:
            opened.unpin(entry)
        assert [outcome is None for outcome in outcomes] == [True] * 5 + [False] * 3
        assert counts(opened)["disk_pages_damaged"] == 3


def test_parts_beyond_the_end_of_the_file(tmp_path: Path) -> None:
    with tier(tmp_path / "kv") as opened:
        fill(opened, range(2))
        entry = opened.pin(page(1))
        assert entry is not None
        into = memoryview(bytearray(LAYOUT.parts[0][1]))
        os.truncate(tmp_path / "kv" / "seg-00000001.kv", 4096 + SLOT + 4096 + len(into))
        opened.load_parts(entry, 0, 1, into)
        assert into == payload(1)[: len(into)]
        with pytest.raises(PageDamaged):
            opened.load_parts(entry, 2, 3, memoryview(bytearray(LAYOUT.parts[2][1])))
        opened.unpin(entry)
        assert survivors(opened, range(2)) == {0}


def test_a_batch_goes_on_without_a_damaged_source(tmp_path: Path) -> None:
    """A page that turns out to be bad in RAM is left out; those around it are stored, and nothing of it is found."""

    def damaged(into: memoryview) -> None:
        into[:] = bytes(len(into))
        raise PageDamaged("page damaged in RAM")

    with tier(tmp_path / "kv", segment_bytes=16 * SLOT) as opened:
        batch = [(page(n), lambda into, n=n: into.__setitem__(slice(None), payload(n))) for n in range(10)]
        batch[4] = (page(4), damaged)
        assert opened.store(batch) == [n != 4 for n in range(10)]
        assert survivors(opened, range(10)) == set(range(10)) - {4}
        opened.check()
    shutil.rmtree(tmp_path / "kv" / "index")
    with tier(tmp_path / "kv") as again:
        assert survivors(again, range(10)) == set(range(10)) - {4}
        assert counts(again)["disk_pages_damaged"] == 0, "its slot had a header"
