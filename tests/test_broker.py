"""The broker against a scripted engine: requests, streams, sessions, errors."""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from atlas_client.protocol import (
    Accepted,
    Archive,
    Attach,
    Cancel,
    ChatMessage,
    Credit,
    Done,
    Error,
    Generate,
    Hello,
    ModelList,
    ModelsReply,
    Ok,
    Ping,
    Progress,
    Sampling,
    SessionAppend,
    SessionCheckpoint,
    SessionDelete,
    SessionDetail,
    SessionExport,
    SessionFork,
    SessionImport,
    SessionList,
    SessionOpen,
    SessionRename,
    SessionReply,
    SessionShow,
    SessionTruncate,
    Status,
    Tokens,
    Welcome,
)
from broker_support import Client, Daemon, daemon_at, is_error, text_tokens, until
from scripted_engine import expected, prompt_tokens

SLOW = '{"n": 200, "delay": 0.02}'


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(prefix="atlas-") as directory:
        for daemon in daemon_at(Path(directory)):
            daemon.ready().close()
            yield daemon


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    client = daemon.client()
    yield client
    client.close()


def slow(client: Client, session: str | None = None, **rest: object) -> str:
    rid = client.send(Generate(prompt=SLOW, session=session, **rest))  # type: ignore[arg-type]
    client.wait_for(rid, Tokens, 2)
    return rid


def history(client: Client, session: str) -> list[int]:
    detail, raw = client.ask_raw(SessionShow(session))
    assert isinstance(detail, SessionDetail), detail
    return array("I", raw[0]).tolist()


# --- one request ------------------------------------------------------------------------------------------


def test_generate_streams_what_the_engine_made_and_ends_once(client: Client) -> None:
    events = client.events(client.send(Generate(prompt="hello", sampling=Sampling(max_tokens=9))))
    replies = [body for _, body, _ in events]
    assert [seq for seq, _, _ in events] == list(range(1, len(events) + 1))
    assert isinstance(replies[0], Accepted)
    assert any(isinstance(reply, Progress) and reply.phase == "prefill" for reply in replies)
    done = replies[-1]
    assert isinstance(done, Done)
    assert done.tokens == text_tokens(replies) == expected(prompt_tokens("hello"), 9)
    assert done.text == "".join(reply.text for reply in replies if isinstance(reply, Tokens))
    assert not done.durable
    assert not client.receive(0.05)


def test_no_tokens_events_without_stream(client: Client) -> None:
    replies = client.replies(client.send(Generate(prompt="hello", stream=False)))
    assert not any(isinstance(reply, Tokens) for reply in replies)
    assert len(replies[-1].tokens) == 4


@pytest.mark.parametrize(
    "request_",
    [
        Generate(),
        Generate(prompt="a", tokens=[1]),
        Generate(prompt="a", messages=[ChatMessage("user", "b")]),
        Generate(messages=[]),
        Generate(tokens=[2**32]),
        Generate(prompt="a", session=" a"),
        Generate(prompt="a", session="a\n"),
        Generate(prompt="a", session="\x00"),
        Generate(prompt="a", session="ä" * 101),
        SessionOpen("tab\there"),
        SessionOpen(""),
    ],
)
def test_invalid_parameters(client: Client, request_: object) -> None:
    assert is_error(client.ask(request_), "INVALID_PARAMETER")


def test_another_model_is_not_loaded(client: Client) -> None:
    assert is_error(client.generate(model="other"), "MODEL_NOT_LOADED")
    assert isinstance(client.generate(model="demo"), Done)


def test_engine_errors_reach_the_client(client: Client) -> None:
    reply = client.generate('{"at": 2, "do": "fail", "code": "CONTEXT_OVERFLOW"}', session="overflow")
    assert is_error(reply, "CONTEXT_OVERFLOW")
    assert history(client, "overflow") == []


