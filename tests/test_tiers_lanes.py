"""Models that mix layers with and without a window: two stores that act as one."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
import torch
from atlas_tiers import lanes
from atlas_tiers.base import AWAY, BlocksComing, KVGroup, PageLayout, Ticket
from atlas_tiers.disk import DiskConfig
from atlas_tiers.errors import StoreLocked
from atlas_tiers.lanes import LanedSequence, LanedStore, lane_blocks, lane_directories, others_bytes, split_blocks
from atlas_tiers.store import TieredStore
from tiers_support import opened as opened_by_one
from tiers_support import some_tokens, store, values
from tiers_support import turn as turn_of_one

from atlasd.engine.context import Reader, key_splits, span

WINDOW = 200
MIXED = PageLayout((KVGroup((1, 4), 1, 8), KVGroup((0, 2, 3), 2, 4, WINDOW)), "float32")
TEXT = some_tokens(64 * 40 + 20)


def laned(path: Path | None, blocks: tuple[int, int] = (200, 200), host_pages: int = 0) -> LanedStore:
    event = threading.Event()
    stores = []
    for n, lane in enumerate(MIXED.by_lane()):
        disk = DiskConfig(path / str(n), 64 << 20, 0, 1 << 20) if path else None
        host = host_pages * lane.page_bytes
        stores.append(TieredStore(lane, b"m", device_blocks=blocks[n], host_bytes=host, disk=disk, event=event))
    return LanedStore(MIXED, stores)


def until(tiered: LanedStore, done: object) -> None:
    for _ in range(2000):
        if done():  # type: ignore[operator]
            return
        tiered.wait(0.05)
        tiered.poll()
    raise AssertionError("not settled")


def check(tiered: LanedStore, sequence: LanedSequence, tokens: list[int]) -> None:
    """What the next token's attention would read, layer by layer, is what the tokens say."""
    length = sequence.length
    assert {lane.length for lane in sequence.lanes} == {length}
    if not length:
        return
    wanted = torch.tensor(values(tokens, "ann")[:length])
    whole = span(0, 1, length - 1, sequence.tables, tiered, torch.device("cpu"))
    reader = Reader(tiered, [whole])
    for layer in sorted(tiered.pages):
        window = WINDOW if layer in (0, 2, 3) else None
        for keys in key_splits(whole, window):
            k, v = reader.gather(layer, whole, keys, torch.float32)
            expected = (wanted[keys.start : keys.stop] + layer)[None, :, None].expand_as(k)
            seen = slice(max(0, length - WINDOW - keys.start) if window else 0, None)
            assert torch.equal(k[:, seen], expected[:, seen])
            assert torch.equal(v[:, seen], expected[:, seen])
    reader.close()


