"""One conformance suite for every tier (PageTier), run on the device pool, the RAM tier and the disk tier."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from atlas_tiers.base import KVGroup, PageHeader, PageLayout, PageTier
from atlas_tiers.block import BlockPool
from atlas_tiers.counters import Counters
from atlas_tiers.device import DeviceMemory
from atlas_tiers.disk import DiskTier
from atlas_tiers.errors import PageDamaged
from atlas_tiers.host import HostTier
from atlas_tiers.keys import PageId, pack
from atlas_tiers.memory import aligned_buffer
from atlas_tiers.pool import DeviceTier
from tiers_support import LAYOUT, disk_config

ROOT = b"r" * 32
PAGES = 12
UNEVEN = PageLayout((KVGroup((0, 2, 3), 1, 3), KVGroup((1,), 1, 5)), "float16")  # parts of 768 and 1280 bytes
ALIGNED = PageLayout((KVGroup((0, 1, 2, 3), 2, 16),), "float16")  # parts of whole sectors
Make = Callable[..., PageTier]


@pytest.fixture(params=["device", "host", "disk"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Makes a tier with room for about PAGES pages."""
    yield from making(request.param, tmp_path)


@pytest.fixture(params=["host", "disk"])
def below(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """The same below the device pool, where pages carry checksums."""
    yield from making(request.param, tmp_path)


def making(name: str, path: Path) -> Iterator[Make]:
    made: list[PageTier] = []

    def build(layout: PageLayout = LAYOUT) -> PageTier:
        if name == "device":
            pool = BlockPool(PAGES, lambda number, page: None)
            made.append(DeviceTier(layout, pool, DeviceMemory(layout, PAGES, "cpu")))
        elif name == "host":
            made.append(HostTier(layout, PAGES * layout.page_bytes, Counters()))
        else:
            cap = disk_config(path, pages=PAGES).cap_bytes - (1 << 20) + 800_000
            made.append(DiskTier(layout, b"i" * 32, disk_config(path / "kv", cap_bytes=cap), Counters()))
        return made[-1]

    yield build
    for tier in made:
        tier.close()


def header(number: int, parent: bytes = ROOT, count: int = 64) -> PageHeader:
    return PageId.of(parent, pack([number, *range(count - 1)])).header


def page(number: int) -> PageId:
    return PageId.from_header(header(number))


def payload(number: int, size: int = LAYOUT.page_bytes) -> memoryview:
    return memoryview(bytearray(random.Random(number).randbytes(size)))


def harm(tier: PageTier, place: int, offset: int) -> None:
    """Flips a bit of the payload in a place, where the tier keeps it."""
    if isinstance(tier, HostTier):
        tier._slab[place * tier.page_bytes + offset] ^= 4
        return
    assert isinstance(tier, DiskTier)
    (path,) = tier._config.path.glob("seg-*.kv")
    with path.open("r+b") as file:
        file.seek(4096 + place * tier._slot_bytes + 4096 + offset)
        old = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([old ^ 4]))
    os.sync()


def read(tier: PageTier, key: bytes) -> tuple[PageHeader | None, bytes]:
    into = memoryview(bytearray(LAYOUT.page_bytes))
    return tier.get(key, into), bytes(into)


def test_a_stored_page_comes_back(make: Make) -> None:
    tier = make()
    page = header(1)
    assert not tier.find(page.key)
    assert read(tier, page.key)[0] is None
    assert tier.put(page, payload(1))
    assert tier.find(page.key)
    assert read(tier, page.key) == (page, bytes(payload(1)))
    tier.check()


def test_the_payload_is_copied(make: Make) -> None:
    tier = make()
    given = payload(1)
    tier.put(header(1), given)
    given[:] = bytes(len(given))
    assert read(tier, header(1).key)[1] == bytes(payload(1))


def test_a_readonly_payload_is_taken(make: Make) -> None:
    tier = make()
    assert tier.put(header(1), memoryview(bytes(payload(1))))
    assert read(tier, header(1).key)[1] == bytes(payload(1))


def test_a_page_is_stored_once(make: Make) -> None:
    tier = make()
    assert tier.put(header(1), payload(1))
    assert tier.put(header(1), payload(2))
    assert read(tier, header(1).key)[1] == bytes(payload(1))
    assert tier.stats().sealed == 1


def test_wrong_size_or_key_is_refused(make: Make) -> None:
    tier = make()
    assert not tier.put(header(1), payload(1)[:-1])
    wrong = PageHeader(header(2).key, ROOT, header(1).tokens)
    assert not tier.put(wrong, payload(1))
    assert tier.stats().sealed == 0
    tier.check()


