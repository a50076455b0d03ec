"""The clients against the real daemon: every operation, cancel, and lives that end."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest
from atlas_client import AsyncClient, Client, ErrorCode, ErrorReply
from atlas_client.protocol import Accepted, Done, Tokens
from conftest import Daemon

PROMPT = "def read_lines(path):\n"


def test_text_events_and_result_agree(shared_daemon: Daemon) -> None:
    with Client(shared_daemon.socket) as client:
        events = list(client.generate(PROMPT, max_tokens=8, temperature=0))
        again = client.generate(PROMPT, max_tokens=8, temperature=0)
        assert "".join(again.texts()) == again.result.text == again.text
    assert isinstance(events[0], Accepted)
    done = events[-1]
    assert isinstance(done, Done)
    pieces = [event for event in events if isinstance(event, Tokens)]
    assert [token for piece in pieces for token in piece.ids] == done.tokens == again.tokens
    assert "".join(piece.text for piece in pieces) == done.text == again.text


def test_a_session_from_open_to_delete(shared_daemon: Daemon) -> None:
    with Client(shared_daemon.socket) as client:
        with client.session("client life") as session:
            first = session.generate(PROMPT, max_tokens=6, temperature=0).result
            assert first.durable
            assert session.append("# more\n").finish_reason == "append"
            ids = session.token_ids()
            assert session.info().tokens == len(ids)
            fork = session.fork("client fork", at_turn=1)
            assert fork.token_ids() == ids[: len(fork.token_ids())]
            assert session.truncate(turns=1).turns == 1
            assert session.rename("client new name").name == session.name
            assert [turn.text for turn in session.show(text=True).turns] == [first.text]
            session.checkpoint()
            archive = session.export()
        copy = client.import_session("client copy", archive)
        assert copy.tokens == len(session.token_ids())
        names = {info.name for info in client.sessions()}
        assert {"client new name", "client fork", "client copy"} <= names
        for name in ("client new name", "client fork", "client copy"):
            client.session(name).delete()
        with pytest.raises(ErrorReply) as caught:
            client.session("client copy", create=False).open()
        assert caught.value.code is ErrorCode.NO_SUCH_SESSION


def test_the_asyncio_client_does_the_same(shared_daemon: Daemon) -> None:
    async def work() -> None:
        async with AsyncClient(shared_daemon.socket) as client:
            together = [await client.generate(PROMPT, max_tokens=8, temperature=0) for _ in range(4)]
            results = await asyncio.gather(*(generation.result() for generation in together))
            assert len({tuple(result.tokens) for result in results}) == 1
            async with client.session("async life") as session:
                result = await (await session.generate(PROMPT, max_tokens=8, temperature=0)).result()
                assert result.text == results[0].text
                fork = await session.fork("async fork")
                assert await fork.token_ids() == await session.token_ids()
                archive = await session.export()
                assert (await session.append("# x\n")).durable
                assert (await session.truncate(turns=1)).turns == (await session.info()).turns == 1
                await session.checkpoint()
                await session.rename("async renamed")
            assert (await client.import_session("async copy", archive)).turns == 1
            assert (await client.models())[0].state == "ready"
            assert (await client.hello()).version == 1
            names = {info.name for info in await client.sessions()}
            assert {"async renamed", "async fork", "async copy"} <= names
            for name in ("async renamed", "async fork", "async copy"):
                await client.session(name).delete()

    asyncio.run(work())


def test_cancel_ends_the_stream_with_its_error(shared_daemon: Daemon) -> None:
    with Client(shared_daemon.socket) as client:
        generation = client.generate(PROMPT, max_tokens=1000, temperature=0, ignore_eos=True)
        next(generation.texts())
        start = time.monotonic()
        generation.cancel()
        with pytest.raises(ErrorReply) as caught:
            _ = generation.result
        assert caught.value.code is ErrorCode.CANCELLED
        assert time.monotonic() - start < 5

    async def work() -> None:
        async with AsyncClient(shared_daemon.socket) as client:
            async with await client.generate(PROMPT, max_tokens=1000, temperature=0, ignore_eos=True) as generation:
                async for _ in generation.texts():
                    break
            assert generation.finished
            assert (await client.status()).running == 0

    asyncio.run(work())


def test_another_client_attaches(shared_daemon: Daemon) -> None:
    with Client(shared_daemon.socket) as first, Client(shared_daemon.socket) as second:
        generation = first.generate(PROMPT, max_tokens=10, temperature=0, detach=True)
        next(generation.texts())
        other = second.attach(generation.request_id)
        assert other.text == first.attach(generation.request_id).text
        with pytest.raises(ErrorReply, match="not known"):
            _ = second.attach("never-sent").text


def test_bad_values_are_typed_errors_and_the_connection_goes_on(shared_daemon: Daemon) -> None:
    with Client(shared_daemon.socket) as client:
        for wrong in ({"temperature": -1}, {"top_p": 0}, {"stop": [""]}, {"request_id": "a b"}, {"temperature": "hot"}):
            with pytest.raises(ErrorReply) as caught:
                _ = client.generate(PROMPT, **wrong).text  # type: ignore[arg-type]
            assert caught.value.code is ErrorCode.INVALID_PARAMETER
            assert caught.value.next_step
        assert client.generate(PROMPT, max_tokens=1).result.usage.generated == 1


def test_a_generation_survives_kill_of_daemon_and_engine(daemon: Daemon) -> None:
    daemon.start()
    options = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
    with Client(daemon.socket, reconnect=60) as client:
        undisturbed = client.generate(PROMPT, **options).result  # type: ignore[arg-type]
        generation = client.generate(PROMPT, session="kept", **options)  # type: ignore[arg-type]
        pieces = generation.texts()
        got = next(pieces) + next(pieces)
        daemon.kill()
        daemon.start(ready=False)
        got += "".join(pieces)
        assert got == generation.text == undisturbed.text
        assert generation.result.durable
        assert generation.tokens == undisturbed.tokens
        info = client.session("kept").info()
        assert info.turns == 1

        _engine_killed(daemon, client, undisturbed)


def _engine_killed(daemon: Daemon, client: Client, undisturbed: Done) -> None:
    """The second half, on the same daemon: the engine alone dies, without and with a retry."""
    options = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
    generation = client.generate(PROMPT, **options)  # type: ignore[arg-type]
    next(generation.texts())
    os.kill(daemon.engine_pid, signal.SIGKILL)
    with pytest.raises(ErrorReply) as caught:
        _ = generation.text
    assert caught.value.code is ErrorCode.ENGINE_DIED
    assert caught.value.retryable

    daemon.wait_state("ready")
    retried = client.generate(PROMPT, retries=2, **options)  # type: ignore[arg-type]
    pieces = retried.texts()
    got = next(pieces)
    os.kill(daemon.engine_pid, signal.SIGKILL)
    assert got + "".join(pieces) == undisturbed.text
