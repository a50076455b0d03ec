"""Both clients over real sockets against a scripted broker that is cut, frozen, replaced or wrong."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from atlas_client import AsyncClient, Client, DaemonUnavailable, ErrorCode, ErrorReply
from atlas_client.protocol import (
    Accepted,
    Attach,
    Cancel,
    Credit,
    Done,
    Error,
    Generate,
    Hello,
    Progress,
    SessionFork,
    SessionInfo,
    SessionReply,
    SessionsReply,
    Status,
    Tokens,
    Welcome,
)  # fmt: skip
from client_support import ScriptedBroker, Send, done, tokens

QUICK = {"timeout": 0.6, "reconnect": 8.0, "heartbeat": 0.1}
IDS, TEXT = [1, 2, 3, 4], "abcd"


def _whole(rid: str, body: Any, send: Send) -> None:
    send(Accepted(0))
    send(tokens(0, IDS[:2], TEXT[:2]))
    send(tokens(2, IDS[2:], TEXT[2:]))
    send(done(IDS, TEXT))


def _half(rid: str, body: Any, send: Send) -> None:
    send(Accepted(0))
    send(tokens(0, IDS[:2], TEXT[:2]))


def _sync(path: Path, between: Callable[[], None]) -> tuple[str, Done]:
    """Reads a generation; `between` is called after the first text."""
    with Client(path, **QUICK) as client:
        generation = client.generate("x")
        pieces = generation.texts()
        got = [next(pieces)]
        between()
        got += pieces
        return "".join(got), generation.result


def _async(path: Path, between: Callable[[], None]) -> tuple[str, Done]:
    async def read() -> tuple[str, Done]:
        async with AsyncClient(path, **QUICK) as client:
            generation = await client.generate("x")
            got = ""
            async for piece in generation.texts():
                if not got:
                    await asyncio.to_thread(between)
                got += piece
            return got, await generation.result()

    return asyncio.run(read())


both = pytest.mark.parametrize("read", [_sync, _async])
Read = Callable[[Path, Callable[[], None]], tuple[str, Done]]


@both
def test_a_stream_is_read_to_its_end(root: Path, read: Read) -> None:
    with ScriptedBroker(root / "s", _whole):
        text, result = read(root / "s", lambda: None)
    assert text == TEXT
    assert result.tokens == IDS


@both
def test_a_generation_survives_the_broker(root: Path, read: Read) -> None:
    first = ScriptedBroker(root / "s", _half, "b1")
    second = ScriptedBroker(root / "s", _whole, "b2")
    first.__enter__()

    def replace() -> None:
        first.__exit__()
        time.sleep(0.3)  # nobody there for a while
        second.__enter__()

    text, result = read(root / "s", replace)
    second.__exit__()
    assert text == TEXT
    assert result.tokens == IDS
    assert all(request == first.requests[0] for request in second.requests)  # same id, body and seed
    assert first.requests[0][1].sampling.seed is not None


@both
def test_another_answer_after_the_restart_is_an_error(root: Path, read: Read) -> None:
    first = ScriptedBroker(root / "s", _half, "b1")
    second = ScriptedBroker(root / "s", lambda rid, body, send: send(done([1, 9, 9, 9], "axxx")), "b2")
    first.__enter__()

    def replace() -> None:
        first.__exit__()
        second.__enter__()

    with pytest.raises(ErrorReply) as caught:
        read(root / "s", replace)
    second.__exit__()
    assert caught.value.code is ErrorCode.ENGINE_DIED


@both
def test_a_frozen_broker_that_wakes_is_attached_to(root: Path, read: Read) -> None:
    def script(rid: str, body: Any, send: Send) -> None:
        if isinstance(body, Generate):
            broker.known.add(rid)
            _half(rid, body, send)
        else:
            send(tokens(2, IDS[2:], TEXT[2:]), seq=3)
            send(done(IDS, TEXT), seq=4)

    def freeze() -> None:
        broker.mute = True
        threading.Timer(1.0, lambda: setattr(broker, "mute", False)).start()

    with ScriptedBroker(root / "s", script) as broker:
        text, _ = read(root / "s", freeze)
        kinds = [type(body) for _, body in broker.requests]
        assert kinds.count(Generate) == 1
        assert Attach(2) in [body for _, body in broker.requests]
    assert text == TEXT


@both
def test_a_broker_that_stays_away_is_given_up(root: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUICK, "reconnect", 0.5)
    broker = ScriptedBroker(root / "s", _half)
    broker.__enter__()
    start = time.monotonic()
    with pytest.raises(DaemonUnavailable, match="did not come back") as caught:
        read(root / "s", broker.__exit__)
    assert time.monotonic() - start < 5
    assert "atlasctl up" in caught.value.next_step


@both
def test_a_request_the_broker_lost_is_sent_again(root: Path, read: Read) -> None:
    def script(rid: str, body: Any, send: Send) -> None:
        _half(rid, body, send) if len(broker.requests) == 1 else _whole(rid, body, send)

    with ScriptedBroker(root / "s", script) as broker:
        text, _ = read(root / "s", lambda: None)
        assert len(broker.requests) == 2
    assert text == TEXT


def test_no_daemon_and_a_stale_socket(root: Path) -> None:
    with pytest.raises(DaemonUnavailable, match="no daemon is listening") as caught:
        Client(root / "s").status()
    assert not caught.value.refused
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(root / "s"))
    assert (root / "s").exists()
    with pytest.raises(DaemonUnavailable, match="no daemon is listening"):
        Client(root / "s").status()
    with pytest.raises(DaemonUnavailable, match="longer than"):
        Client(root / ("s" * 120)).status()


def test_no_daemon_for_the_asyncio_client(root: Path) -> None:
    async def ask() -> None:
        async with AsyncClient(root / "s") as client:
            await client.status()

    with pytest.raises(DaemonUnavailable, match="no daemon is listening"):
        asyncio.run(ask())


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_access_denied_is_said_at_once(root: Path) -> None:
    root.chmod(0o755)
    code = (
        "import os, sys; from pathlib import Path\n"
        "from atlas_client.errors import DaemonUnavailable; from atlas_client.transport import probe\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: probe(Path(sys.argv[1]))\n"
        "except DaemonUnavailable as error: sys.exit(40 + error.refused)\n"
    )
    with ScriptedBroker(root / "s", _whole):
        (root / "s").chmod(0o660)
        assert subprocess.run([sys.executable, "-c", code, str(root / "s")]).returncode == 41


def test_generations_of_one_thread_are_told_apart(root: Path) -> None:
    waiting: list[tuple[str, Send]] = []

    def script(rid: str, body: Any, send: Send) -> None:
        waiting.append((body.prompt, send))
        if len(waiting) == 3:
            for index in range(4):
                for prompt, reply in waiting:
                    reply(tokens(index, [index], prompt))
            for prompt, reply in waiting:
                reply(done([0, 1, 2, 3], prompt * 4))

    with ScriptedBroker(root / "s", script), Client(root / "s") as client:
        generations = [client.generate(prompt) for prompt in "abc"]
        assert [generation.text for generation in reversed(generations)] == ["cccc", "bbbb", "aaaa"]
        assert [generation.received for generation in generations] == ["aaaa", "bbbb", "cccc"]


def test_each_thread_may_generate(root: Path) -> None:
    def script(rid: str, body: Any, send: Send) -> None:
        for index in range(50):
            send(tokens(index, [index], body.prompt))
        send(done(list(range(50)), body.prompt * 50))

    texts: dict[str, str] = {}
    with ScriptedBroker(root / "s", script), Client(root / "s") as client:

        def work(prompt: str) -> None:
            texts[prompt] = "".join(client.generate(prompt).texts())

        threads = [threading.Thread(target=work, args=(prompt,)) for prompt in "abcdefgh"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert texts == {prompt: prompt * 50 for prompt in "abcdefgh"}


def test_many_generations_on_one_asyncio_client(root: Path) -> None:
    def script(rid: str, body: Any, send: Send) -> None:
        send(tokens(0, [1], body.prompt))
        send(done([1], body.prompt))

    async def read() -> list[str]:
        async with AsyncClient(root / "s") as client:

            async def one(number: int) -> str:
                return await (await client.generate(str(number))).text()

            return await asyncio.gather(*map(one, range(100)))

    with ScriptedBroker(root / "s", script):
        assert asyncio.run(read()) == [str(number) for number in range(100)]


def test_cancel_takes_the_control_socket_and_leaving_cancels(root: Path) -> None:
    with ScriptedBroker(root / "s", _half) as broker, Client(root / "s", **QUICK) as client:
        with client.generate("x") as generation:
            assert next(generation.texts()) == "ab"
            rid = generation.request_id
        end = time.monotonic() + 5
        while rid not in broker.seen(Cancel) and time.monotonic() < end:
            time.sleep(0.01)
        assert rid in broker.seen(Cancel)


def test_credit_is_granted_as_events_are_taken(root: Path) -> None:
    with ScriptedBroker(root / "s", _half) as broker, Client(root / "s") as client:
        generation = client.generate("x", credit=2)
        assert next(generation.texts()) == "ab"
        assert broker.requests[0][1].credit == 2
        end = time.monotonic() + 5
        while len(broker.seen(Credit)) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        assert broker.seen(Credit) == [generation.request_id] * 2


def test_errors_keep_code_retryable_and_next_step(root: Path) -> None:
    def script(rid: str, body: Any, send: Send) -> None:
        if body.prompt == "new":
            send(Error("FROM_THE_FUTURE", "what", True, "wait"))
        elif body.prompt == "garbage":
            send([msgspec.msgpack.encode({"rid": rid, "seq": 1}), b"\xc1"])
        else:
            send(Error("ENGINE_DIED", "killed", True, "again"))

    with ScriptedBroker(root / "s", script), Client(root / "s") as client:
        caught = {}
        for prompt in ("died", "new", "garbage"):
            with pytest.raises(ErrorReply) as error:
                client.generate(prompt).text  # noqa: B018
            caught[prompt] = error.value
    assert (caught["died"].code, caught["died"].retryable, caught["died"].next_step) == ("ENGINE_DIED", True, "again")
    assert caught["new"].code == "INTERNAL"
    assert "FROM_THE_FUTURE" in caught["new"].message
    assert caught["garbage"].code == "BAD_FRAME"


def test_retries_send_the_request_again(root: Path) -> None:
    def script(rid: str, body: Any, send: Send) -> None:
        if len(broker.requests) == 1:
            _half(rid, body, send)
            send(Error("ENGINE_DIED", "killed", True, "again"))
        else:
            _whole(rid, body, send)

    with ScriptedBroker(root / "s", script) as broker, Client(root / "s") as client:
        assert "".join(client.generate("x", retries=1).texts()) == TEXT
        assert broker.requests[0] == broker.requests[1]


def test_a_request_over_the_limit_is_refused_before_it_is_sent(root: Path) -> None:
    def script(rid: str, body: Any, send: Send) -> None:
        if isinstance(body, Hello):
            send(Welcome(1, "test", "b1", [], 1000, 2 * 2**20))
        else:
            send(done([], ""))

    with ScriptedBroker(root / "s", script) as broker, Client(root / "s") as client:
        with pytest.raises(ErrorReply, match=r"3\.0 MiB") as caught:
            client.generate("x" * 3 * 2**20)
        assert caught.value.code is ErrorCode.INVALID_PARAMETER
        assert client.generate("x" * (2**20 + 2**19)).text == ""
        assert [type(body) for _, body in broker.requests] == [Hello, Generate]


def test_what_can_not_be_sent_is_refused(root: Path) -> None:
    with ScriptedBroker(root / "s", _whole) as broker, Client(root / "s") as client:
        for bad in ({"prompt": None}, {"prompt": "a", "tokens": [1]}, {"prompt": "\ud800"}, {"tokens": [2**80]}):
            with pytest.raises(ErrorReply) as caught:
                client.generate(**bad)  # type: ignore[arg-type]
            assert caught.value.code is ErrorCode.INVALID_PARAMETER
        with pytest.raises(ErrorReply, match="role"):
            client.generate(messages=[{"role": "user"}])
        with pytest.raises(TypeError, match="temprature"):
            client.generate("x", temprature=1)  # type: ignore[call-arg]
        assert broker.requests == []


def test_progress_of_a_call_is_reported_and_a_wrong_reply_is_an_error(root: Path) -> None:
    def script(rid: str, body: Any, send: Send) -> None:
        if isinstance(body, SessionFork):
            send(SessionReply(SessionInfo("b", "1", 0, 0, 0.0, 0.0)))
        elif isinstance(body, Status):
            send(SessionsReply([]))
        else:
            send(Progress("prefill", 1, 2))
            send(done([], ""))

    seen: list[Progress] = []
    with ScriptedBroker(root / "s", script), Client(root / "s") as client:
        client.session("a").append("text", on_progress=seen.append)
        assert client.session("a").fork("b").name == "b"
        with pytest.raises(ErrorReply, match="SessionsReply came where StatusReply was due"):
            client.status()
    assert seen == [Progress("prefill", 1, 2)]


def test_a_fork_is_not_repeated_to_a_new_broker(root: Path) -> None:
    first = ScriptedBroker(root / "s", lambda rid, body, send: first._end.set(), "b1")
    second = ScriptedBroker(root / "s", _whole, "b2")
    with first, Client(root / "s", **QUICK) as client:
        threading.Thread(target=lambda: (first._thread.join(), second.__enter__())).start()
        with pytest.raises(DaemonUnavailable, match="may or may not"):
            client.session("a").fork("b")
        second.__exit__()
        assert second.requests == []


def test_events_are_typed(root: Path) -> None:
    with ScriptedBroker(root / "s", _whole), Client(root / "s") as client:
        events = list(client.generate("x"))
    assert [type(event) for event in events] == [Accepted, Tokens, Tokens, Done]
