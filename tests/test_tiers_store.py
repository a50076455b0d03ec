"""Sequences over all tiers: what is shared, copied, brought back, cut, written and erased. Content is always checked
against values that follow from the tokens alone."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from atlas_tiers.base import OutOfBlocks, PageLayout
from atlas_tiers.store import TieredStore
from tiers_support import (
    LAYOUT,
    PATIENCE_S,
    assert_content,
    disk_config,
    opened,
    settled,
    some_tokens,
    store,
    turn,
    until_ready,
    write,
)

TEXT = some_tokens(1000)


def test_a_session_resumes_after_a_restart(tmp_path: Path) -> None:
    first = store(tmp_path)
    assert turn(first, TEXT[:300]).durable
    assert turn(first, TEXT[:500]).durable
    first.check()
    first.close()
    second = store(tmp_path)
    sequence = opened(second, TEXT)
    assert (sequence.reused, sequence.restored, sequence.reset_reason) == (0, 500, "")
    write(second, sequence, TEXT, "ann")
    assert_content(second, sequence, TEXT, "ann")
    sequence.release()
    second.check()
    second.close()


def test_one_token_is_always_left(tmp_path: Path) -> None:
    tiered = store(tmp_path)
    turn(tiered, TEXT[:128])
    for count in (1, 2, 64, 65, 127, 128, 129):
        sequence = opened(tiered, TEXT[:count])
        assert sequence.length == min(count - 1, 128)
        sequence.release()
    assert opened(tiered, []).length == 0
    tiered.close()


@pytest.mark.parametrize("restart", [True, False])
def test_a_part_of_a_page_is_used(tmp_path: Path, restart: bool) -> None:
    """Truncated or forked in the middle of a page: the common part of it is kept."""
    tiered = store(tmp_path)
    turn(tiered, TEXT[:200])
    if restart:
        tiered.close()
        tiered = store(tmp_path)
    forked = [*TEXT[:100], *some_tokens(80, seed=5)]
    sequence = opened(tiered, forked)
    assert sequence.length == 100
    write(tiered, sequence, forked, "ann")
    assert_content(tiered, sequence, forked, "ann")
    sequence.release()
    whole = opened(tiered, TEXT)
    assert whole.length == 200
    whole.release()
    tiered.check()
    tiered.close()


def test_owners_and_models_share_nothing(tmp_path: Path) -> None:
    tiered = store(tmp_path)
    turn(tiered, TEXT[:200], "ann")
    assert opened(tiered, TEXT[:200], "bob").length == 0
    tiered.close()
    other = store(tmp_path, identity=b"model B")
    assert other.open(TEXT[:200], "ann", durable=True).length == 0
    other.close()
    wider = PageLayout(LAYOUT.groups, "float16")
    third = store(tmp_path, layout=wider)
    assert third.open(TEXT[:200], "ann", durable=True).length == 0
    third.close()


def test_running_sequences_share_pages() -> None:
    tiered = store(None)
    turn(tiered, TEXT[:200])
    first, second = opened(tiered, TEXT[:200]), opened(tiered, TEXT[:200])
    assert first.block_table[:3] == second.block_table[:3]
    assert first.block_table[3] != second.block_table[3]
    first.release()
    second.release()
    tiered.check()
    tiered.close()


def test_a_tail_is_taken_over_when_nobody_holds_it() -> None:
    tiered = store(None)
    turn(tiered, TEXT[:100])
    used = tiered.stats()[0].free
    sequence = opened(tiered, TEXT[:150])
    assert sequence.length == 100
    assert tiered.stats()[0].free == used, "the tail was copied"
    sequence.release()
    tiered.close()


def test_two_sequences_append_to_one_tail() -> None:
    """Fork: both continue the same part-filled page differently, at the same time."""
    tiered = store(None)
    turn(tiered, TEXT[:100])
    left = [*TEXT[:100], *some_tokens(90, seed=1)]
    right = [*TEXT[:100], *some_tokens(90, seed=2)]
    first = opened(tiered, left)
    write(tiered, first, left[:110], "ann")
    second = opened(tiered, right)
    write(tiered, second, right[:105], "ann")
    write(tiered, first, left, "ann")
    write(tiered, second, right, "ann")
    assert_content(tiered, first, left, "ann")
    assert_content(tiered, second, right, "ann")
    first.release()
    second.release()
    assert opened(tiered, left).length == opened(tiered, right).length == 189
    tiered.close()


def test_a_tail_that_is_being_written_is_copied(tmp_path: Path) -> None:
    """Persisted, released and continued at once: what reaches the disk is the tail as it was."""
    tiered = store(tmp_path)
    sequence = opened(tiered, TEXT[:100])
    write(tiered, sequence, TEXT[:100], "ann")
    with tiered._disk._io:  # the writer waits here
        ticket = sequence.persist()
        sequence.release()
        again = opened(tiered, TEXT[:130])
        write(tiered, again, TEXT[:130], "ann")
    assert settled(tiered, ticket).durable
    again.release()
    tiered.check()
    tiered.close()
    second = store(tmp_path)
    assert opened(second, TEXT[:101]).length == 100
    second.close()


def test_out_of_blocks_changes_nothing(tmp_path: Path) -> None:
    tiered = store(tmp_path, blocks=6)
    turn(tiered, TEXT[:128])
    held = opened(tiered, some_tokens(200, seed=3))
    held.reserve(200)
    before = tiered.stats()[0]
    table = list(held.block_table)
    with pytest.raises(OutOfBlocks, match="3 blocks wanted"):
        held.reserve(7 * 64)
    assert held.block_table == table
    assert tiered.stats()[0] == before
    write(tiered, held, some_tokens(200, seed=3), "ann")
    held.release()
    assert opened(tiered, TEXT[:129]).length == 128
    tiered.check()
    tiered.close()


def test_open_without_room_lets_everything_go(tmp_path: Path) -> None:
    first = store(tmp_path, blocks=32)
    turn(first, TEXT[:600])
    first.close()
    tiered = store(tmp_path, blocks=6)
    running = [opened(tiered, some_tokens(50, seed=10 + n)) for n in range(6)]
    for sequence in running:  # an open block each: these can't be sent away
        sequence.reserve(50)
    with pytest.raises(OutOfBlocks):
        tiered.open(TEXT[:600], "ann", durable=True)  # it ends in a tail, which needs a block
    for sequence in running:
        sequence.release()
    assert tiered.stats()[0].free == 6
    assert opened(tiered, TEXT[:200]).length == 199
    tiered.check()
    tiered.close()
    assert all(entry.pins == 0 for entry in tiered._disk._index)


def test_commit_needs_room() -> None:
    tiered = store(None)
    sequence = opened(tiered, TEXT)
    sequence.reserve(10)
    with pytest.raises(ValueError, match="65 tokens"):
        sequence.commit(TEXT[:65])
    tiered.close()


def test_evicted_pages_come_back_from_the_host_tier() -> None:
    tiered = store(None, blocks=8, host_pages=16)
    turn(tiered, TEXT[:400])
    turn(tiered, some_tokens(500, seed=8))
    sequence = opened(tiered, TEXT[:400])
    assert sequence.restored > 0
    assert sequence.length == 399
    tiered.check()
    sequence.release()
    tiered.close()


def hits(tiered: TieredStore) -> tuple[int, ...]:
    """(device, host, disk, miss) pages so far."""
    counts = tiered.counters()
    return tuple(counts.get(name, 0) for name in ("device_hit_pages", "host_hit_pages", "disk_hit_pages", "miss_pages"))


def test_hits_are_counted_by_tier(tmp_path: Path) -> None:
    tiered = store(tmp_path, blocks=8, host_pages=16)
    turn(tiered, TEXT[:257])
    assert hits(tiered) == (0, 0, 0, 4), "256 of 257 tokens are offered"
    turn(tiered, TEXT[:300])
    assert hits(tiered) == (5, 0, 0, 4)
    turn(tiered, some_tokens(512, seed=8))
    device, host, disk, miss = hits(tiered)
    assert (device, host, disk, miss) == (5, 0, 0, 12)
    opened(tiered, TEXT[:300]).release()
    assert hits(tiered) == (5, 5, 0, 12)
    tiered.close()
    again = store(tmp_path)
    opened(again, TEXT[:400]).release()
    assert hits(again) == (0, 0, 5, 2)
    again.close()


def test_an_open_that_is_refused_counts_nothing(tmp_path: Path) -> None:
    tiered = store(tmp_path, blocks=2)
    turn(tiered, TEXT[:128])
    held = opened(tiered, some_tokens(128, seed=3))
    held.reserve(128)
    before = hits(tiered)
    with pytest.raises(OutOfBlocks):
        tiered.open(TEXT[:128], "ann", durable=True)
    assert hits(tiered) == before
    held.release()
    tiered.close()


def test_two_sequences_wait_for_one_read(tmp_path: Path) -> None:
    first = store(tmp_path)
    turn(first, TEXT[:640])
    first.close()
    tiered = store(tmp_path)
    left = tiered.open(TEXT[:641], "ann", durable=True)
    right = tiered.open(TEXT[:641], "ann", durable=True)
    until_ready(tiered, left, right)
    assert left.block_table == right.block_table
    assert left.restored == right.restored == 640
    assert tiered.counters()["disk_pages_read"] == 10
    assert_content(tiered, left, TEXT, "ann")
    left.release()
    right.release()
    tiered.check()
    tiered.close()


def test_a_page_that_is_being_read_is_not_copied(tmp_path: Path) -> None:
    """A fork into the middle of a page that another sequence is bringing in."""
    first = store(tmp_path)
    turn(first, TEXT[:192])
    first.close()
    tiered = store(tmp_path)
    with tiered._mover._wake:  # the readers wait here
        whole = tiered.open(TEXT[:193], "ann", durable=True)
        fork = tiered.open(TEXT[:171], "ann", durable=True)
        assert not whole.ready
        assert not fork.ready
    until_ready(tiered, whole, fork)
    assert (whole.length, fork.length) == (192, 170)
    assert_content(tiered, whole, TEXT, "ann")
    assert_content(tiered, fork, TEXT, "ann")
    tiered.close()


def test_release_while_pages_are_read(tmp_path: Path) -> None:
    """One of two gives up during the restore, and one that was alone: the other gets its pages, nothing leaks."""
    first = store(tmp_path)
    turn(first, TEXT[:900])
    first.close()
    tiered = store(tmp_path)
    left = tiered.open(TEXT[:641], "ann", durable=True)
    right = tiered.open(TEXT[:321], "ann", durable=True)
    left.release()
    until_ready(tiered, right)
    assert right.length == 320
    assert_content(tiered, right, TEXT, "ann")
    right.release()
    alone = tiered.open(TEXT[:900], "ann", durable=True)
    alone.release()
    again = opened(tiered, TEXT[:900])
    assert again.length == 899
    again.release()
    until_idle(tiered)
    tiered.check()
    tiered.close()


def until_idle(tiered: TieredStore) -> None:
    """Every fill that was asked for came back."""
    for _ in range(1000):
        if not tiered._restore.busy:
            return
        tiered.wait(0.05)
        tiered.poll()
    raise AssertionError("fills are left")


@pytest.mark.parametrize("damaged", [0, 3, 7])
def test_damage_ends_the_prefix_there(tmp_path: Path, damaged: int) -> None:
    first = store(tmp_path)
    turn(first, TEXT[:512])
    place = first._disk._index.find(first._chain(TEXT[:512], "ann")[damaged].key).place
    first.close()
    slot = 4096 + place.slot * (4096 + LAYOUT.page_bytes)
    with (tmp_path / f"seg-{place.segment:08d}.kv").open("r+b") as file:
        file.seek(slot + 4096 + 77)
        file.write(b"\xff\x00\xff\x00")
    os.sync()
    tiered = store(tmp_path)
    left = tiered.open([*TEXT[:512], 1], "ann", durable=True)
    right = tiered.open([*TEXT[:512], 2], "ann", durable=True)
    until_ready(tiered, left, right)
    for sequence in (left, right):
        assert sequence.length == sequence.restored == 64 * damaged
        assert sequence.reset_reason == f"page damaged on disk: recomputing from token {64 * damaged}"
        assert_content(tiered, sequence, TEXT, "ann")
    assert tiered.counters()["disk_pages_damaged"] == 1
    write(tiered, left, TEXT[:600], "ann")
    assert settled(tiered, left.persist()).durable
    left.release()
    right.release()
    until_idle(tiered)
    tiered.check()
    tiered.close()
    third = store(tmp_path)
    assert opened(third, TEXT[:600]).restored == 599
    third.close()


def test_a_failed_read_is_not_shared(tmp_path: Path) -> None:
    """The read has failed, the engine has not been told yet, and another sequence asks for the same pages."""
    first = store(tmp_path)
    turn(first, TEXT[:320])
    first.close()
    tiered = store(tmp_path, blocks=7)
    for segment in tmp_path.glob("seg-*.kv"):
        os.truncate(segment, 4096)
    left = tiered.open(TEXT[:321], "ann", durable=True)
    deadline = time.monotonic() + PATIENCE_S
    while len(tiered._mover.finished) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    right = tiered.open(TEXT[:321], "ann", durable=True)
    until_ready(tiered, left, right)
    assert left.length == right.length == 0
    assert left.reset_reason == "page damaged on disk: recomputing from token 0"
    left.release()
    right.release()
    tiered.check()
    tiered.close()


def test_damage_in_the_host_tier_falls_back_to_disk(tmp_path: Path) -> None:
    tiered = store(tmp_path, blocks=8, host_pages=16)
    turn(tiered, TEXT[:256])
    turn(tiered, some_tokens(500, seed=8))
    assert tiered._host.stats().sealed > 0
    tiered._host._slab[:] = bytes(len(tiered._host._slab))
    sequence = opened(tiered, TEXT[:257])
    assert sequence.length == 256
    assert sequence.reset_reason == ""
    assert tiered.counters()["host_pages_damaged"] == 4
    sequence.release()
    tiered.check()
    tiered.close()


def test_pages_of_an_anonymous_sequence_reach_the_disk_when_a_session_uses_them(tmp_path: Path) -> None:
    tiered = store(tmp_path)
    ticket = turn(tiered, TEXT[:300], durable=False)
    assert (ticket.durable, ticket.error) == (False, "")
    assert tiered.counters().get("disk_pages_written", 0) == 0
    ticket = turn(tiered, TEXT[:400], durable=True)
    assert (ticket.durable, ticket.pages) == (True, 7)
    tiered.close()
    second = store(tmp_path)
    assert opened(second, TEXT[:400]).restored == 399
    second.close()


@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("durable", [True, False])
def test_anonymous_pages_reach_the_disk_at_their_second_use(tmp_path: Path, where: str, durable: bool) -> None:
    """Found in the device pool or in RAM by another sequence. What only one sequence used is not written."""
    tiered = store(tmp_path, blocks=8, host_pages=32)
    turn(tiered, TEXT[:300], durable=False)
    once = some_tokens(500, seed=8)
    if where == "host":
        turn(tiered, once, durable=False)
    assert tiered.counters().get("disk_pages_written", 0) == 0
    again = opened(tiered, [*TEXT[:256], *some_tokens(60, seed=2)], durable=durable)
    assert again.length == 256
    until_written(tiered)
    assert tiered.counters()["disk_pages_written"] == tiered.counters()["disk_second_use_pages"] == 4
    again.release()
    opened(tiered, TEXT[:290], durable=False).release()
    until_written(tiered)
    assert tiered.counters()["disk_pages_written"] == 4, "a page was written twice, or a tail was"
    tiered.check()
    tiered.close()
    second = store(tmp_path)
    assert opened(second, TEXT[:400]).restored == 256
    assert second.open(once, "ann", durable=True).length == 0
    second.close()


def until_written(tiered: TieredStore) -> None:
    """Every queued write is done."""
    deadline = time.monotonic() + PATIENCE_S
    while tiered.writing:
        assert time.monotonic() < deadline
        tiered.wait(0.05)
        tiered.poll()


def test_second_use_waits_while_the_queue_is_full(tmp_path: Path) -> None:
    tiered = store(tmp_path, blocks=32)
    turn(tiered, TEXT[:900], durable=False)
    with tiered._disk._io:  # the writer waits here
        first = opened(tiered, TEXT[:900], durable=False)
        assert tiered.counters()["disk_writes_deferred"] == 1
        first.release()
    until_written(tiered)
    written = tiered.counters()["disk_pages_written"]
    assert 0 < written < 14
    opened(tiered, TEXT[:900], durable=False).release()
    until_written(tiered)
    assert tiered.counters()["disk_pages_written"] > written
    tiered.check()
    tiered.close()


def test_persist_of_a_chain_that_only_memory_holds(tmp_path: Path) -> None:
    """From the device pool and from the host tier."""
    tiered = store(tmp_path, blocks=8, host_pages=16)
    turn(tiered, TEXT[:300], durable=False)
    turn(tiered, some_tokens(300, seed=9), durable=False)
    assert tiered._host.stats().sealed > 0
    ticket = settled(tiered, tiered.persist(TEXT[:300], "ann"))
    assert (ticket.durable, ticket.pages) == (True, 5)
    tiered.check()
    tiered.close()
    second = store(tmp_path)
    assert opened(second, TEXT[:301]).restored == 300
    second.close()


def test_old_tails_make_room(tmp_path: Path) -> None:
    """A session of many short turns leaves one tail on disk, not one a turn."""
    tiered = store(tmp_path)
    for end in range(10, 200, 10):
        assert turn(tiered, TEXT[:end]).durable
    assert tiered.stats()[-1].sealed == 3
    assert tiered.stats()[0].sealed == 3
    tiered.check()
    tiered.close()


def test_a_failed_write_is_said_and_serving_goes_on(tmp_path: Path) -> None:
    tiered = store(tmp_path, disk=disk_config(tmp_path, cap_bytes=300_000))
    ticket = turn(tiered, TEXT[:300])
    assert not ticket.durable
    assert "no room under the disk cap" in ticket.error
    assert opened(tiered, TEXT[:300]).reused == 299
    tiered.close()


def test_an_unusable_directory_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    tiered = store(tmp_path / "file" / "kv")
    assert not turn(tiered, TEXT[:100]).durable
    assert "no KV pages are kept on disk" in tiered.warnings[0]
    tiered.close()


def test_purge_erases_every_tier(tmp_path: Path) -> None:
    tiered = store(tmp_path, blocks=8, host_pages=16)
    turn(tiered, TEXT[:300])
    turn(tiered, some_tokens(300, seed=9), "bob")
    held = opened(tiered, some_tokens(300, seed=9), "bob")
    assert tiered.purge(TEXT[:300], "ann") == 5
    assert tiered.purge(TEXT[:300], "ann") == 0
    assert tiered.purge(some_tokens(300, seed=9), "bob") <= 1, "a running sequence's pages were erased"
    assert_content(tiered, held, some_tokens(300, seed=9), "bob")
    held.release()
    assert opened(tiered, TEXT[:300]).length == 0
    tiered.check()
    tiered.close()
    second = store(tmp_path)
    assert second.open(TEXT[:300], "ann", durable=True).length == 0
    second.close()


def test_a_full_queue_defers_and_persist_catches_up(tmp_path: Path) -> None:
    tiered = store(tmp_path, blocks=32)
    sequence = opened(tiered, TEXT)
    with tiered._disk._io:  # the writer waits here
        write(tiered, sequence, TEXT, "ann")
    assert tiered.counters()["disk_writes_deferred"] > 0
    assert settled(tiered, sequence.persist()).durable
    sequence.release()
    tiered.check()
    tiered.close()


def test_wait_returns_when_there_is_something(tmp_path: Path) -> None:
    tiered = store(tmp_path)
    sequence = opened(tiered, TEXT[:100])
    write(tiered, sequence, TEXT[:100], "ann")
    ticket = sequence.persist()
    while not ticket.done:
        tiered.wait(30)
        tiered.poll()
    sequence.release()
    tiered.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kv-")]
