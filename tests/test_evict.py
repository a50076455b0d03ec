"""Order of eviction against a plain search over all pages that says the same in a few slow lines."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from atlas_tiers.evict import (
    APART,
    MOST_USES,
    POLICIES,
    EvictionOrder,
    Gdsf,
    Lru,
    Uses,
    depths,
    make_policy,
    relative_cost,
)
from atlas_tiers.keys import PageId, pack
from tiers_support import disk_config, opened, some_tokens, store, turn

ROOT = b"r" * 32


def page(number: int, parent: PageId | None = None, count: int = 64) -> PageId:
    before = (parent.key, parent.depth + 1) if parent else (ROOT, 0)
    return PageId.of(before[0], pack([number, *range(count - 1)]), before[1])


def a_chain(number: int, length: int) -> list[PageId]:
    pages = [page(number)]
    while len(pages) < length:
        pages.append(page(number, pages[-1]))
    return pages


class Plain:
    """The definition: of the pages that no member follows, the least worthy, then the one not used for longest."""

    def __init__(self, name: str, uses: Uses) -> None:
        self.name, self.uses = name, uses
        self.clock, self.tick = 0.0, 0
        self.members: dict[bytes, tuple[float, int, PageId]] = {}

    def use(self, page: PageId) -> None:
        self.tick += 1
        worth = self.clock + self.uses.count(page.key) * relative_cost(page) if self.name == "gdsf" else 0.0
        self.members[page.key] = (max(worth, self.members.get(page.key, (0.0,))[0]), self.tick, page)

    def evict(self, held: set[bytes]) -> bytes | None:
        followed = {page.parent for _, _, page in self.members.values()}
        ends = [entry for key, entry in self.members.items() if key not in followed and key not in held]
        if not ends:
            return None
        worth, _, page = min(ends, key=lambda entry: entry[:2])
        self.clock = max(self.clock, worth)
        del self.members[page.key]
        return page.key


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", range(5))
def test_same_as_the_plain_search(name: str, seed: int) -> None:
    rng, uses = random.Random(seed), Uses()
    order, plain = EvictionOrder(make_policy(name, uses, relative_cost)), Plain(name, uses)
    known: list[PageId] = []
    for step in range(1500):
        roll = rng.random()
        if roll < 0.4 or not known:
            new = page(step, rng.choice(known) if known and rng.random() < 0.8 else None, rng.choice([64, 64, 5]))
            known.append(new)
            order.add(new)
            plain.use(new)
        elif roll < 0.7:
            used = rng.choice(known)
            uses.add([used.key])
            order.use(used.key)
            plain.use(used)
        elif roll < 0.75:  # dropped, wherever in its chain
            dropped = known.pop(rng.randrange(len(known)))
            order.remove(dropped.key)
            del plain.members[dropped.key]
        else:
            held = {p.key for p in known if rng.random() < 0.2}
            wanted = plain.evict(held)
            if wanted is None:
                continue
            assert order.victims(1, held.__contains__) == [wanted]
            order.remove(wanted)
            known = [p for p in known if p.key != wanted]
        order.check()
        assert len(order) == len(plain.members)


@pytest.mark.parametrize("name", POLICIES)
def test_a_chain_goes_from_its_end(name: str) -> None:
    uses = Uses()
    order = EvictionOrder(make_policy(name, uses, relative_cost))
    for pages in zip(a_chain(1, 20), a_chain(2, 20), strict=True):
        for member in pages:
            order.add(member)
            uses.add([member.key])
    for member in a_chain(1, 20):  # the beginning is used first, so its end last
        order.use(member.key)
    gone = order.victims(40, lambda key: False)
    for number in (1, 2):
        keys = [member.key for member in a_chain(number, 20)]
        assert [key for key in gone if key in keys] == keys[::-1]


def test_several_victims_are_those_of_one_after_the_other() -> None:
    one, several = EvictionOrder(Lru()), EvictionOrder(Lru())
    for order in (one, several):
        for member in [*a_chain(1, 5), *a_chain(2, 5), page(3)]:
            order.add(member)
    expected = []
    for _ in range(9):
        (key,) = one.victims(1, lambda key: False)
        one.remove(key)
        expected.append(key)
    assert several.victims(9, lambda key: False) == expected
    several.check()
    assert len(several) == 11, "who asks removes"
    assert several.victims(99, lambda key: False)[:9] == expected


def test_held_pages_are_passed_over() -> None:
    order = EvictionOrder(Lru())
    chain = a_chain(1, 3)
    for member in [*chain, page(2)]:
        order.add(member)
    held = {chain[2].key}
    assert order.victims(1, held.__contains__) == [page(2).key]
    order.remove(page(2).key)
    assert order.victims(1, held.__contains__) == [chain[1].key], "nothing else is left"
    assert order.victims(5, held.__contains__) == [chain[1].key, chain[0].key]
    assert order.victims(1, lambda key: True) == []
    order.check()


def test_gdsf_keeps_what_is_expensive_or_used_often() -> None:
    uses = Uses()
    order = EvictionOrder(Gdsf(uses, relative_cost))
    deep, shallow, often = page(1).key, page(2), page(3)
    session = PageId.of(deep, pack(range(64)), 400)
    uses.add([often.key])
    for member in (session, often, shallow):
        order.add(member)
    assert order.victims(3, lambda key: False) == [shallow.key, often.key, session.key]


def test_gdsf_forgets_what_nobody_uses_any_more() -> None:
    uses = Uses()
    order = EvictionOrder(Gdsf(uses, relative_cost))
    old = page(0)
    for _ in range(MOST_USES * APART):
        uses.add([old.key])
    order.add(old)
    for number in range(1, 2000):
        order.add(page(number))
        if number > 50:
            (victim,) = order.victims(1, lambda key: False)
            order.remove(victim)
            if victim == old.key:
                break
    assert old.key not in order
    assert number > 500, "as soon as a page that was used once"


@pytest.mark.parametrize("name", POLICIES)
def test_work_grows_with_the_logarithm(name: str) -> None:
    """Comparisons and looks at pages for one eviction among 1,000 and among 100,000 pages in chains."""
    counted = 0

    class Worth(float):
        def __lt__(self, other: float) -> bool:
            nonlocal counted
            counted += 1
            return float.__lt__(self, other)

        def __eq__(self, other: object) -> bool:
            nonlocal counted
            counted += 1
            return float.__eq__(self, other)

        __hash__ = float.__hash__

    class Counting:
        def __init__(self) -> None:
            self.inner = make_policy(name, Uses(), relative_cost)
            self.chained = True

        def worth(self, page: PageId) -> float:
            return Worth(self.inner.worth(page))

        def evicted(self, worth: float) -> None:
            self.inner.evicted(float(worth))

    def look(key: bytes) -> bool:
        nonlocal counted
        counted += 1
        return False

    for size in (1_000, 100_000):
        order, rng = EvictionOrder(Counting()), random.Random(size)
        pages: list[PageId] = []
        for number in range(size):
            pages.append(page(number, pages[-1] if number % 50 else None))
            order.add(pages[-1])
        for used in rng.sample(pages, size // 2):
            order.use(used.key)
        counted, rounds = 0, size // 4
        for number in range(rounds):
            (key,) = order.victims(1, look)
            order.remove(key)
            order.add(page(size + number))
        assert counted / rounds < 10 * math.log2(size), f"{counted / rounds:.0f} steps a page among {size}"


def test_uses_are_bounded() -> None:
    uses = Uses(limit=10)
    for _ in range(APART):
        uses.add([b"often"])
    assert uses.count(b"often") == 2, "a burst is one use"
    for _ in range(MOST_USES * APART):
        uses.add([b"often"])
    assert uses.count(b"often") == MOST_USES
    assert uses.count(b"never") == 1
    for number in range(200):
        uses.add([bytes([number])])
    assert len(uses._counts) <= 10
    assert uses.count(b"often") < MOST_USES


def test_depths() -> None:
    chain = a_chain(1, 6)
    random.Random(1).shuffle(chain)
    assert depths({p.key: p.parent for p in chain}) == {p.key: p.depth for p in chain}
    found = depths({p.key: p.parent for p in chain if p.depth != 2})
    assert [found[p.key] for p in sorted(chain, key=lambda p: p.depth) if p.depth != 2] == [0, 1, 0, 1, 2]
    assert set(depths({b"a": b"b", b"b": b"a"})) == {b"a", b"b"}


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="not one of lru, gdsf"):
        make_policy("fifo", Uses(), relative_cost)


def test_depths_are_known_after_a_restart(tmp_path: Path) -> None:
    text = some_tokens(700)
    first = store(tmp_path)
    turn(first, text)
    wanted = {p.key: p.depth for p in first._chain(text, "ann")}
    first.close()
    again = store(tmp_path)
    assert {entry.page.key: entry.page.depth for entry in again._disk._index} == wanted
    assert max(wanted.values()) == 10
    again.close()


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_left_of_a_session_is_its_beginning(tmp_path: Path, name: str) -> None:
    """In the device pool and on disk, after others pushed a part of it out; RAM holds what left the device pool."""
    tiered = store(tmp_path, blocks=14, host_pages=16, disk=disk_config(tmp_path, pages=24), policy=name)
    text = some_tokens(10 * 64)
    turn(tiered, text)
    keys = [p.key for p in tiered._chain(text, "ann")]
    for seed in range(1, 5):
        turn(tiered, some_tokens(5 * 64, seed=seed))
        for tier in (tiered._device, tiered._disk):
            there = [tier.find(key) for key in keys]
            assert there == sorted(there, reverse=True)
    opened(tiered, text).release()
    tiered.check()
    tiered.close()
