"""Sequences longer than the device pool: what does not fit is away, in RAM or on disk, and reads the same."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path

import pytest
import torch
from atlas_tiers.base import BlocksComing, OutOfBlocks, Ticket
from atlas_tiers.errors import PageDamaged
from atlas_tiers.sequence import Sequence
from atlas_tiers.store import TieredStore
from tiers_support import assert_content, disk_config, opened, settled, some_tokens, store, turn, until_ready, write

from atlasd.engine.context import Lies, Reader, span

TEXT = some_tokens(64 * 40 + 20)
BLOCKS = 8


def grow(tiered: TieredStore, sequence: Sequence, tokens: list[int], step: int = 128) -> None:
    """As prefill does: chunk by chunk, waiting for the disk where that makes room."""
    while sequence.length < len(tokens):
        upto = min(len(tokens), sequence.length + step)
        try:
            write(tiered, sequence, tokens[:upto], "ann")
        except BlocksComing:
            tiered.wait(1.0)
            tiered.poll()


def patient(tiered: TieredStore, tokens: list[int], *, durable: bool) -> Sequence:
    """open(), again while blocks are held by queued reads and writes."""
    for _ in range(1000):
        try:
            return opened(tiered, tokens, durable=durable)
        except BlocksComing:
            tiered.wait(1.0)
            tiered.poll()
    raise AssertionError("blocks were promised and never came")


def places(tiered: TieredStore, sequence: Sequence) -> dict[Lies, int]:
    whole = span(0, sequence.length, 0, sequence.tables, tiered, torch.device("cpu"))
    return {lies: sum(len(run) for run in whole.places[0].runs if run.lies is lies) for lies in Lies}


@pytest.mark.parametrize(("host_pages", "disk"), [(64, False), (64, True), (12, True), (0, True)])
@pytest.mark.parametrize("durable", [True, False])
def test_a_sequence_outgrows_the_pool(tmp_path: Path, host_pages: int, disk: bool, durable: bool) -> None:
    tiered = store(tmp_path if disk else None, blocks=BLOCKS, host_pages=host_pages)
    sequence = opened(tiered, TEXT, durable=durable)
    grow(tiered, sequence, TEXT)
    found = places(tiered, sequence)
    assert sum(found.values()) == 41
    assert 0 < found[Lies.DEVICE] <= BLOCKS
    assert bool(found[Lies.AHEAD]) == (host_pages < 32)
    assert bool(found[Lies.HOST]) == bool(host_pages)
    assert_content(tiered, sequence, TEXT, "ann")
    ticket = settled(tiered, sequence.persist())
    assert ticket.durable == (disk and durable)
    sequence.release()
    tiered.check()
    again = opened(tiered, [*TEXT, 1], durable=durable)
    assert again.length == len(TEXT)
    again.release()
    tiered.check()
    assert not tiered._room.running
    tiered.close()


@pytest.mark.parametrize("host_pages", [0, 12, 64])
def test_a_resumed_sequence_is_larger_than_the_pool(tmp_path: Path, host_pages: int) -> None:
    first = store(tmp_path, blocks=64)
    turn(first, TEXT)
    first.close()
    tiered = store(tmp_path, blocks=BLOCKS, host_pages=host_pages)
    sequence = opened(tiered, [*TEXT, 1])
    assert (sequence.length, sequence.restored) == (len(TEXT), len(TEXT))
    found = places(tiered, sequence)
    assert found[Lies.HOST] == min(host_pages, 41 - found[Lies.DEVICE])
    assert found[Lies.DEVICE] > 2
    grow(tiered, sequence, [*TEXT, *some_tokens(300, seed=2)])
    assert_content(tiered, sequence, [*TEXT, *some_tokens(300, seed=2)], "ann")
    sequence.release()
    tiered.check()
    tiered.close()
    assert all(entry.pins == 0 for entry in tiered._disk._index)


def test_two_long_sequences_share_a_small_pool(tmp_path: Path) -> None:
    tiered = store(tmp_path, blocks=BLOCKS, host_pages=10)
    other = [*TEXT[:640], *some_tokens(64 * 30, seed=4)]
    left, right = opened(tiered, TEXT), opened(tiered, other)
    for upto in range(200, len(TEXT), 400):
        grow(tiered, left, TEXT[:upto])
        grow(tiered, right, other[:upto])
    assert_content(tiered, left, TEXT[: left.length], "ann")
    assert_content(tiered, right, other[: right.length], "ann")
    left.release()
    assert_content(tiered, right, other[: right.length], "ann")
    right.release()
    tiered.check()
    tiered.close()


def test_a_damaged_page_on_disk_stops_the_reading_and_is_computed_again(tmp_path: Path) -> None:
    first = store(tmp_path, blocks=64)
    turn(first, TEXT)
    first.close()
    tiered = store(tmp_path, blocks=BLOCKS)
    sequence = opened(tiered, [*TEXT, 1])
    position, held = max(sequence.away.items())
    segment = tiered._disk._space.segment(held.entry.place)
    with segment.path.open("r+b") as file:
        file.seek(4096 + held.entry.place.slot * segment.slot_bytes + 4096 + 100)
        file.write(b"\xff\x01\x02\x03")
    with pytest.raises(PageDamaged):
        assert_content(tiered, sequence, TEXT, "ann")
    sequence.release()
    again = opened(tiered, [*TEXT, 1])
    assert again.length == 64 * position
    grow(tiered, again, TEXT)
    assert_content(tiered, again, TEXT, "ann")
    again.release()
    tiered.check()
    assert tiered.counters()["disk_pages_damaged"] == 1
    tiered.close()


def test_a_damaged_page_in_ram_ends_the_prefix(tmp_path: Path) -> None:
    tiered = store(None, blocks=BLOCKS, host_pages=64)
    sequence = opened(tiered, TEXT)
    grow(tiered, sequence, TEXT)
    sequence.release()
    turn(tiered, some_tokens(64 * BLOCKS, seed=5))
    host = tiered._host
    entry = next(e for e in host._index if e.page == tiered._chain(TEXT, "ann")[20])
    host.slab[entry.place * host.page_bytes + 5] ^= 1
    sequence = tiered.open([*TEXT, 1], "ann", durable=False)
    until_ready(tiered, sequence)
    assert sequence.length == 20 * 64
    assert "damaged in RAM" in sequence.reset_reason
    assert_content(tiered, sequence, TEXT, "ann")
    sequence.release()
    tiered.check()
    tiered.close()


def test_a_full_disk_and_a_full_ram_are_out_of_blocks(tmp_path: Path) -> None:
    disk = disk_config(tmp_path, cap_bytes=1_500_000)
    tiered = store(None, blocks=BLOCKS, host_pages=4, disk=disk)
    long = some_tokens(64 * 1000)
    sequence = opened(tiered, long)
    with pytest.raises(OutOfBlocks) as caught:
        grow(tiered, sequence, long)
    assert not isinstance(caught.value, BlocksComing)
    assert sequence.length > 64 * (BLOCKS + 4)
    assert_content(tiered, sequence, long[: sequence.length], "ann")
    sequence.release()
    tiered.check()
    tiered.close()


def test_letting_go_while_pages_are_being_brought(tmp_path: Path) -> None:
    first = store(tmp_path, blocks=64)
    turn(first, TEXT)
    first.close()
    tiered = store(tmp_path, blocks=BLOCKS, host_pages=12)
    for _ in range(20):
        with contextlib.suppress(BlocksComing):  # reads that nobody wants any more hold the blocks
            tiered.open([*TEXT, 1], "ann", durable=True).release()
    while tiered.writing:
        tiered.wait(1.0)
        tiered.poll()
    tiered.check()
    assert all(entry.pins == 0 for entry in [*tiered._disk._index, *tiered._host._index])
    assert opened(tiered, [*TEXT, 1]).length == len(TEXT)
    tiered.close()


def test_slices_come_in_the_order_asked_for(tmp_path: Path) -> None:
    tiered = store(tmp_path, blocks=BLOCKS)
    sequence = opened(tiered, TEXT)
    grow(tiered, sequence, TEXT)
    whole = span(0, sequence.length, 0, sequence.tables, tiered, torch.device("cpu"))
    reader = Reader(tiered, [whole])
    with pytest.raises(ValueError, match="not read ahead"):
        reader.gather(2, whole, range(1024), torch.float32)
    reader.close()
    tiered.close()


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_turns_over_small_tiers(tmp_path: Path, seed: int) -> None:
    """Sessions grow, fork, end and come back; every read is checked against what the tokens say."""
    draw = random.Random(seed)
    tiered = store(tmp_path, blocks=BLOCKS, host_pages=draw.choice([0, 5, 30]))
    texts = [some_tokens(draw.randrange(30, 400), seed=n) for n in range(3)]
    tickets: list[Ticket] = []
    for _ in range(25):
        which = draw.randrange(3)
        kept = texts[which][: draw.randrange(1, 1 + len(texts[which]))]
        text = texts[which] = [*kept, *some_tokens(500, seed=draw.randrange(9))]
        sequence = patient(tiered, text, durable=draw.random() < 0.7)
        grow(tiered, sequence, text, step=draw.choice([1, 64, 128, 200]))
        assert_content(tiered, sequence, text, "ann")
        if draw.random() < 0.7:
            tickets.append(settled(tiered, sequence.persist()))
        sequence.release()
    while tiered.writing:
        tiered.wait(1.0)
        tiered.poll()
    tiered.check()
    tiered.close()


def test_sequences_that_share_their_beginning_send_it_away_together() -> None:
    tiered = store(None, blocks=BLOCKS, host_pages=200)
    beginning = TEXT[: 64 * 5]
    left, right = opened(tiered, beginning, durable=False), opened(tiered, beginning, durable=False)
    grow(tiered, left, beginning)
    right.release()
    right = opened(tiered, [*beginning, *some_tokens(64 * 20, seed=6)], durable=False)
    assert right.block_table[:5] == left.block_table[:5]
    long = [*beginning, *some_tokens(64 * 20, seed=7)]
    for upto in range(400, len(long), 200):
        grow(tiered, left, long[:upto])
        grow(tiered, right, [*beginning, *some_tokens(64 * 20, seed=6)][:upto])
    assert_content(tiered, left, long, "ann")
    assert_content(tiered, right, [*beginning, *some_tokens(64 * 20, seed=6)], "ann")
    left.release()
    assert_content(tiered, right, [*beginning, *some_tokens(64 * 20, seed=6)], "ann")
    right.release()
    tiered.check()
    assert all(entry.pins == 0 for entry in tiered._host._index)
    tiered.close()


def test_after_the_disk_was_full_long_contexts_run_again(tmp_path: Path) -> None:
    disk = disk_config(tmp_path, cap_bytes=1_500_000)
    tiered = store(None, blocks=BLOCKS, disk=disk)
    long = some_tokens(64 * 1000)
    sequence = opened(tiered, long, durable=False)
    with pytest.raises(OutOfBlocks):
        grow(tiered, sequence, long)
    assert tiered._disk.refuses
    sequence.release()
    end = time.monotonic() + 30
    while tiered._disk.refuses:
        assert time.monotonic() < end
        time.sleep(0.05)
    again = patient(tiered, TEXT[: 64 * 30], durable=False)
    grow(tiered, again, TEXT[: 64 * 30])
    assert_content(tiered, again, TEXT[: 64 * 30], "ann")
    again.release()
    tiered.close()