def test_tails_longest_first(make: Make) -> None:
    tier = make()
    tails = [header(9, count=count) for count in (3, 63, 20)]
    for tail in tails:
        assert tier.put(tail, payload(len(tail.tokens)))
    tier.put(header(9), payload(64))
    tier.put(header(9, parent=b"s" * 32, count=5), payload(5))
    assert [len(tail.tokens) for tail in tier.tails(ROOT)] == [63, 20, 3]
    assert read(tier, tier.tails(ROOT)[1].key) == (tails[2], bytes(payload(20)))
    assert tier.tails(b"t" * 32) == []


@pytest.mark.parametrize("erase", [False, True])
def test_drop(make: Make, erase: bool) -> None:
    tier = make()
    tier.put(header(1), payload(1))
    tier.put(header(2), payload(2))
    assert tier.drop(header(1).key, erase=erase)
    assert not tier.drop(header(1).key, erase=erase)
    assert not tier.find(header(1).key)
    assert read(tier, header(2).key)[1] == bytes(payload(2))
    assert tier.put(header(1), payload(1))
    assert read(tier, header(1).key)[1] == bytes(payload(1))
    tier.check()


def test_the_least_recently_used_goes_first(make: Make) -> None:
    tier = make()
    stored = 0
    while tier.stats().sealed == stored:  # until one more pushes another out
        stored += 1
        assert tier.put(header(stored), payload(stored))
        read(tier, header(1).key)
    assert tier.stats().free == 0
    assert tier.find(header(1).key)
    assert not tier.find(header(2).key)
    assert tier.find(header(stored).key)
    assert tier.stats().bytes_used <= tier.stats().limit_bytes
    tier.check()


def part_bytes(layout: PageLayout, whole: memoryview, first: int, last: int) -> bytes:
    """Independent of PageLayout.parts: the layers' sizes added up."""
    item = {"float32": 4, "float16": 2}[layout.dtype]
    sizes = [2 * g.kv_heads * 64 * g.head_dim * item for g in layout.groups for _ in g.layers]
    return bytes(whole[sum(sizes[:first]) : sum(sizes[:last])])


@pytest.mark.parametrize("layout", [LAYOUT, UNEVEN, ALIGNED], ids=["small", "uneven", "aligned"])
def test_parts(make: Make, layout: PageLayout) -> None:
    """Every range of parts of a pinned page, into buffers that are aligned and buffers that are not."""
    tier = make(layout)
    whole = payload(1, layout.page_bytes)
    tier.put(header(2), payload(2, layout.page_bytes))
    tier.put(header(1), whole)
    entry = tier.pin(page(1))
    count = len(layout.parts)
    for first in range(count):
        for last in range(first + 1, count + 1):
            wanted = part_bytes(layout, whole, first, last)
            for skip in (0, 64):
                into = aligned_buffer(skip + len(wanted))[skip:]
                tier.load_parts(entry, first, last, into)
                assert bytes(into) == wanted
    tier.verify(entry)
    tier.unpin(entry)
    assert part_bytes(layout, whole, 0, count) == whole
    tier.check()


def test_parts_that_do_not_fit_are_refused(make: Make) -> None:
    tier = make()
    tier.put(header(1), payload(1))
    entry = tier.pin(page(1))
    size = LAYOUT.parts[0][1]
    for first, last, room in [(0, 1, size - 1), (0, 1, size + 1), (0, 0, 0), (2, 1, size), (0, 4, size), (-1, 1, size)]:
        with pytest.raises(ValueError, match=r"parts|buffer"):
            tier.load_parts(entry, first, last, memoryview(bytearray(room)))
    tier.verify(entry)
    tier.unpin(entry)


@pytest.mark.parametrize("part", range(len(LAYOUT.parts)))
@pytest.mark.parametrize("how", ["whole", "verify", "parts", "later part"])
def test_a_damaged_part_is_never_handed_out(below: Make, part: int, how: str) -> None:
    """Whichever part differs: whole reads fail, reads of this part fail, and the page is gone after the first that did;
    other parts can be read until then."""
    tier = below()
    tier.put(header(1), payload(1))
    tier.put(header(2), payload(2))
    entry = tier.pin(page(1))
    assert entry is not None
    offset, size = LAYOUT.parts[part]
    into = memoryview(bytearray(size))
    if how == "later part":
        tier.load_parts(entry, part, part + 1, into)
    harm(tier, entry.place if isinstance(tier, HostTier) else entry.place.slot, offset + size - 1)
    for other in set(range(len(LAYOUT.parts))) - {part}:
        aside = memoryview(bytearray(LAYOUT.parts[other][1]))
        tier.load_parts(entry, other, other + 1, aside)
        assert aside == part_bytes(LAYOUT, payload(1), other, other + 1)
    if how == "whole":
        assert read(tier, header(1).key)[0] is None
    else:
        with pytest.raises(PageDamaged):
            tier.verify(entry) if how == "verify" else tier.load_parts(entry, part, part + 1, into)
    assert not tier.find(header(1).key)
    tier.unpin(entry)
    assert read(tier, header(2).key)[1] == bytes(payload(2))
    tier.check()
    assert tier.stats().open == 0
    assert tier.put(header(1), payload(1))
    assert read(tier, header(1).key)[1] == bytes(payload(1))


