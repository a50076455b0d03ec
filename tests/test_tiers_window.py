"""Models whose layers all have a window: only its pages are kept, and only they are needed to go on."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from atlas_tiers.base import BlocksComing, KVGroup, PageLayout
from atlas_tiers.sequence import Sequence
from atlas_tiers.store import TieredStore
from test_tiers_stream import grow
from tiers_support import LAYOUT, assert_content, opened, settled, some_tokens, store, turn

WINDOW = 200
WINDOWED = PageLayout(
    tuple(KVGroup(g.layers, g.kv_heads, g.head_dim, WINDOW - 10 * n) for n, g in enumerate(LAYOUT.groups)), "float32"
)
TEXT = some_tokens(64 * 40 + 20)


def windowed(path: Path | None, **options: int) -> TieredStore:
    return store(path, layout=WINDOWED, **options)


def at(sequence: Sequence) -> list[int]:
    """Positions of the pages that it holds."""
    return [p for p, block in enumerate(sequence.blocks) if block is not None or p in sequence.away]


def test_the_first_page_needed() -> None:
    assert [WINDOWED.first_needed(n) for n in (0, 199, 200, 262, 263, 264)] == [0, 0, 0, 0, 1, 1]
    assert LAYOUT.first_needed(10_000) == 0
    assert WINDOWED.describe() != LAYOUT.describe()


def test_a_sequence_keeps_the_window_alone(tmp_path: Path) -> None:
    tiered = windowed(tmp_path, blocks=16)
    sequence = opened(tiered, TEXT)
    for upto in range(64, len(TEXT), 64):
        grow(tiered, sequence, TEXT[:upto])
        assert_content(tiered, sequence, TEXT, "ann")
        first = max(0, upto // 64 * 64 - WINDOW + 1) // 64
        assert at(sequence) == list(range(first, -(-upto // 64)))
    assert not sequence.away
    assert settled(tiered, sequence.persist()).durable
    sequence.release()
    tiered.check()
    assert tiered.capacity > 1 << 30
    tiered.close()


@pytest.mark.parametrize("host_pages", [0, 3])
def test_a_resume_reads_the_window_alone(tmp_path: Path, host_pages: int) -> None:
    first = windowed(tmp_path, blocks=200)
    turn(first, TEXT)
    first.close()
    tiered = windowed(tmp_path, blocks=16, host_pages=host_pages)
    sequence = opened(tiered, [*TEXT, 1])
    assert sequence.length == len(TEXT)
    assert tiered.counters()["disk_pages_read"] == len(at(sequence)) == 41 - WINDOWED.first_needed(64 * 40)
    assert sequence.restored == 64 * (len(at(sequence)) - 1) + 20
    grow(tiered, sequence, [*TEXT, *some_tokens(200, seed=3)])
    assert_content(tiered, sequence, [*TEXT, *some_tokens(200, seed=3)], "ann")
    sequence.release()
    tiered.check()
    tiered.close()


def test_pages_before_the_window_may_be_gone(tmp_path: Path) -> None:
    tiered = windowed(tmp_path, blocks=200)
    turn(tiered, TEXT)
    pages = tiered._chain(TEXT, "ann")
    tiered._disk.drop_all([page.key for page in pages[:30]])
    tiered.close()
    tiered = windowed(tmp_path, blocks=200)
    assert opened(tiered, [*TEXT, 1]).length == len(TEXT)
    assert tiered.counters()["miss_pages"] == 0  # what lies before the window is not missed
    tiered.close()


def test_a_gap_in_the_window_goes_back_to_the_last_whole_one(tmp_path: Path) -> None:
    tiered = windowed(tmp_path, blocks=200)
    turn(tiered, TEXT)
    pages = tiered._chain(TEXT, "ann")
    tiered._disk.drop_all([page.key for page in (pages[38], pages[20])])
    tiered.close()
    tiered = windowed(tmp_path, blocks=200)
    sequence = opened(tiered, [*TEXT, 1])
    assert sequence.length == 38 * 64
    grow(tiered, sequence, TEXT)
    sequence.release()
    fork = [*TEXT[: 64 * 22], *some_tokens(100, seed=4)]
    assert opened(tiered, fork).length == 20 * 64
    fork = [*TEXT[: 64 * 25], *some_tokens(100, seed=4)]
    assert opened(tiered, fork).length == 25 * 64
    tiered.close()


def test_a_page_damaged_while_it_is_read_means_beginning_again(tmp_path: Path) -> None:
    first = windowed(tmp_path, blocks=200)
    turn(first, TEXT)
    entry = next(e for e in first._disk._index if e.page == first._chain(TEXT, "ann")[38])
    segment = first._disk._space.segment(entry.place)
    first.close()
    with segment.path.open("r+b") as file:
        file.seek(4096 + entry.place.slot * segment.slot_bytes + 4096 + 9)
        file.write(b"\x55\x66")
    tiered = windowed(tmp_path, blocks=16)
    sequence = opened(tiered, [*TEXT, 1])
    assert sequence.length == 0
    assert "damaged" in sequence.reset_reason
    sequence.release()
    assert opened(tiered, [*TEXT, 1]).length == 38 * 64
    tiered.close()


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_turns(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    tiered = windowed(tmp_path, blocks=9, host_pages=draw.choice([0, 4]))
    texts = [some_tokens(draw.randrange(30, 400), seed=n) for n in range(3)]
    for _ in range(25):
        which = draw.randrange(3)
        text = [*texts[which][: draw.randrange(1, 1 + len(texts[which]))], *some_tokens(400, seed=draw.randrange(9))]
        texts[which] = text
        try:
            sequence = opened(tiered, text, durable=draw.random() < 0.7)
        except BlocksComing:
            tiered.wait(1.0)
            continue
        grow(tiered, sequence, text, step=draw.choice([1, 64, 128, 200]))
        assert_content(tiered, sequence, text, "ann")
        if draw.random() < 0.7:
            settled(tiered, sequence.persist())
        sequence.release()
    while tiered.writing:
        tiered.wait(1.0)
        tiered.poll()
    tiered.check()
    tiered.close()
