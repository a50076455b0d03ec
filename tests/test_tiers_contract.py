"""One conformance suite for every tier (PageTier), run on the device pool, the RAM tier and the disk tier."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from atlas_tiers.base import PageHeader, PageTier
from atlas_tiers.block import BlockPool
from atlas_tiers.counters import Counters
from atlas_tiers.device import DeviceMemory
from atlas_tiers.disk import DiskTier
from atlas_tiers.host import HostTier
from atlas_tiers.keys import PageId, pack
from atlas_tiers.pool import DeviceTier
from tiers_support import LAYOUT, disk_config

ROOT = b"r" * 32
PAGES = 12
Make = Callable[[], PageTier]


@pytest.fixture(params=["device", "host", "disk"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Makes a tier with room for about PAGES pages."""
    made: list[PageTier] = []

    def build() -> PageTier:
        if request.param == "device":
            pool = BlockPool(PAGES, lambda number, page: None)
            made.append(DeviceTier(LAYOUT, pool, DeviceMemory(LAYOUT, PAGES, "cpu")))
        elif request.param == "host":
            made.append(HostTier(LAYOUT, PAGES * LAYOUT.page_bytes, Counters()))
        else:
            cap = disk_config(tmp_path, pages=PAGES).cap_bytes - (1 << 20) + 800_000
            made.append(DiskTier(LAYOUT, b"i" * 32, disk_config(tmp_path / "kv", cap_bytes=cap), Counters()))
        return made[-1]

    yield build
    for tier in made:
        tier.close()


def header(number: int, parent: bytes = ROOT, count: int = 64) -> PageHeader:
    return PageId.of(parent, pack([number, *range(count - 1)])).header


def payload(number: int) -> memoryview:
    return memoryview(bytearray(random.Random(number).randbytes(LAYOUT.page_bytes)))


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
