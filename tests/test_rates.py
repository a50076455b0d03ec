"""Load or recompute: estimates against scripted times, the choice against trying every number of pages, and a store
whose disk really is slow."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from atlas_tiers.catalog import Sink
from atlas_tiers.disk import DiskTier
from atlas_tiers.index import Entry
from atlas_tiers.rates import OUTLIER, PROBE_PAGES, STALE_S, Choice, PrefillRate, Rates, cheapest
from atlas_tiers.segment import Place
from atlas_tiers.space import DiskConfig
from atlas_tiers.store import TieredStore
from tiers_support import IDENTITY, LAYOUT, assert_content, disk_config, opened, settled, some_tokens, turn, write

SIZE = 1000


class Clock:
    """Stands still unless told to go on."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def read(rates: Rates, clock: Clock, seconds: float, *, pages: int = 1, tier: str = "disk") -> None:
    for _ in range(pages):
        with rates.restoring(tier, SIZE):
            clock.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rates(clock: Clock) -> Rates:
    return Rates(clock)


def test_nothing_is_known_at_first(rates: Rates, clock: Clock) -> None:
    assert rates.restore_s("disk", SIZE) is None
    read(rates, clock, 1.0, pages=3)
    assert rates.restore_s("disk", SIZE) is None
    read(rates, clock, 1.0)
    assert rates.restore_s("disk", SIZE) == pytest.approx(1.0)
    assert rates.restore_s("disk", 3 * SIZE) == pytest.approx(3.0)
    assert rates.restore_s("host", SIZE) is None


def test_reads_side_by_side_are_not_counted_twice(rates: Rates, clock: Clock) -> None:
    """Three at a time, three seconds each: a page a second."""
    for _ in range(10):
        with rates.restoring("disk", SIZE), rates.restoring("disk", SIZE), rates.restoring("disk", SIZE):
            clock.now += 3.0
    assert rates.restore_s("disk", SIZE) == pytest.approx(1.0, abs=0.1)


def test_time_between_reads_does_not_count(rates: Rates, clock: Clock) -> None:
    for _ in range(10):
        read(rates, clock, 1.0)
        clock.now += 20.0
    assert rates.restore_s("disk", SIZE) == pytest.approx(1.0)


def test_a_failed_read_counts_for_nothing(rates: Rates, clock: Clock) -> None:
    read(rates, clock, 1.0, pages=10)

    def fail() -> None:
        with rates.restoring("disk", SIZE):
            clock.now += 100.0
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fail()
    read(rates, clock, 1.0)
    assert rates.restore_s("disk", SIZE) == pytest.approx(1.0)


def test_one_hiccup_decides_nothing_and_a_slower_disk_is_noticed(rates: Rates, clock: Clock) -> None:
    read(rates, clock, 1.0, pages=100)
    read(rates, clock, 1e6)
    assert rates.restore_s("disk", SIZE) < 1 + OUTLIER / 16
    read(rates, clock, 1.0, pages=100)
    assert rates.restore_s("disk", SIZE) == pytest.approx(1.0, abs=0.05)
    read(rates, clock, 50.0, pages=60)
    assert rates.restore_s("disk", SIZE) > 30