def test_hello_ping_status_models(client: Client) -> None:
    welcome = client.ask(Hello("test"))
    assert isinstance(welcome, Welcome)
    assert welcome.version == 1
    assert is_error(client.ask(Hello("test", versions=[7])), "UNSUPPORTED_VERSION")
    assert client.pong(Ping()).boot == welcome.boot
    status = until(lambda: (s := client.ask(Status())).tiers and s, "tiers of a beat")
    assert status.engine_state == "ready"
    assert status.warnings == ["scripted"]
    assert 0 < status.rss_bytes < 60 * 10**6
    models = client.ask(ModelList())
    assert isinstance(models, ModelsReply)
    assert models.models[0].name == "demo"
    assert models.models[0].state == "ready"


def test_seed_is_drawn_reported_and_follows_from_the_request(client: Client) -> None:
    first, second = client.generate(), client.generate()
    assert first.seed != second.seed
    owner = client.daemon.state.stat().st_uid
    rid = client.send(Generate(prompt="x"))
    drawn = int.from_bytes(hashlib.blake2b(f"{owner}/{rid}".encode(), digest_size=8).digest(), "little") >> 1
    assert client.replies(rid)[-1].seed == drawn
    assert client.ask(Generate(prompt="x", sampling=Sampling(seed=7))).seed == 7


# --- request ids ------------------------------------------------------------------------------------------


def test_a_finished_request_is_answered_again_not_run_again(client: Client) -> None:
    request = Generate(prompt="again", session="again")
    rid = client.send(request)
    first = client.events(rid)
    client.send(request, rid)
    second = client.events(rid)
    numbers = {seq for seq, _, _ in second}
    assert [e for e in first if e[0] in numbers] == second
    assert len(history(client, "again")) == len("again") + 4


def test_one_id_for_two_requests_is_refused(client: Client) -> None:
    rid = client.send(Generate(prompt="one"))
    client.replies(rid)
    client.send(Generate(prompt="two"), rid)
    assert is_error(client.replies(rid)[-1], "INVALID_PARAMETER")


def test_a_live_request_sent_again_is_replayed_from_the_start(daemon: Daemon, client: Client) -> None:
    request = Generate(prompt='{"n": 40, "delay": 0.01}', session="live")
    rid = client.send(request)
    client.wait_for(rid, Tokens, 3)
    other = daemon.client()
    other.send(request, rid)
    replies = other.replies(rid)
    assert text_tokens(replies) == replies[-1].tokens
    assert len(replies[-1].tokens) == 40


def test_attach_goes_on_after_the_last_number(daemon: Daemon, client: Client) -> None:
    rid = client.send(Generate(prompt='{"n": 60, "delay": 0.01}', session="attach"))
    client.wait_for(rid, Tokens, 5)
    seen = client.seen.pop(rid)
    client.close()
    other = daemon.client()
    other.send(Attach(seen[-1][0]), rid)
    rest = other.events(rid)
    assert rest[0][0] == seen[-1][0] + 1
    ids = text_tokens([body for _, body, _ in [*seen, *rest]])
    assert ids == rest[-1][1].tokens
    assert len(ids) == 60
    other.close()


def test_attach_to_an_unknown_request(client: Client) -> None:
    assert is_error(client.ask(Attach(0)), "INVALID_PARAMETER")


def test_pong_knows_the_streams(client: Client) -> None:
    rid = slow(client)
    assert client.pong(Ping(), rid).known
    assert not client.pong(Ping(), "nobody").known
    client.order(Cancel(), rid)
    client.replies(rid)


# --- ending early -----------------------------------------------------------------------------------------


def test_cancel_of_a_running_turn_leaves_the_session_as_it_was(client: Client) -> None:
    client.generate("first", session="cancelled")
    before = history(client, "cancelled")
    rid = slow(client, "cancelled")
    client.order(Cancel(), rid)
    assert is_error(client.replies(rid)[-1], "CANCELLED")
    assert history(client, "cancelled") == before
    assert isinstance(client.generate("next", session="cancelled"), Done)


def test_cancel_that_overtakes_its_request(client: Client) -> None:
    client.pong(Ping())
    client.order(Cancel(), "overtaken")
    client.pong(Ping())
    client.send(Generate(prompt=SLOW), "overtaken")
    assert is_error(client.replies("overtaken")[-1], "CANCELLED")