def grow(tiered: LanedStore, sequence: LanedSequence, tokens: list[int], step: int = 128) -> None:
    wanted = values(tokens, "ann")
    while sequence.length < len(tokens):
        start, stop = sequence.length, min(len(tokens), sequence.length + step)
        try:
            sequence.reserve(stop - start)
        except BlocksComing:
            tiered.wait(1.0)
            tiered.poll()
            continue
        for position in range(start, stop):
            for layer, pages in tiered.pages.items():
                block = sequence.tables[tiered.lanes[layer]].blocks[position // 64]
                assert block != AWAY
                pages.values[block, :, :, position % 64] = wanted[position] + layer
        sequence.commit(tokens[start:stop])


def opened(tiered: LanedStore, tokens: list[int], *, durable: bool = True) -> LanedSequence:
    for _ in range(1000):
        try:
            sequence = tiered.open(tokens, "ann", durable=durable)
        except BlocksComing:
            tiered.wait(0.05)
            tiered.poll()
            continue
        while not sequence.ready:
            tiered.wait(0.05)
            tiered.poll()
        check(tiered, sequence, tokens)
        return sequence
    raise AssertionError("no blocks came")


def turn(tiered: LanedStore, tokens: list[int], *, durable: bool = True) -> Ticket:
    sequence = opened(tiered, tokens, durable=durable)
    grow(tiered, sequence, tokens)
    check(tiered, sequence, tokens)
    ticket = sequence.persist()
    until(tiered, lambda: ticket.done)
    sequence.release()
    return ticket


def test_the_window_lane_keeps_the_window(tmp_path: Path) -> None:
    tiered = laned(tmp_path, (60, 16))
    sequence = opened(tiered, TEXT)
    grow(tiered, sequence, TEXT)
    full, window = sequence.lanes
    assert sum(block is not None for block in full.blocks) + len(full.away) == 41
    assert sum(block is not None for block in window.blocks) + len(window.away) == 41 - 36
    sequence.release()
    tiered.close()


def test_a_session_comes_back_after_a_restart(tmp_path: Path) -> None:
    tiered = laned(tmp_path)
    assert turn(tiered, TEXT).durable
    tiered.close()
    tiered = laned(tmp_path, (30, 16), host_pages=4)
    sequence = opened(tiered, [*TEXT, 1])
    assert (sequence.length, sequence.reset_reason) == (len(TEXT), "")
    assert 0 < sequence.restored <= len(TEXT)
    assert tiered.stores[1].counters()["disk_pages_read"] == 5
    grow(tiered, sequence, [*TEXT, *some_tokens(300, seed=2)])
    check(tiered, sequence, [*TEXT, *some_tokens(300, seed=2)])
    sequence.release()
    tiered.check()
    assert tiered.locate(TEXT, "ann")["nowhere"] == 0
    assert tiered.purge([*TEXT, *some_tokens(300, seed=2)], "ann") > 41
    assert opened(tiered, TEXT).length == 0
    tiered.close()


def test_a_prefix_is_what_both_lanes_have(tmp_path: Path) -> None:
    tiered = laned(tmp_path)
    turn(tiered, TEXT)
    full, window = tiered.stores
    pages = [store._chain(TEXT, "ann") for store in tiered.stores]
    full._disk.drop_all([pages[0][35].key])
    window._disk.drop_all([pages[1][33].key])
    tiered.close()
    tiered = laned(tmp_path)
    sequence = opened(tiered, [*TEXT, 1])
    assert sequence.length == 33 * 64  # 34 and 35 pages want page 33 of the window, which is gone
    sequence.release()
    tiered.close()


def test_a_lane_that_loses_a_page_while_reading_begins_both_again(tmp_path: Path) -> None:
    tiered = laned(tmp_path)
    turn(tiered, TEXT)
    store = tiered.stores[1]
    entry = next(e for e in store._disk._index if e.page == store._chain(TEXT, "ann")[39])
    segment = store._disk._space.segment(entry.place)
    tiered.close()
    with segment.path.open("r+b") as file:
        file.seek(4096 + entry.place.slot * segment.slot_bytes + 4096 + 9)
        file.write(b"\x55\x66")
    tiered = laned(tmp_path)
    sequence = opened(tiered, [*TEXT, 1])
    assert sequence.length == 0
    assert "damaged" in sequence.reset_reason
    grow(tiered, sequence, TEXT)
    check(tiered, sequence, TEXT)
    sequence.release()
    tiered.check()
    assert opened(tiered, [*TEXT, 1]).length == len(TEXT)
    tiered.close()


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_turns(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    tiered = laned(tmp_path, (10, 9), host_pages=draw.choice([0, 5]))
    texts = [some_tokens(draw.randrange(30, 400), seed=n) for n in range(3)]
    for _ in range(15):
        which = draw.randrange(3)
        kept = texts[which][: draw.randrange(1, 1 + len(texts[which]))]
        texts[which] = [*kept, *some_tokens(400, seed=draw.randrange(9))]
        turn(tiered, texts[which], durable=draw.random() < 0.7)
    until(tiered, lambda: not tiered.writing)
    tiered.check()
    assert all(stats.free + stats.open + stats.sealed == stats.total for stats in tiered.stats())
    tiered.close()


def test_blocks_are_shared_as_a_long_context_needs_them() -> None:
    full, window = MIXED.by_lane()
    assert (full.window, window.window) == (None, WINDOW)
    assert (lane_blocks(full, 6400, 512), lane_blocks(window, 6400, 512)) == (101, 4 + 8 + 2)
    assert lane_blocks(window, 300, 512) == 6
    budget = 10 * (101 * full.page_bytes + 14 * window.page_bytes)
    assert split_blocks([full, window], budget, 6400, 512) == [1010, 140]
    least = 14 * window.page_bytes + 20 * full.page_bytes
    assert split_blocks([full, window], least, 6400, 512) == [20, 14]
    assert split_blocks([full, window], 12 * window.page_bytes, 6400, 512)[1] == 9
    assert split_blocks([full], 5 * full.page_bytes, 6400, 512) == [5]


def test_bytes_of_models_of_the_other_kind_count(tmp_path: Path) -> None:
    assert lane_directories(tmp_path, 1) == [tmp_path]
    single, double = (
        [tmp_path / "seg-00000001.kv"],
        [path / "seg-00000001.kv" for path in lane_directories(tmp_path, 2)],
    )
    for file in (*single, *double):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(1000))
    assert others_bytes(tmp_path, 2, 10_000) == 1000
    assert others_bytes(tmp_path, 1, 10_000) == 2000
    assert others_bytes(tmp_path, 1, 3000) == 0
    assert single[0].exists()
    assert not double[0].exists()
    assert others_bytes(tmp_path, 2, 1500) == 0
    assert not single[0].exists()


@pytest.mark.parametrize("kinds", [1, 2])
def test_only_pages_make_room_for_those_of_the_other_kind(tmp_path: Path, kinds: int) -> None:
    """The directory is the user's choice: it may hold other things, and folders of the lanes' names too."""
    mine = [tmp_path / "thesis.tex", *(tmp_path / folder / "a.jpg" for folder in ("photos", "full", "window"))]
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(3000))
    assert others_bytes(tmp_path, kinds, 2000) == 0
    assert all(file.exists() for file in mine)


def test_pages_of_the_other_kind_stay_while_an_engine_uses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "LOCK_WAIT_S", 0.1)
    single = store(tmp_path)
    turn_of_one(single, TEXT[:300])
    with pytest.raises(StoreLocked):
        others_bytes(tmp_path, 2, 1000)
    single.close()
    again = store(tmp_path)
    assert opened_by_one(again, [*TEXT[:300], 1]).length == 300
    again.close()
    assert others_bytes(tmp_path, 2, 1000) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]