def test_threads_measure_one_rate(clock: Clock) -> None:
    """Real sleeps in four threads at once: wall time is what counts."""
    rates = Rates(time.monotonic)

    def work() -> None:
        for _ in range(10):
            with rates.restoring("disk", SIZE):
                time.sleep(0.01)

    threads = [threading.Thread(target=work) for _ in range(4)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.0025 * 0.5 < rates.restore_s("disk", SIZE) <= (time.monotonic() - start) / 40 * 2


@pytest.mark.parametrize("slope", [0.0, 1e-6, 4e-6])
def test_prefill_is_a_line_over_positions(slope: float) -> None:
    prefill = PrefillRate()
    draw = random.Random(1)
    for _ in range(40):
        position, tokens = draw.randrange(0, 8000, 64), draw.choice([64, 200, 512])
        true = tokens * (0.001 + slope * (position + tokens / 2))
        prefill.note(tokens, position, true * draw.uniform(0.95, 1.05))
    assert prefill.seconds(0, 1000) == pytest.approx(1 + slope * 500_000, rel=0.15)
    assert prefill.seconds(4000, 6000) == pytest.approx(2 * (1 + slope * 5_000_000), rel=0.1)


def test_prefill_at_one_position_only(rates: Rates) -> None:
    """No line can be fitted: later positions are taken to cost more, not less."""
    assert not rates.prefill.known
    for _ in range(4):
        rates.prefill.note(100, 0, 0.1)
    assert rates.prefill.seconds(0, 100) == pytest.approx(0.1)
    assert 0.1 < rates.prefill.seconds(4000, 4100) < 0.3
    for _ in range(20):
        rates.prefill.note(100, 1000, 0.01)  # a line would fall
    assert rates.prefill.seconds(8000, 8100) > 0


def test_a_stalled_pass_decides_nothing(rates: Rates) -> None:
    for _ in range(20):
        rates.prefill.note(512, 0, 0.5)
    rates.prefill.note(512, 0, 500.0)
    assert rates.prefill.seconds(0, 512) < 0.8


def test_the_choice_is_the_best_of_all() -> None:
    draw = random.Random(3)
    for _ in range(300):
        count = draw.randrange(0, 12)
        tokens = [64] * count
        costs = [draw.choice([0.0, draw.uniform(0, 2), draw.uniform(0, 0.3)]) for _ in range(count)]
        a, b = draw.uniform(0, 0.02), draw.choice([0.0, draw.uniform(0, 0.0001)])

        def compute_s(first: int, last: int, a: float = a, b: float = b) -> float:
            return sum(a + b * position for position in range(first, last))

        times = [sum(costs[:n]) + compute_s(64 * n, 64 * count) for n in range(count + 1)]
        choice = cheapest(costs, tokens, compute_s)
        assert times[choice.pages] == pytest.approx(min(times))
        assert times[choice.pages] <= times[count] + 1e-9, "slower than reusing all"
        assert times[choice.pages] <= times[0] + 1e-9, "slower than computing all"
        if choice.pages < count:
            assert choice.restore_s >= choice.compute_s


def test_of_equals_pages_are_used() -> None:
    assert cheapest([1.0, 1.0], [64, 64], lambda first, last: (last - first) / 64).pages == 2
    assert cheapest([], [], lambda first, last: 0.0) == Choice(0)


def test_what_is_not_known_is_used(rates: Rates, clock: Clock) -> None:
    pages = [("disk", 64)] * 10
    read(rates, clock, 10.0, pages=10)
    assert rates.choose(pages, SIZE).pages == 10, "how fast computing is, is not known"
    for _ in range(10):
        rates.prefill.note(64, 0, 0.064)
    assert rates.choose(pages, SIZE).pages == 0
    assert rates.choose([("host", 64)] * 10, SIZE).pages == 10
    assert rates.choose([("device", 64)] * 4 + pages, SIZE).pages == 4
    assert rates.choose([("disk", 64)] + [("device", 64)] * 200, SIZE).pages == 201, "what follows is worth the wait"


def test_late_pages_are_read_where_early_ones_are_computed(rates: Rates, clock: Clock) -> None:
    """Attention makes the long prefix dear to compute."""
    read(rates, clock, 0.1, pages=10)
    for position in range(0, 8000, 500):
        rates.prefill.note(500, position, 500 * (0.001 + 1e-6 * (position + 250)))
    assert rates.choose([("disk", 64)] * 5, SIZE).pages == 0
    assert rates.choose([("disk", 64)] * 100, SIZE).pages == 100


def test_a_bad_rate_is_put_to_the_test(rates: Rates, clock: Clock) -> None:
    """A disk that was a hundred times too slow is used again within minutes, at the price of a few pages."""
    pages = [("disk", 64)] * 40
    for _ in range(10):
        rates.prefill.note(64, 0, 0.64)
    read(rates, clock, 10.0, pages=100)
    assert rates.choose(pages, SIZE).pages == 0, "just measured"
    probes = 0
    while (used := rates.choose(pages, SIZE).pages) < 40:
        assert used in (0, PROBE_PAGES)
        probes += used > 0
        assert rates.choose(pages, SIZE).pages == 0, "a second probe while the first is under way"
        read(rates, clock, 0.1, pages=used)
        clock.now += STALE_S / 2 + 1
        assert probes < 8
    assert probes > 0


# --- a real store ----------------------------------------------------------------------------------


class SlowDisk(DiskTier):
    """Takes its time to read."""

    delay_s = 0.0

    def load(self, entry: Entry[Place], sink: Sink) -> None:
        time.sleep(self.delay_s)
        super().load(entry, sink)

    def load_all(self, wanted: Sequence[tuple[Entry[Place], Sink]]) -> list[Exception | None]:
        time.sleep(self.delay_s * len(wanted))
        return super().load_all(wanted)


class SlowStore(TieredStore):
    def _open_disk(self, config: DiskConfig | None) -> DiskTier | None:
        assert config is not None
        self.slow = SlowDisk(self.layout, self._identity, config, self._counters)
        return self.slow


TEXTS = [some_tokens(700, seed) for seed in range(4)]


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[SlowStore]:
    """With four sessions of 700 tokens on its disk."""
    made = SlowStore(LAYOUT, IDENTITY, device_blocks=26, host_bytes=0, disk=disk_config(tmp_path))
    for text in TEXTS:
        assert turn(made, text).durable
    made.close()
    made = SlowStore(LAYOUT, IDENTITY, device_blocks=26, host_bytes=0, disk=disk_config(tmp_path))
    yield made
    made.check()
    made.close()


def compute_quickly(tiered: TieredStore, seconds: float) -> None:
    """As if the engine had computed prompts of 512 tokens in so long."""
    for _ in range(4):
        tiered.note_prefill(512, 0, seconds)


def test_a_fast_disk_is_read(slow: SlowStore) -> None:
    compute_quickly(slow, 10.0)
    for text in TEXTS:
        sequence = opened(slow, [*text, 1])
        assert (sequence.restored, sequence.reset_reason) == (700, "")
        sequence.release()


def test_a_slow_disk_is_not_read_when_computing_is_faster(slow: SlowStore) -> None:
    """The first session is read, as nothing is known yet; then the choice flips. Its pages are right all the same, and
    durable without being written again."""
    slow.slow.delay_s = 0.03
    compute_quickly(slow, 0.005)
    opened(slow, [*TEXTS[0], 1]).release()
    assert slow.counters()["disk_pages_read"] == 11
    sequence = opened(slow, [*TEXTS[1], 1])
    assert sequence.length == 0
    assert sequence.reset_reason.startswith("recomputing from token 0 was faster: about 0.0")
    assert sequence.reset_reason.endswith(" s to read 11 pages")
    assert slow.counters()["disk_pages_read"] == 11
    assert slow.counters()["disk_hit_pages"] == 22
    whole = [*TEXTS[1], *some_tokens(50, 9)]
    write(slow, sequence, whole, "ann")
    assert_content(slow, sequence, whole, "ann")
    assert settled(slow, sequence.persist()).durable
    assert slow.counters()["disk_pages_written"] == 2, "more than the page that was a tail and the new tail"
    sequence.release()
    opened(slow, whole).release()
    assert slow.counters()["disk_pages_read"] == 11


def test_what_the_device_pool_has_is_used_before_a_slow_disk(slow: SlowStore) -> None:
    compute_quickly(slow, 0.005)
    slow.slow.delay_s = 0.03
    opened(slow, [*TEXTS[0], 1]).release()
    part = opened(slow, TEXTS[1][:64])  # computed: the disk is too slow already
    write(slow, part, TEXTS[1][:129], "ann")
    part.release()
    sequence = opened(slow, [*TEXTS[1], 1])
    assert (sequence.reused, sequence.restored) == (128, 0)
    assert "recomputing from token 128 was faster" in sequence.reset_reason
    write(slow, sequence, [*TEXTS[1], 1], "ann")
    assert_content(slow, sequence, [*TEXTS[1], 1], "ann")
    sequence.release()


def test_slow_computing_makes_a_slow_disk_worth_it(slow: SlowStore) -> None:
    slow.slow.delay_s = 0.03
    compute_quickly(slow, 60.0)
    for text in TEXTS[:2]:
        sequence = opened(slow, [*text, 1])
        assert sequence.restored == 700
        sequence.release()


def test_after_a_while_a_few_pages_are_read_from_it(slow: SlowStore) -> None:
    slow.slow.delay_s = 0.03
    compute_quickly(slow, 0.005)
    opened(slow, [*TEXTS[0], 1]).release()
    slow._rates._clock = lambda: time.monotonic() + STALE_S + 1
    sequence = opened(slow, [*TEXTS[1], 1])
    assert sequence.restored == 64 * PROBE_PAGES
    assert f"recomputing from token {64 * PROBE_PAGES} was faster" in sequence.reset_reason
    sequence.release()
    sequence = opened(slow, [*TEXTS[2], 1])
    assert sequence.restored == 0
    sequence.release()