def test_deadline(client: Client) -> None:
    client.generate("a", session="deadline")
    reply = client.ask(Generate(prompt=SLOW, session="deadline", deadline_ms=200))
    assert is_error(reply, "DEADLINE")
    assert isinstance(client.generate("b", session="deadline"), Done)


def test_an_anonymous_request_ends_with_its_client(daemon: Daemon, client: Client) -> None:
    gone = daemon.client()
    slow(gone)
    assert client.ask(Status()).running == 1
    gone.close()
    until(lambda: client.ask(Status()).running == 0, "the request of a vanished client ends", 2.0)


def test_a_session_turn_goes_on_without_its_client(daemon: Daemon, client: Client) -> None:
    gone = daemon.client()
    rid = gone.send(Generate(prompt='{"n": 30, "delay": 0.01}', session="detached"))
    gone.wait_for(rid, Tokens, 1)
    gone.close()
    until(lambda: history(client, "detached"), "the turn is stored")
    client.send(Attach(0), rid)
    assert len(client.replies(rid)[-1].tokens) == 30


# --- flow control -----------------------------------------------------------------------------------------


def test_credit_bounds_what_is_sent(client: Client) -> None:
    rid = client.send(Generate(prompt="credit", sampling=Sampling(max_tokens=20), credit=5))
    client.wait_for(rid, Tokens, 3)
    while client.receive(0.2):
        pass
    assert len(client.seen[rid]) == 5
    client.order(Credit(100), rid)
    replies = client.replies(rid)
    assert text_tokens(replies) == replies[-1].tokens
    assert len(replies[-1].tokens) == 20


def test_a_client_that_stops_reading_stalls_itself_alone(daemon: Daemon, client: Client) -> None:
    lazy = daemon.client()
    rid = lazy.send(Generate(prompt='{"pad": 2000}', sampling=Sampling(max_tokens=300_000), credit=3))
    lazy.wait_for(rid, Tokens, 1)
    for _ in range(20):
        assert isinstance(client.generate(), Done)
    until(lambda: client.ask(Status()).running == 0, "the stream past the cap ends", 60.0)
    lazy.order(Credit(10_000_000), rid)
    assert is_error(lazy.replies(rid, 60.0)[-1], "SLOW_CONSUMER")
    lazy.close()


def test_a_client_that_never_reads_its_socket(daemon: Daemon, client: Client) -> None:
    deaf = Client(daemon, hwm=1)
    rid = deaf.send(Generate(prompt='{"pad": 2000}', sampling=Sampling(max_tokens=200_000)))
    until(lambda: client.ask(Status()).running == 1, "it runs")
    assert isinstance(client.generate(), Done)
    until(lambda: client.ask(Status()).running == 0, "the stream past the cap ends", 60.0)
    replies = deaf.replies(rid, 60.0)
    text_tokens(replies)
    assert is_error(replies[-1], "SLOW_CONSUMER")
    deaf.close()


# --- sessions ---------------------------------------------------------------------------------------------


def test_turns_follow_each_other_and_are_durable(client: Client) -> None:
    ids: list[int] = []
    for turn in ("one", "two", "three"):
        done = client.generate(turn, session="chain", tokens=7)
        assert done.durable
        assert done.kv_durable
        ids += prompt_tokens(turn)
        assert done.tokens == expected(ids, 7)
        ids += done.tokens
    detail, raw = client.ask_raw(SessionShow("chain", text=True))
    assert array("I", raw[0]).tolist() == ids
    assert [(t.prompt, t.start, t.prompt_tokens, t.generated_tokens) for t in detail.turns] == [
        ("one", 0, 3, 7),
        ("two", 10, 3, 7),
        ("three", 20, 5, 7),
    ]
    assert detail.info.tokens == 32
    assert detail.info.model == "demo"


