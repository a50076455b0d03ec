"""SIGKILL of the broker at any moment: what a client was told is stored, and stored exactly."""

from __future__ import annotations

import dataclasses
import random
import tempfile
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from atlas_client.protocol import (
    STREAMING,
    Attach,
    Done,
    Error,
    Generate,
    Sampling,
    SessionDetail,
    SessionList,
    SessionShow,
)
from broker_support import Client, Daemon, daemon_at, is_error, text_tokens
from scripted_engine import expected, prompt_tokens

ROUNDS = 24
SESSIONS = 6


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(prefix="atlas-") as directory:
        yield from daemon_at(Path(directory))


def stored(client: Client, session: str) -> tuple[SessionDetail, list[int]]:
    detail, raw = client.ask_raw(SessionShow(session, text=True))
    assert isinstance(detail, SessionDetail), detail
    return detail, array("I", raw[0]).tolist()


def test_an_acknowledged_turn_survives_the_kill_that_follows(daemon: Daemon) -> None:
    client = daemon.ready()
    ids: list[int] = []
    for turn in range(8):
        prompt = f"turn {turn}"
        request = Generate(prompt=prompt, session="s", sampling=Sampling(max_tokens=5))
        rid = client.send(request)
        done = client.replies(rid)[-1]
        daemon.kill()  # at once after the acknowledgement
        ids += prompt_tokens(prompt)
        assert done.tokens == expected(ids, 5)
        ids += done.tokens
        daemon.start()
        client = daemon.client()
        assert stored(client, "s")[1] == ids
        client.send(request, rid)  # is answered, not run again
        again = client.replies(rid)
        assert again[-1] == done
        assert text_tokens(again) == done.tokens
        client.send(Attach(0), rid)
        assert client.replies(rid)[-1] == done
        client.send(Generate(prompt="other", session="s"), rid)
        assert is_error(client.replies(rid)[-1], "INVALID_PARAMETER")
        assert stored(client, "s")[1] == ids


@dataclasses.dataclass
class Writer:
    """Sends turns to one session, one after the other, and keeps what was acknowledged."""

    name: str
    ids: list[int] = dataclasses.field(default_factory=list)
    turns: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    rid: str = ""
    request: Generate | None = None
    count: int = 0

    def send(self, client: Client, draw: random.Random) -> None:
        self.count += 1
        prompt = f"{self.name}:{self.count}"
        self.request = Generate(prompt=prompt, session=self.name, sampling=Sampling(max_tokens=draw.randrange(1, 20)))
        self.rid = client.send(self.request)

    def take(self, done: Done) -> None:
        assert self.request is not None
        prompt = prompt_tokens(self.request.prompt or "")
        assert done.tokens == expected(self.ids + prompt, self.request.sampling.max_tokens or 0)
        assert done.durable
        self.ids += prompt + done.tokens
        self.turns.append((self.rid, done.text))
        self.request = None


def work_until_killed(daemon: Daemon, client: Client, writers: list[Writer], draw: random.Random) -> None:
    """Keeps all sessions busy; kills the broker at a random moment; takes what had arrived by then."""
    end = time.monotonic() + draw.uniform(0.0, 0.25)
    while time.monotonic() < end:
        for writer in writers:
            if writer.request is None:
                writer.send(client, draw)
        client.receive(0.01)
        collect(client, writers)
    daemon.kill()
    while client.receive(0.02):
        pass
    collect(client, writers)


def collect(client: Client, writers: list[Writer]) -> None:
    for writer in writers:
        terminal = [body for _, body, _ in client.seen.get(writer.rid, []) if not isinstance(body, STREAMING)]
        if writer.request is not None and terminal:
            assert isinstance(terminal[0], Done), terminal
            writer.take(terminal[0])


def check(client: Client, writer: Writer) -> None:
    """Every acknowledged turn is there, exactly; at most the one in flight is there besides."""
    if not writer.turns and client.ask(SessionShow(writer.name)).__class__ is Error:
        return
    detail, ids = stored(client, writer.name)
    assert ids[: len(writer.ids)] == writer.ids
    assert [(turn.rid, turn.text) for turn in detail.turns][: len(writer.turns)] == writer.turns
    assert len(detail.turns) - len(writer.turns) in (0, 1)
    place = 0
    for turn in detail.turns:
        assert turn.start == place
        place += turn.prompt_tokens + turn.generated_tokens
    assert place == len(ids) == detail.info.tokens


@pytest.mark.timeout(200)
def test_kills_at_random_moments_lose_no_acknowledged_turn(daemon: Daemon) -> None:
    draw = random.Random(2)
    writers = [Writer(f"session-{number}") for number in range(SESSIONS)]
    client = daemon.ready()
    for _ in range(ROUNDS):
        work_until_killed(daemon, client, writers, draw)
        client.close()
        daemon.start()
        client = daemon.client()
        assert len(client.ask(SessionList()).sessions) <= SESSIONS
        for writer in writers:
            check(client, writer)
        for writer in writers:  # what was in flight is sent again under its id: run once, whatever had happened
            if writer.request is not None:
                client.send(writer.request, writer.rid)
                done = client.replies(writer.rid)[-1]
                assert isinstance(done, Done), done
                writer.take(done)
        for writer in writers:
            assert stored(client, writer.name)[1] == writer.ids if writer.turns else True
    assert sum(len(writer.turns) for writer in writers) > ROUNDS
