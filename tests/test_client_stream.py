"""Stream and Link: what the caller gets, whatever the order of events. No sockets."""

from __future__ import annotations

import itertools
import random

import pytest
from atlas_client import framing
from atlas_client.errors import DaemonUnavailable, ErrorCode, ErrorReply
from atlas_client.link import Health, Limits, Link
from atlas_client.protocol import Attach, Error, Generate, Header, Ping, Pong, SessionFork, Status, Tokens
from atlas_client.stream import Stream
from client_support import done

TEXT = "Über alles wächst Gras, 東京 too."
IDS = list(range(100, 100 + len(TEXT)))  # one id a character


def _events(cuts: list[int]) -> list[Tokens]:
    edges = [0, *cuts, len(TEXT)]
    return [Tokens(a, IDS[a:b], TEXT[a:b]) for a, b in itertools.pairwise(edges) if a < b]


def _delivered(stream: Stream) -> tuple[list[int], str]:
    events = [event for event in stream.events if isinstance(event, Tokens)]
    return [token for event in events for token in event.ids], "".join(event.text for event in events)


@pytest.mark.parametrize("seed", range(50))
def test_a_restart_anywhere_delivers_everything_once(seed: int) -> None:
    draw = random.Random(seed)
    stream = Stream(Generate(prompt="x"))
    for _ in range(draw.randrange(4)):
        cut = draw.randrange(len(TEXT) + 1)
        for seq, event in enumerate(_events(sorted(draw.sample(range(1, len(TEXT)), 5))), 1):
            if event.index + len(event.ids) <= cut:
                stream.feed(seq, event)
        stream.restart()
    for seq, event in enumerate(_events(sorted(draw.sample(range(1, len(TEXT)), 4))), 1):
        stream.feed(seq, event)
        stream.feed(seq, event)  # and a repeated one is skipped
    stream.feed(99, done(IDS, TEXT))
    assert _delivered(stream) == (IDS, TEXT)
    assert stream.finished
    assert stream.error is None


def test_an_answer_from_the_log_is_completed_to_events() -> None:
    stream = Stream(Generate(prompt="x"))
    stream.feed(1, Tokens(0, IDS[:3], TEXT[:3]))
    stream.restart()
    stream.feed(1, done(IDS, TEXT))
    assert _delivered(stream) == (IDS, TEXT)


@pytest.mark.parametrize("late", [Tokens(0, [100, 7, 102], "Uxe"), done([100, 7], "Ux"), Tokens(2, [102], "e")])
def test_another_answer_than_before_ends_with_engine_died(late: object) -> None:
    stream = Stream(Generate(prompt="x"))
    stream.feed(1, Tokens(0, IDS[:2], TEXT[:2]))
    stream.restart()
    stream.feed(1, late)
    assert isinstance(stream.error, ErrorReply)
    assert stream.error.code is ErrorCode.ENGINE_DIED
    assert _delivered(stream) == (IDS[:2], TEXT[:2])


def test_text_held_back_for_a_stop_string_comes_without_ids() -> None:
    stream = Stream(Generate(prompt="x"))
    stream.feed(1, Tokens(0, [1, 2], ""))
    stream.feed(2, Tokens(2, [], "ab"))
    stream.restart()
    stream.feed(1, Tokens(0, [1], ""))
    stream.feed(2, Tokens(1, [2, 3], "abc"))
    assert _delivered(stream) == ([1, 2, 3], "abc")


def _link(stream: Stream) -> Link:
    link = Link(Limits(timeout=10, heartbeat=1))
    link.open(stream, 0.0)
    link.control(framing.encode(Header(stream.rid), Pong("b1", True)), 0.0)
    link.work_out.clear()
    link.control_out.clear()
    return link


def _pong(link: Link, stream: Stream, boot: str, known: bool, now: float = 0.0) -> list[object]:
    link.control(framing.encode(Header(stream.rid), Pong(boot, known)), now)
    sent = [framing.decode_request(frames)[1] for frames in link.work_out]
    link.work_out.clear()
    return sent


