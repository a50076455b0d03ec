"""The scheduler decides alone: no model, no pages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from atlasd.engine.request import Request, State
from atlasd.engine.scheduler import Scheduler


def _request(name: str, prompt: int, computed: int = 0, generated: int = 0) -> Any:
    """A request with `computed` of its tokens in pages."""
    request = Request(
        submit=SimpleNamespace(rid=name, session=None, arrived=0.0),  # type: ignore[arg-type]
        history=[],
        prompt=list(range(prompt)),
        prompt_text="",
        max_tokens=100,
        decoder=None,  # type: ignore[arg-type]
        sampler=None,  # type: ignore[arg-type]
    )
    request.tokens += list(range(generated))
    request.kv = SimpleNamespace(length=computed)  # type: ignore[assignment]
    request.state = State.RUNNING
    return request


def _running(scheduler: Scheduler, *requests: Request) -> None:
    scheduler.running.extend(requests)


def test_every_decoding_request_gets_its_token_and_prefills_share_the_chunk() -> None:
    scheduler = Scheduler(max_batch=8, chunk=100)
    decoding, long, short = _request("d", 10, 10, 1), _request("l", 250, 0), _request("s", 30, 0)
    _running(scheduler, decoding, long, short)
    assert [(p.request.rid, p.count, p.sample) for p in scheduler.plan()] == [("d", 1, True), ("l", 100, False)]
    long.kv.length = 200
    assert [(p.request.rid, p.count, p.sample) for p in scheduler.plan()] == [
        ("d", 1, True),
        ("l", 50, True),
        ("s", 30, True),
    ]


def test_a_one_token_prompt_is_a_prefill_and_still_sampled() -> None:
    scheduler = Scheduler(max_batch=8, chunk=100)
    _running(scheduler, _request("one", 1))
    assert [(p.count, p.sample) for p in scheduler.plan()] == [(1, True)]


def test_requests_that_wait_for_pages_are_not_planned() -> None:
    scheduler = Scheduler(max_batch=8, chunk=100)
    restoring = _request("r", 10)
    restoring.state = State.RESTORING
    _running(scheduler, restoring)
    assert scheduler.plan() == []


def test_admission_is_first_come_first_served_and_bounded() -> None:
    scheduler = Scheduler(max_batch=2, chunk=100)
    for name in "abc":
        scheduler.add(_request(name, 10))
    began: list[str] = []
    scheduler.admit(lambda r: began.append(r.rid) or True)  # type: ignore[func-returns-value]
    assert began == ["a", "b"]
    assert [r.rid for r in scheduler.waiting] == ["c"]


def test_nobody_overtakes_a_request_that_finds_no_pages() -> None:
    scheduler = Scheduler(max_batch=4, chunk=100)
    for name in ("large", "small"):
        scheduler.add(_request(name, 10))
    scheduler.admit(lambda r: r.rid == "small")
    assert scheduler.running == []
    assert [r.rid for r in scheduler.waiting] == ["large", "small"]


def test_a_request_failed_while_admitted_is_not_run() -> None:
    scheduler = Scheduler(max_batch=4, chunk=100)
    for name in ("bad", "good"):
        scheduler.add(_request(name, 10))

    def begin(request: Request) -> bool:
        if request.rid == "bad":
            scheduler.remove(request)
        return True

    scheduler.admit(begin)
    assert [r.rid for r in scheduler.running] == ["good"]
    assert not scheduler.waiting


def test_the_youngest_gives_way_and_goes_to_the_head_of_the_queue() -> None:
    scheduler = Scheduler(max_batch=4, chunk=100)
    old, middle, young = (_request(n, 10) for n in ("old", "middle", "young"))
    _running(scheduler, old, middle, young)
    scheduler.add(_request("waiting", 10))
    assert scheduler.victim(old) is young
    assert scheduler.victim(young) is None
    scheduler.requeue(young)
    assert [r.rid for r in scheduler.waiting] == ["young", "waiting"]
    assert young.state is State.QUEUED
