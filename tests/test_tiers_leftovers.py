"""Free slots that may hold what a removed page left: which are read, which are known to be blank."""

from __future__ import annotations

from pathlib import Path

import pytest
from atlas_tiers.disk import DiskTier
from atlas_tiers.memory import HUGE_PAGE, address, aligned_buffer
from disk_support import fill, page, payload, survivors, tier


def unknown(opened: DiskTier) -> int:
    return sum(len(opened._space.unknown(number)) for number in opened._space.segments)


def on_disk(directory: Path, number: int) -> bool:
    wanted = bytes(payload(number))
    return any(wanted in file.read_bytes() for file in directory.glob("seg-*.kv"))


def test_what_a_dropped_page_left_is_found_and_overwritten(tmp_path: Path) -> None:
    with tier(tmp_path) as opened:
        fill(opened, range(6))
        assert unknown(opened) == 0, "slots of a new segment are blank"
        opened.drop(page(2).key)
        opened.drop(page(4).key)
        assert opened.scrub([page(2)]) == 1
        assert not on_disk(tmp_path, 2)
        assert on_disk(tmp_path, 4), "not asked for"
        assert unknown(opened) == 1, "page 4's slot is to be read again for another chain"
        assert opened.scrub([page(4)]) == 1
        assert not on_disk(tmp_path, 4)
        assert unknown(opened) == 0
        assert survivors(opened, range(6)) == {0, 1, 3, 5}


def test_a_blank_slot_that_was_used_again_is_read_again(tmp_path: Path) -> None:
    with tier(tmp_path) as opened:
        fill(opened, range(3))
        opened.drop(page(1).key, erase=True)
        assert unknown(opened) == 0, "erased slots are zeros"
        fill(opened, range(7, 8))
        assert opened._index.find(page(7).key).place.slot == 1
        opened.drop(page(7).key)
        assert unknown(opened) == 1
        assert opened.scrub([page(7)]) == 1
        assert not on_disk(tmp_path, 7)


def test_after_opening_every_free_slot_is_read_once(tmp_path: Path) -> None:
    with tier(tmp_path, pages=400) as opened:
        fill(opened, range(150))
        opened.drop(page(70).key)
    with tier(tmp_path, pages=400) as again:
        assert unknown(again) == again._space.free_slots > 0
        assert again.scrub([page(70)]) == 1
        assert not on_disk(tmp_path, 70)
        assert unknown(again) == 0


@pytest.mark.parametrize("size", [1, 5000, HUGE_PAGE // 2, 5 * HUGE_PAGE + 4096])
def test_buffers_are_aligned_and_zero(size: int) -> None:
    buffer = aligned_buffer(size)
    assert len(buffer) == size
    assert address(buffer) % (4096 if size < HUGE_PAGE // 2 else HUGE_PAGE) == 0
    assert bytes(buffer) == bytes(size)
    buffer[-1] = 7
    assert buffer[-1] == 7