def test_a_quiet_stream_is_pinged_every_second_and_silence_is_noticed() -> None:
    stream = Stream(Generate(prompt="x"))
    link = _link(stream)
    assert link.tick(0.9) is Health.OK
    assert not link.control_out
    assert link.tick(1.0) is Health.OK
    assert isinstance(framing.decode_control(link.control_out[0])[1], Ping)
    assert link.tick(2.0) is Health.SUSPECT
    assert link.tick(10.9) is Health.SUSPECT
    assert link.tick(11.0) is Health.DEAD


def test_a_stream_the_broker_does_not_know_is_sent_again_after_two_answers() -> None:
    stream = Stream(Generate(prompt="x"))
    link = _link(stream)
    assert _pong(link, stream, "b1", False) == []
    assert _pong(link, stream, "b1", True) == []
    assert _pong(link, stream, "b1", False) == []
    assert _pong(link, stream, "b1", False) == [stream.body]


def test_requests_that_brokers_do_not_keep_are_waited_for_longer() -> None:
    stream = Stream(Status())
    link = _link(stream)
    assert [_pong(link, stream, "b1", False) for _ in range(9)] == [[]] * 9
    assert _pong(link, stream, "b1", False) == [stream.body]


def test_a_new_connection_to_the_same_broker_attaches() -> None:
    stream = Stream(Generate(prompt="x"))
    link = _link(stream)
    link.work(framing.encode(Header(stream.rid, 3), Tokens(0, [1], "a")), 0.0)
    link.reopened(1.0)
    assert _pong(link, stream, "b1", True) == [Attach(3)]


def test_a_new_broker_gets_the_request_again() -> None:
    stream = Stream(Generate(prompt="x"))
    link = _link(stream)
    link.work(framing.encode(Header(stream.rid, 3), Tokens(0, [1], "a")), 0.0)
    assert _pong(link, stream, "b2", False) == [stream.body]
    link.work(framing.encode(Header(stream.rid, 1), Tokens(0, [1, 2], "ab")), 0.0)
    assert _delivered(stream) == ([1, 2], "ab")


def test_what_must_not_happen_twice_is_not_sent_twice() -> None:
    stream = Stream(SessionFork("a", "b"))
    link = _link(stream)
    assert _pong(link, stream, "b2", False) == []
    assert isinstance(stream.error, DaemonUnavailable)
    assert "may or may not" in stream.error.message


def test_a_request_lost_again_and_again_ends() -> None:
    stream = Stream(Generate(prompt="x"))
    link = _link(stream)
    for boot in ("b2", "b3", "b4", "b5"):
        _pong(link, stream, boot, False)
    assert isinstance(stream.error, ErrorReply)
    assert stream.error.code is ErrorCode.INTERNAL
    assert not link.busy


def test_a_retry_waits_and_keeps_what_was_delivered() -> None:
    stream = Stream(Generate(prompt="x"), retries=1)
    link = _link(stream)
    died = Error.of(ErrorReply(ErrorCode.ENGINE_DIED, "killed"))
    link.work(framing.encode(Header(stream.rid, 1), Tokens(0, [1], "a")), 0.0)
    link.work(framing.encode(Header(stream.rid, 2), died), 0.0)
    assert not stream.finished
    assert link.wait(0.0) <= 0.1
    link.tick(0.2)
    assert framing.decode_request(link.work_out.popleft())[1] == stream.body
    link.work(framing.encode(Header(stream.rid, 1), Tokens(0, [1, 2], "ab")), 0.3)
    link.work(framing.encode(Header(stream.rid, 2), died), 0.4)
    assert _delivered(stream) == ([1, 2], "ab")
    assert isinstance(stream.error, ErrorReply)
    assert stream.error.retryable


def test_a_request_id_must_be_one() -> None:
    link = Link(Limits())
    with pytest.raises(ErrorReply, match="request id"):
        link.open(Stream(Status(), rid="a/b"), 0.0)
    with pytest.raises(ErrorReply, match="request id"):
        link.cancel("")
    assert not link.busy


def test_tokens_on_their_way_before_an_attach_are_taken_in_their_place() -> None:
    stream = Stream(Attach(0), rid="r")
    stream.feed(2, Tokens(1, IDS[1:2], TEXT[1:2]))
    for n in range(2):
        stream.feed(1 + n, Tokens(n, IDS[n : n + 1], TEXT[n : n + 1]))
    assert stream.error is None
    assert stream.ids == IDS[:2]
