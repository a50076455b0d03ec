"""Streams as pure state: numbers, replay, credit, caps."""

from __future__ import annotations

import random

import msgspec
from atlas_client.protocol import Header, Progress, Tokens

from atlasd.broker.streams import Limits, Stream, StreamTable

encode, decode = msgspec.msgpack.encode, msgspec.msgpack.decode


def stream(rid: str = "r", credit: int = 0) -> Stream:
    return Stream(("1", rid), b"", b"client", credit=credit)


def token(index: int) -> bytes:
    return encode(Tokens(index, [index], f"<{index}>"))


def take(source: Stream, limit: int = 10**9) -> list[tuple[int, bytes]]:
    taken = []
    while len(taken) < limit and (event := source.pending()):
        taken.append((decode(event.frames[1], type=Header).seq, event.frames[2]))
        source.sent()
    return taken


def test_numbers_from_one_and_bodies_untouched() -> None:
    s = stream()
    for index in range(3):
        s.push(token(index), tokens=True)
    assert take(s) == [(1, token(0)), (2, token(1)), (3, token(2))]
    assert s.backlog == 0


def test_nothing_after_the_last_event() -> None:
    s = stream()
    s.push(b"end", last=True)
    s.push(b"more")
    assert take(s) == [(1, b"end")]
    assert s.drained


def test_progress_is_superseded() -> None:
    s = stream()
    body = [encode(Progress("prefill", done, 9)) for done in range(9)]
    s.push(body[0], progress=True)
    s.push(body[1], progress=True)
    assert take(s) == [(1, body[1])]  # an unseen one is replaced
    s.push(body[2], progress=True)
    s.push(b"done", last=True)
    assert take(s) == [(2, body[2]), (3, b"done")]
    s.attach(b"again", 0)
    assert take(s) == [(2, body[2]), (3, b"done")]


def test_attach_at_any_number_gives_the_rest() -> None:
    s = stream()
    for index in range(20):
        s.push(token(index), tokens=True)
    take(s, 7)
    for last in range(21):
        s.attach(b"x", last)
        assert [seq for seq, _ in take(s)] == list(range(last + 1, 21))


def test_credit_holds_events_back_but_never_the_end() -> None:
    s = stream(credit=2)
    for index in range(3):
        s.push(token(index), tokens=True)
    s.push(b"done", last=True)
    assert len(take(s)) == 2
    s.grant(1)
    assert [seq for seq, _ in take(s)] == [3, 4]


def test_overflow_by_events_and_bytes() -> None:
    limits = Limits(backlog_events=10, backlog_bytes=1000)
    s = stream()
    for index in range(11):
        assert not s.overflows(limits)
        s.push(token(index), tokens=True)
    assert s.overflows(limits)
    take(s)
    assert not s.overflows(limits)
    s.push(b"x" * 1001)
    assert s.overflows(limits)


def test_compaction_keeps_every_token_in_its_place() -> None:
    draw = random.Random(5)
    for _ in range(20):
        s = stream()
        count = draw.randrange(300, 900)
        for index in range(count):
            s.push(token(index), tokens=True)
        seen = take(s, draw.randrange(40))
        s.identity = None
        s.compact()
        s.push(token(count), tokens=True)
        s.push(encode(Progress("x", 1, 1)), progress=True)
        s.push(b"end", last=True)
        s.attach(b"y", seen[-1][0] if seen else 0)
        rest = take(s)
        ids = [i for _, body in [*seen, *rest[:-2]] for i in decode(body, type=Tokens).ids]
        assert ids == list(range(count + 1))
        assert len(rest) <= 4
        assert s.size == sum(event.size for event in s.events)


def test_table_bounds_what_it_keeps() -> None:
    table = StreamTable(Limits(kept_streams=3, kept_seconds=10, kept_bytes=10_000))
    live = stream("live")
    table.add(live)
    for number in range(5):
        s = stream(f"s{number}")
        table.add(s)
        s.push(b"end", last=True)
        table.finish(s, float(number))
    assert [table.find(("1", f"s{n}")) is not None for n in range(5)] == [False, False, True, True, True]
    table.expire(13.5)
    assert [table.find(("1", f"s{n}")) is not None for n in range(5)] == [False] * 4 + [True]
    big = stream("big")
    table.add(big)
    big.push(b"x" * 20_000, last=True)
    table.finish(big, 14.0)
    assert len(table) == 2
    assert table.find(live.key) is live
    assert table.find(big.key) is big
