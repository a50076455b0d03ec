"""`session delete --purge`: nothing of the session's pages is left in any tier, and nothing of a fork's is lost."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterable
from pathlib import Path

import torch
from atlas_client import Client
from atlas_client.client import Session
from atlas_client.protocol import Done
from atlas_tiers.base import BLOCK_TOKENS
from cli_support import answer
from conftest import Daemon
from tiers_support import LAYOUT, assert_content, opened, some_tokens, store, turn, values, write

WINDOW = 12  # tokens that tell a session by themselves
LAYER = 65_536  # bytes of a page of the bundled model
PROBE = 64  # bytes of a payload, likewise
FIRST = "def read_settings(path, default):\n    with open(path) as file:\n        return parse(file, default)\n\n\n"
SECRET = "class Salary:\n    amount = 918273\n    person = 'Ada'\n\n    def raise_by(self, percent):\n        pass\n"
OTHER = "class Weather:\n    wind = 'north'\n\n    def forecast(self, day):\n        return [self.wind, day]\n"


def segments(state: Path) -> bytes:
    return b"".join(path.read_bytes().rstrip(b"\0") for path in sorted((state / "kv").glob("seg-*.kv")))


def windows(ids: list[int], start: int) -> set[bytes]:
    """Every run of WINDOW ids that begins at `start` or later, as it stands in a slot's header."""
    return {array("I", ids[at : at + WINDOW]).tobytes() for at in range(start, len(ids) - WINDOW)}


def payload_probes(content: bytes, secret: set[bytes]) -> set[bytes]:
    """Pieces of the payloads of the slots whose header has one of these runs of ids. The payload begins at the sector
    after the header; layers from the third on, since the first one's V follows from the token alone, in any session.
    Pieces that are a value repeated tell nothing and are left out."""
    probes = set()
    for window in sorted(secret)[::4]:
        at = content.find(window)
        while at >= 0:
            payload = (at // 4096 + 1) * 4096
            pieces = (content[p : p + PROBE] for p in range(payload + 2 * LAYER, payload + 6 * LAYER, 9_000))
            probes |= {piece for piece in pieces if len(set(piece)) > PROBE // 4}
            at = content.find(window, at + 1)
    return probes


def present(content: bytes, pieces: Iterable[bytes]) -> int:
    return sum(piece in content for piece in pieces)


def say(session: Session, prompt: str) -> Done:
    return session.generate(prompt, max_tokens=20, temperature=0, ignore_eos=True).result


def common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_after_a_purge_no_slot_holds_the_session_and_its_fork_goes_on(root: Path) -> None:
    """Three tiers; the session has superseded tails, shared pages, pages of its own, and a fork that goes on."""
    daemon = Daemon(root, "--kv-vram-gb", "0.008").start()
    try:
        with Client(daemon.socket) as client:
            session = client.session("secret")
            say(session, FIRST * 4)
            fork = session.fork("kept")
            say(fork, OTHER * 3)
            for line in SECRET.splitlines(keepends=True):  # each turn supersedes the tail of the one before
                say(session, line)
            ids, kept = session.token_ids(), fork.token_ids()
            shared = common(ids, kept)
            content = segments(daemon.state)
            secret = windows(ids, shared) - windows(kept, 0)
            unshared = -(-shared // BLOCK_TOKENS) * BLOCK_TOKENS  # where the first page begins that has nothing shared
            probes = payload_probes(content, windows(ids, unshared) - windows(kept, 0) - windows(ids[:unshared], 0))
            assert len(probes) > 20
            assert present(content, secret) > len(secret) // 2
            before = fork.show(where=True).info.where
            answer("session", "delete", "secret", "--purge", socket=daemon.socket)
            content = segments(daemon.state)
            assert present(content, secret) == 0
            assert present(content, probes) == 0
            assert "secret" not in {info.name for info in client.sessions()}
            assert fork.show(where=True).info.where == before
            done = say(fork, OTHER)
            assert done.usage.prefilled <= len(fork.token_ids()) - len(kept) + 1
            everything = fork.token_ids()[: -len(done.tokens)]
            fresh = client.generate(tokens=everything, max_tokens=20, temperature=0, ignore_eos=True).result
            assert fresh.tokens == done.tokens
    finally:
        daemon.kill()


def test_a_purge_spares_the_shared_beginning_on_every_tier(tmp_path: Path) -> None:
    tokens = some_tokens(6 * BLOCK_TOKENS + 10)
    keep = 2 * BLOCK_TOKENS + 30
    tiered = store(tmp_path, blocks=8, host_pages=16)
    turn(tiered, tokens[:keep])  # a tail that ends where the shared part does
    turn(tiered, tokens)
    turn(tiered, some_tokens(7 * BLOCK_TOKENS, seed=1))  # sends the pages to RAM
    place = tiered.locate(tokens, "ann")
    assert place["host"] > 0
    assert place["nowhere"] == 0
    tiered.purge(tokens, "ann", keep=keep)
    place = tiered.locate(tokens, "ann")
    assert place["nowhere"] == len(tokens) - 2 * BLOCK_TOKENS
    assert sum(place.values()) == len(tokens)
    sequence = opened(tiered, tokens)
    assert sequence.length == 2 * BLOCK_TOKENS
    write(tiered, sequence, tokens, "ann")
    assert_content(tiered, sequence, tokens, "ann")
    sequence.release()
    tiered.check()
    tiered.close()


def test_what_a_superseded_tail_left_in_a_free_slot_is_erased_too(tmp_path: Path) -> None:
    tokens = some_tokens(BLOCK_TOKENS + 50)
    tiered = store(tmp_path)
    other = some_tokens(90, seed=3)
    assert turn(tiered, other).durable
    for end in (BLOCK_TOKENS + 20, BLOCK_TOKENS + 35, BLOCK_TOKENS + 50):
        assert turn(tiered, tokens[:end]).durable
    own = array("I", tokens[BLOCK_TOKENS : BLOCK_TOKENS + 15]).tobytes()
    payload = torch.tensor([values(tokens, "ann")[BLOCK_TOKENS + 5]] * 4).numpy().tobytes()
    content = b"".join(path.read_bytes() for path in tmp_path.glob("seg-*.kv"))
    assert content.count(own) > 1, "no superseded tail lies in a free slot: this test shows nothing"
    tiered.purge(tokens, "ann")
    content = b"".join(path.read_bytes() for path in tmp_path.glob("seg-*.kv"))
    assert own not in content
    assert payload not in content
    assert tiered.locate(other, "ann")["nowhere"] == 0
    tiered.check()
    tiered.close()


def test_a_purge_does_not_wait_for_pages_that_a_running_context_reads_where_they_lie(tmp_path: Path) -> None:
    """A context larger than the pool holds pages in RAM: waiting for them on the engine's thread would never end."""
    tokens = some_tokens(24 * BLOCK_TOKENS)
    tiered = store(tmp_path, blocks=12, host_pages=40)
    assert LAYOUT.page_bytes * 12 < LAYOUT.bytes_per_token * len(tokens)
    running = tiered.open([], "ann", durable=True)
    for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
        running.reserve(BLOCK_TOKENS)
        running.commit(tokens[end - BLOCK_TOKENS : end])
    purging = threading.Thread(target=tiered.purge, args=(tokens, "ann"), daemon=True)
    purging.start()
    purging.join(20)
    assert not purging.is_alive()
    running.release()
    tiered.close()
