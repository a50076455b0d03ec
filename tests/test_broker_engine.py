"""The engine's life as the broker runs it: death, hanging, bad models, load and unload."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from atlas_client.protocol import (
    Cancel,
    Done,
    Generate,
    ModelLoad,
    ModelReply,
    ModelUnload,
    Ok,
    Progress,
    Sampling,
    SessionCheckpoint,
    SessionDelete,
    SessionShow,
    Status,
    Tokens,
)
from broker_support import Daemon, daemon_at, is_error, text_tokens, until
from scripted_engine import expected, prompt_tokens

from atlasd.broker.supervisor import FIRST_SIGN_S, MAX_DEATHS, Pulse, RestartPolicy
from atlasd.engine.messages import Beat


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="atlas-") as directory:
        yield Path(directory)


@pytest.fixture
def daemon(root: Path) -> Iterator[Daemon]:
    yield from daemon_at(root, "--heartbeat-s", "1")


def status(client: Any) -> Any:
    return client.ask(Status())


def test_killed_engine_in_the_middle_of_a_stream(daemon: Daemon) -> None:
    client = daemon.ready()
    client.generate("a", session="s")
    rid = client.send(Generate(prompt='{"n": 500, "delay": 0.01}', session="s"))
    client.wait_for(rid, Tokens, 5)
    begun = time.monotonic()
    os.kill(status(client).engine_pid, signal.SIGKILL)
    reply = client.replies(rid)[-1]
    assert is_error(reply, "ENGINE_DIED")
    assert reply.retryable
    assert time.monotonic() - begun < 0.5
    done = client.generate("b", session="s")  # waits for the new engine
    assert done.tokens == expected([*prompt_tokens("a"), *expected(prompt_tokens("a"), 4), *prompt_tokens("b")], 4)
    assert status(client).engine_restarts == 1
    # the same request id runs again after a retryable error
    client.send(Generate(prompt='{"n": 3}'), rid2 := "again")
    assert len(client.replies(rid2)[-1].tokens) == 3


def test_turns_not_yet_started_are_given_to_the_next_engine(daemon: Daemon) -> None:
    client = daemon.ready()
    rids = [client.send(Generate(prompt='{"n": 3, "start": 0.5}', session=f"s{n}")) for n in range(4)]
    rids.append(client.send(Generate(prompt='{"n": 3, "start": 0.5}')))
    until(lambda: status(client).queued == 5, "all are in the engine's queue")
    os.kill(status(client).engine_pid, signal.SIGKILL)
    for rid in rids:
        replies = client.replies(rid)
        assert text_tokens(replies) == replies[-1].tokens
        assert len(replies[-1].tokens) == 3


def test_a_finished_turn_of_a_dying_engine_counts(daemon: Daemon) -> None:
    client = daemon.ready()
    one = client.send(Generate(prompt='{"n": 2}', session="one"))
    two = client.send(Generate(prompt='{"n": 9, "at": 3, "do": "crash"}', session="two"))
    assert isinstance(client.replies(one)[-1], Done)
    replies = client.replies(two)
    assert len(text_tokens(replies)) == 3  # what it sent before it died is delivered
    assert is_error(replies[-1], "ENGINE_DIED")
    assert client.ask(SessionShow("two")).info.tokens == 0


@pytest.mark.parametrize("how", ["hang", "mute"])
def test_a_hanging_engine_is_replaced(daemon: Daemon, how: str) -> None:
    client = daemon.ready()
    rid = client.send(Generate(prompt=f'{{"n": 9, "at": 2, "do": "{how}"}}'))
    reply = client.replies(rid)[-1]
    assert is_error(reply, "ENGINE_DIED")
    assert "hung" in reply.message
    assert isinstance(client.generate(), Done)


def test_an_engine_deaf_to_cancel_does_not_lose_the_reply(daemon: Daemon) -> None:
    client = daemon.ready()
    rid = client.send(Generate(prompt='{"n": 20, "delay": 0.02, "at": 1, "do": "deaf"}', session="s"))
    client.wait_for(rid, Tokens, 3)
    client.order(Cancel(), rid)
    assert is_error(client.replies(rid)[-1], "CANCELLED")
    assert client.ask(SessionShow("s")).info.tokens == 0


def test_quick_deaths_end_in_failed_and_a_load_mends_it(root: Path) -> None:
    for daemon in daemon_at(root, model="dies"):
        client = daemon.client()
        rid = client.send(Generate(prompt="x"))
        reply = client.replies(rid, 30.0)[-1]
        assert is_error(reply, "ENGINE_DIED")
        state = status(client)
        assert state.engine_state == "failed"
        assert "exited with status 3" in state.engine_error
        assert is_error(client.generate(), "ENGINE_DIED")
        assert isinstance(client.ask(ModelLoad("demo")), ModelReply)
        assert isinstance(client.generate(), Done)


def test_a_model_that_is_not_there(root: Path) -> None:
    for daemon in daemon_at(root, model="missing"):
        client = daemon.client()
        assert is_error(client.generate(session="s"), "NO_SUCH_MODEL")
        state = status(client)
        assert (state.engine_state, state.engine_error) == ("failed", "no model 'missing'")
        assert is_error(client.ask(ModelLoad("missing")), "NO_SUCH_MODEL")
        assert isinstance(client.ask(ModelLoad("demo")), ModelReply)
        assert isinstance(client.generate(session="s"), Done)


def test_requests_wait_for_a_loading_model_and_see_its_progress(root: Path) -> None:
    for daemon in daemon_at(root, model="slow"):
        client = daemon.client()
        rids = [client.send(Generate(prompt="hello", session=name)) for name in (None, "s")]
        for rid in rids:
            replies = client.replies(rid)
            loads = [reply for reply in replies if isinstance(reply, Progress) and reply.phase == "load"]
            assert loads
            assert loads[-1].unit == "tensors"
            assert replies[-1].tokens == expected(prompt_tokens("hello"), 4)
            assert replies[-1].timings.ttft_ms > 300  # counted from arrival


def test_cancel_while_held(root: Path) -> None:
    for daemon in daemon_at(root, model="slow"):
        client = daemon.client()
        rid = client.send(Generate(prompt="hello", session="s"))
        client.wait_for(rid, Progress)
        client.order(Cancel(), rid)
        assert is_error(client.replies(rid, 0.5)[-1], "CANCELLED")


def test_full_queue(root: Path) -> None:
    for daemon in daemon_at(root, "--max-queue", "3", model="slow"):
        client = daemon.client()
        rids = [client.send(Generate(prompt="hello", sampling=Sampling(max_tokens=1))) for _ in range(5)]
        last = [client.replies(rid) for rid in rids]
        assert [replies[0].position for replies in last[:3]] == [0, 1, 2]
        assert all(isinstance(replies[-1], Done) for replies in last[:3])
        assert all(is_error(replies[-1], "QUEUE_FULL") for replies in last[3:])


def test_load_waits_for_running_turns_and_holds_new_ones(daemon: Daemon) -> None:
    client = daemon.ready()
    running = client.send(Generate(prompt='{"n": 30, "delay": 0.02}', session="s"))
    client.wait_for(running, Tokens)
    load = client.send(ModelLoad("slow/other"))
    client.wait_for(load, Progress)
    after = client.send(Generate(prompt="held"))
    assert is_error(client.ask(ModelLoad("third")), "QUEUE_FULL")
    assert len(client.replies(running)[-1].tokens) == 30
    replies = client.replies(load)
    assert isinstance(replies[-1], ModelReply)
    assert replies[-1].model.name == "slow/other"
    assert {reply.phase for reply in replies[:-1]} == {"queue", "load"} or len(replies) == 2
    assert isinstance(client.replies(after)[-1], Done)
    assert is_error(client.generate("x", session="s"), "MODEL_MISMATCH")
    assert client.ask(SessionShow("s")).info.model == "demo"
    assert status(client).engine_restarts == 0


def test_unload_and_load_again(daemon: Daemon) -> None:
    client = daemon.ready()
    client.generate("x", session="s")
    pid = status(client).engine_pid
    assert isinstance(client.ask(ModelUnload()), Ok)
    assert not Path(f"/proc/{pid}").exists()
    state = status(client)
    assert (state.engine_state, state.engine_pid, state.model) == ("stopped", 0, None)
    reply = client.generate()
    assert is_error(reply, "MODEL_NOT_LOADED")
    assert "model load" in reply.next_step
    assert isinstance(client.ask(SessionCheckpoint("s")), Ok)
    assert is_error(client.ask(SessionDelete("s", purge=True)), "MODEL_NOT_LOADED")
    assert isinstance(client.ask(ModelLoad("demo")), ModelReply)
    assert isinstance(client.generate("y", session="s"), Done)
    assert isinstance(client.ask(ModelLoad("demo")), ModelReply)  # loaded already


def test_the_engine_dies_with_the_broker(daemon: Daemon) -> None:
    pid = status(daemon.ready()).engine_pid
    daemon.kill()
    until(lambda: not Path(f"/proc/{pid}").exists(), "the engine is gone", 5.0)


def test_sigterm_ends_running_turns_in_order(daemon: Daemon) -> None:
    client = daemon.ready()
    rid = client.send(Generate(prompt='{"n": 500, "delay": 0.02}', session="s"))
    client.wait_for(rid, Tokens)
    pid = status(client).engine_pid
    assert daemon.process
    daemon.process.terminate()
    assert is_error(client.replies(rid)[-1], "SHUTTING_DOWN")
    assert daemon.process.wait(20) == 0
    assert not Path(f"/proc/{pid}").exists()
    assert not daemon.socket.exists()


def test_restart_policy() -> None:
    policy = RestartPolicy()
    delays = [policy.delay(float(now)) for now in range(MAX_DEATHS)]
    assert delays[0] == 0.0
    assert delays[-1] is None
    assert delays[:-1] == sorted(set(delays[:-1]))  # type: ignore[type-var]
    policy = RestartPolicy()
    assert [policy.delay(100.0 * n) for n in range(20)] == [0.0] * 20


def test_pulse() -> None:
    pulse = Pulse(0.0, 1.0)
    assert not pulse.problem(FIRST_SIGN_S - 1)
    assert pulse.problem(FIRST_SIGN_S + 1)
    for second in range(1, 10):
        pulse.take(Beat(steps=5, running=0, waiting=0), float(second))
    assert not pulse.problem(9.5)
    assert "heartbeat" in pulse.problem(10.5)
    for second in range(10, 15):
        pulse.take(Beat(steps=5, running=1, waiting=0), float(second))
    assert "no step" in pulse.problem(14.5)
    pulse.take(Beat(steps=6, running=1, waiting=0), 15.0)
    assert not pulse.problem(15.5)


def test_the_engine_of_a_killed_broker_cannot_take_the_place_of_the_new_one(daemon: Daemon) -> None:
    """Its sockets go on connecting to the names they know."""
    daemon.ready().close()
    names = [path for path in Path(f"{daemon.socket}.d").iterdir() if path.is_socket()]
    assert len(names) == 2
    daemon.kill()
    ghosts = [zmq.Context.instance().socket(zmq.PAIR) for _ in names]
    for ghost, name in zip(ghosts, names, strict=True):
        ghost.set(zmq.RECONNECT_IVL, 1)
        ghost.connect(f"ipc://{name}")
    try:
        daemon.start()
        assert isinstance(daemon.ready().generate(), Done)
    finally:
        for ghost in ghosts:
            ghost.close(0)