def test_append_computes_and_generates_nothing(client: Client) -> None:
    done = client.ask(SessionAppend(session="appended", prompt="text"))
    assert (done.finish_reason, done.tokens, done.durable) == ("append", [], True)
    assert history(client, "appended") == prompt_tokens("text")


def test_one_running_turn_per_session(client: Client) -> None:
    client.generate("x", session="busy")
    rid = slow(client, "busy")
    for request in (
        Generate(prompt="y", session="busy"),
        SessionTruncate("busy", turns=0),
        SessionRename("busy", "idle"),
        SessionDelete("busy"),
        SessionDelete("busy", purge=True),
    ):
        assert is_error(client.ask(request), "SESSION_BUSY"), request
    assert next(i for i in client.ask(SessionList()).sessions if i.name == "busy").busy
    assert isinstance(client.ask(SessionFork("busy", "while-busy")), SessionReply)
    client.order(Cancel(), rid)
    client.replies(rid)
    assert isinstance(client.ask(SessionRename("busy", "idle")), SessionReply)


def test_fork_truncate_rename_delete(client: Client) -> None:
    for turn in ("one", "two", "three"):
        client.generate(turn, session="tree", tokens=5)
    ids = history(client, "tree")
    fork = client.ask(SessionFork("tree", "branch", at_turn=2)).info
    assert (fork.turns, fork.tokens, fork.forked_at) == (2, 16, 16)
    assert fork.parent == client.ask(SessionOpen("tree")).info.id
    assert client.ask(SessionFork("tree", "twig", at_token=11)).info.tokens == 11
    assert history(client, "twig") == ids[:11]
    assert client.ask(SessionTruncate("tree", tokens=10)).info.turns == 2
    assert history(client, "tree") == ids[:10]
    assert client.generate("go", session="tree").tokens == expected(ids[:10] + prompt_tokens("go"), 4)
    assert history(client, "branch") == ids[:16]
    assert is_error(client.ask(SessionTruncate("tree", turns=9)), "INVALID_PARAMETER")
    assert is_error(client.ask(SessionTruncate("tree")), "INVALID_PARAMETER")
    assert is_error(client.ask(SessionFork("tree", "branch")), "INVALID_PARAMETER")
    assert is_error(client.ask(SessionRename("branch", "tree")), "INVALID_PARAMETER")
    assert client.ask(SessionRename("branch", "naïve 会話 ‘x’")).info.name == "naïve 会話 ‘x’"
    assert isinstance(client.ask(SessionDelete("naïve 会話 ‘x’", purge=True)), Ok)
    assert is_error(client.ask(SessionShow("branch")), "NO_SUCH_SESSION")
    assert isinstance(client.ask(SessionCheckpoint("tree")), Ok)
    assert is_error(client.ask(SessionCheckpoint("nowhere")), "NO_SUCH_SESSION")
    assert is_error(client.ask(SessionOpen("nowhere", create=False)), "NO_SUCH_SESSION")


def test_export_import(client: Client) -> None:
    client.generate("carry me", session="source")
    archive, raw = client.ask_raw(SessionExport("source"))
    assert isinstance(archive, Archive)
    assert client.ask(SessionImport("copy"), raw=(raw[0],)).info.tokens == archive.info.tokens
    assert history(client, "copy") == history(client, "source")
    for damaged in (b"", raw[0][:-1], raw[0][:20], raw[0][:60] + b"\xff" + raw[0][61:], b"X" + raw[0][1:]):
        assert is_error(client.ask(SessionImport("bad"), raw=(damaged,)), "INVALID_PARAMETER")
    assert is_error(client.ask(SessionImport("bad")), "INVALID_PARAMETER")
    assert is_error(client.ask(SessionImport("copy"), raw=(raw[0],)), "INVALID_PARAMETER")


def test_small_requests_are_run_once_too(client: Client) -> None:
    client.generate("x", session="once")
    rid = client.send(SessionFork("once", "twice"))
    first = client.replies(rid)
    client.send(SessionFork("once", "twice"), rid)
    assert client.replies(rid) == first
    assert not isinstance(first[-1], Error)