def test_parts_while_pages_come_and_go(make: Make) -> None:
    """Readers of parts against evictions, drops and purges of the same pages: what arrives is right or refused."""
    tier = make()
    wrong: list[str] = []
    arrived: list[int] = []
    stop = threading.Event()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            number = rng.randrange(20)
            entry = tier.pin(page(number))
            if entry is None:
                continue
            for first in range(len(LAYOUT.parts)):
                into = aligned_buffer(LAYOUT.parts[first][1])
                try:
                    tier.load_parts(entry, first, first + 1, into)
                except PageDamaged:
                    if not entry.gone:
                        wrong.append(f"page {number} was refused")
                    continue
                arrived.append(number)
                if into != part_bytes(LAYOUT, payload(number), first, first + 1):
                    wrong.append(f"part {first} of page {number}")
            tier.unpin(entry)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    rng = random.Random(9)
    end = time.monotonic() + 60
    turn = 0
    while turn < 400 or (len(arrived) <= 100 and time.monotonic() < end):  # on a busy machine readers come late
        number = rng.randrange(20)
        if turn % 4 < 3:
            tier.put(header(number), payload(number))
        else:
            tier.drop(header(number).key, erase=turn % 8 == 7)
        turn += 1
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(arrived) > 100
    tier.check()
    assert tier.stats().open == 0


def test_bytes_and_time_are_counted() -> None:
    counters = Counters()
    tier = HostTier(LAYOUT, PAGES * LAYOUT.page_bytes, counters)
    for number in range(3):
        tier.put(header(number), payload(number))
    read(tier, header(1).key)
    entry = tier.pin(page(2))
    assert entry is not None
    tier.load_parts(entry, 0, 1, memoryview(bytearray(LAYOUT.parts[0][1])))
    counts = counters.counts()
    assert counts["host_bytes_written"] == 3 * LAYOUT.page_bytes
    assert counts["host_bytes_read"] == LAYOUT.page_bytes + LAYOUT.parts[0][1]
    assert counts["host_write_us"] > 0
    assert counts["host_read_us"] > 0


def test_a_part_in_place() -> None:
    """Host only: the bytes themselves, nothing copied."""
    tier = HostTier(LAYOUT, PAGES * LAYOUT.page_bytes, Counters())
    tier.put(header(1), payload(1))
    entry = tier.pin(page(1))
    assert entry is not None
    for part in range(len(LAYOUT.parts)):
        view = tier.view(entry, part)
        assert view == part_bytes(LAYOUT, payload(1), part, part + 1)
        assert view.obj is tier._slab.obj
    with pytest.raises(ValueError, match="parts 3 to 4"):
        tier.view(entry, 3)
    tier.unpin(entry)


def test_the_end_of_a_chain_goes_before_its_beginning(make: Make) -> None:
    """Even when the beginning was not used for longer: later pages are of no use without it."""
    tier = make()
    chain = [header(1)]
    while len(chain) < 4:
        chain.append(header(1, parent=chain[-1].key))
    for page in chain:
        assert tier.put(page, payload(1))
        read(tier, page.key)
    left, other = [True] * len(chain), 100
    while any(left):
        assert tier.put(header(other), payload(1))
        read(tier, header(other).key)
        other += 1
        left = [tier.find(page.key) for page in chain]
        assert left == sorted(left, reverse=True)
        assert other < 200
    tier.check()


def test_many_threads(make: Make) -> None:
    """Readers, writers and droppers at once: what is read is right, and the accounts hold."""
    tier = make()
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(150):
            number = rng.randrange(30)
            action = rng.random()
            if action < 0.4:
                tier.put(header(number), payload(number))
            elif action < 0.9:
                found, data = read(tier, header(number).key)
                if found is not None and (found, data) != (header(number), bytes(payload(number))):
                    wrong.append(f"page {number}")
            else:
                tier.drop(header(number).key, erase=rng.random() < 0.5)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    tier.check()
    stats = tier.stats()
    assert stats.free + stats.open + stats.sealed == stats.total
    assert stats.open == 0
