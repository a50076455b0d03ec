"""Requests that once ended the engine for everybody, and races between threads that once lost something."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from atlas_client import Client, ErrorReply
from atlas_client.errors import ErrorCode
from atlas_client.protocol import Generate
from conftest import Daemon
from families import DEMO
from tiers_support import opened, some_tokens, store, write
from transformers import AutoTokenizer

from atlasd.broker import archive
from atlasd.broker.log import Log
from atlasd.engine.text import Text


@pytest.fixture
def client(shared_daemon: Daemon) -> Iterator[Client]:
    with Client(shared_daemon.socket) as client:
        yield client


@pytest.mark.parametrize(
    "sampling",
    [
        {"logit_bias": {5: math.nan}},
        {"logit_bias": {5: math.nan}, "temperature": 1.0},
        {"logit_bias": {5: math.inf}, "temperature": 1.0},
        {"logit_bias": {5: 1e300}, "temperature": 1.0},
        {"repetition_penalty": math.inf, "temperature": 1.0},
        {"repetition_penalty": 1e-300, "temperature": 1.0},
    ],
)
def test_numbers_that_leave_no_distribution_are_refused_and_the_engine_lives(
    client: Client, sampling: dict[str, Any]
) -> None:
    before = client.status()
    with pytest.raises(ErrorReply) as caught:
        _ = client.generate("def main():\n", max_tokens=3, **sampling).text
    assert caught.value.code is ErrorCode.INVALID_PARAMETER
    assert (client.status().engine_pid, client.status().engine_restarts) == (before.engine_pid, before.engine_restarts)


def test_a_tiny_temperature_is_the_greedy_choice(client: Client) -> None:
    greedy = client.generate("def main():\n", max_tokens=8, temperature=0).result.tokens
    assert client.generate("def main():\n", max_tokens=8, temperature=1e-40).result.tokens == greedy


def test_an_imported_token_outside_the_vocabulary_fails_that_request_alone(client: Client) -> None:
    with client.session("review-export") as session:
        _ = session.generate("import os\n", max_tokens=4).text
        content = archive.unpack(session.export())
        session.delete()
    content.turns[0].generated_ids = b"\xff\xff\x00\x00" + content.turns[0].generated_ids[4:]
    client.import_session("review-import", archive.pack(content.session, content.turns))
    other = client.generate("def main():\n", max_tokens=40, temperature=0)
    with pytest.raises(ErrorReply) as caught:
        _ = client.session("review-import").generate("x", max_tokens=2).text
    assert caught.value.code is ErrorCode.INVALID_PARAMETER
    assert other.result.usage.generated > 0
    client.session("review-import").delete()


def test_purge_erases_pages_whose_write_has_only_just_ended(tmp_path: Path) -> None:
    tiered = store(tmp_path)
    for seed in range(40):
        tokens = some_tokens(130, seed=seed)
        sequence = opened(tiered, tokens)
        write(tiered, sequence, tokens, "ann")
        sequence.persist()
        sequence.release()  # as a session that is deleted while its pages are being written
        assert tiered.purge(tokens, "ann") == 3, seed
    tiered.close()


def test_a_report_that_fails_does_not_hold_up_the_next(tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    told: list[Any] = []

    def broken(result: Any, error: ErrorReply | None) -> None:
        raise RuntimeError("a report that fails")

    ready = threading.Event()
    log.submit(lambda sessions: ready.wait(10), lambda result, error: None)  # the next two finish together
    log.submit(lambda sessions: 1, broken)
    log.submit(lambda sessions: 2, lambda result, error: told.append(result))
    ready.set()
    deadline = time.monotonic() + 10
    while not told and time.monotonic() < deadline:
        log.deliver()
    log.close()
    assert told == [2]


def test_a_prompt_of_megabytes_is_refused_before_it_holds_up_other_sessions(client: Client) -> None:
    began = time.monotonic()
    with pytest.raises(ErrorReply) as caught:
        _ = client.generate("abcdefghij" * 800_000, max_tokens=1).text
    assert caught.value.code is ErrorCode.CONTEXT_OVERFLOW
    assert time.monotonic() - began < 5  # encoding all of it takes twenty seconds


def test_a_long_text_that_fits_is_encoded_whole() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    lines = "def f(x):\n    return 1\n" * 6000
    ids = tokenizer(lines)["input_ids"]
    text = Text(tokenizer, 4096, len(ids))
    assert text.prompt(Generate(prompt=lines), fresh=True, last_finish="", answer=True) == (ids, lines)
