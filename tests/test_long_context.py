"""Contexts larger than the device pool, through real daemons: bit for bit what unlimited pools give."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from atlas_client import Client
from atlas_client.protocol import Done, StatusReply, TokenLogprob, Tokens
from conftest import Daemon
from families import VOCAB, make

GIB = 1024**3
BLOCK = 64


def ids(count: int, seed: int = 1) -> list[int]:
    return random.Random(seed).choices(range(7, VOCAB), k=count)


def turn(daemon: Daemon, session: str | None, tokens: list[int], new: int) -> tuple[Done, list[TokenLogprob]]:
    with Client(daemon.socket) as client:
        generation = client.generate(
            tokens=tokens, session=session, max_tokens=new, temperature=0, logprobs=16, ignore_eos=True
        )
        logprobs = [entry for event in generation if isinstance(event, Tokens) for entry in event.logprobs]
        return generation.result, logprobs


def status(daemon: Daemon) -> StatusReply:
    with Client(daemon.socket) as client:
        return client.status()


def page_bytes(daemon: Daemon) -> int:
    model = status(daemon).model
    assert model is not None
    return BLOCK * model.kv_bytes_per_token


class Pair:
    """The same model in an unlimited daemon and in one with little memory."""

    def __init__(self, root: Path, model: Path, *flags: str) -> None:
        (root / "wide").mkdir()
        (root / "tight").mkdir()
        common = ("--quant", "none", "--threads", "1", *flags)
        self.wide = Daemon(root / "wide", *common, model=str(model))
        self.tight = Daemon(root / "tight", *common, model=str(model))
        self.wide.start()

    def start_tight(self, device_tokens: int, host_tokens: int, *flags: str) -> None:
        size = page_bytes(self.wide) / GIB
        device, host = (tokens / BLOCK * size + 1e-9 for tokens in (device_tokens, host_tokens))
        self.tight.flags += ["--kv-vram-gb", f"{device:.12f}", "--kv-ram-gb", f"{host:.12f}", *flags]
        self.tight.start()

    def equal(self, session: str | None, tokens: list[int], new: int) -> tuple[Done, Done]:
        """Runs a turn on both; tokens and log-probabilities must be the same bits."""
        wide, expected = turn(self.wide, session, tokens, new)
        tight, found = turn(self.tight, session, tokens, new)
        assert tight.tokens == wide.tokens
        assert found == expected
        return wide, tight

    def kill(self) -> None:
        for daemon in (self.wide, self.tight):
            if daemon.process is not None and daemon.process.poll() is None:
                daemon.kill()


@pytest.fixture
def pair(root: Path) -> Callable[..., Pair]:
    made: list[Pair] = []

    def build(family: str, *flags: str, **overrides: object) -> Pair:
        made.append(Pair(root, make(family, root / "model", **overrides), *flags))
        return made[-1]

    yield build  # type: ignore[misc]
    for each in made:
        each.kill()


@pytest.mark.slow
def test_32k_tokens_with_a_device_pool_of_4k_and_a_host_pool_of_8k(pair: Callable[..., Pair]) -> None:
    both = pair("llama", max_position_embeddings=40_000, num_hidden_layers=2)
    both.start_tight(4096, 8192)
    both.equal("long", ids(32_000), 24)
    counters = status(both.tight).counters
    assert counters["streamed_disk_bytes"] > 100 * counters.get("device_pages_evicted", 0)
    tiers = {tier.name: tier for tier in status(both.tight).tiers}
    assert (tiers["device"].total, tiers["host"].total) == (64, 128)
    both.tight.kill()
    both.tight.start()
    _, tight = both.equal("long", ids(300, seed=2), 16)
    assert tight.usage.restored == 32_000 + 23
    assert tight.usage.prefilled == 301


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("mistral", {"sliding_window": 700}),
        ("gemma2", {"sliding_window": 300}),
        ("gemma3", {"sliding_window": 300}),
        ("falcon_alibi", {}),
        ("gpt_neox", {}),
    ],
)
@pytest.mark.parametrize("host_tokens", [0, 1280])
def test_families_with_little_memory(
    pair: Callable[..., Pair], family: str, overrides: dict[str, object], host_tokens: int
) -> None:
    both = pair(family, "--prefill-chunk", "256", max_position_embeddings=6000, **overrides)
    both.start_tight(1536 if family == "mistral" else 1024, host_tokens)  # the window and a chunk fit
    both.equal("s", ids(3000), 8)
    both.equal("s", ids(200, seed=3), 8)
    both.tight.kill()
    both.tight.start()
    _, tight = both.equal("s", ids(500, seed=4), 70)
    assert tight.usage.restored + tight.usage.reused > 3000


def test_several_long_sessions_at_once_share_a_small_pool(pair: Callable[..., Pair]) -> None:
    import threading

    both = pair("llama", "--prefill-chunk", "256", max_position_embeddings=6000)
    both.start_tight(2048, 1024)
    found: dict[int, Done] = {}

    def run(n: int) -> None:
        found[n] = turn(both.tight, f"s{n}", ids(2500 + 100 * n, seed=n), 20)[0]

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    for n in range(4):
        assert found[n].tokens == turn(both.wide, None, ids(2500 + 100 * n, seed=n), 20)[0].tokens
    tiers = status(both.tight).tiers
    assert all(tier.free + tier.open + tier.sealed == tier.total for tier in tiers)


def test_an_anonymous_long_prompt_needs_no_session(pair: Callable[..., Pair]) -> None:
    both = pair("llama", "--prefill-chunk", "256", max_position_embeddings=6000)
    both.start_tight(1024, 1024)
    both.equal(None, ids(4000), 8)


def test_a_page_damaged_on_disk_while_it_is_away_is_computed_again(pair: Callable[..., Pair]) -> None:
    both = pair("llama", "--prefill-chunk", "256", max_position_embeddings=6000)
    both.start_tight(1024, 0)
    both.equal("s", ids(4000), 4)
    with Client(both.tight.socket) as client:
        generation = client.generate(
            tokens=ids(20, seed=9), session="s", max_tokens=400, temperature=0, ignore_eos=True
        )
        streamed: list[int] = []
        for event in generation:
            streamed += event.ids if isinstance(event, Tokens) else []
            if len(streamed) == 10:
                break
        damaged = sum(_spoil(path) for path in (both.tight.state / "kv").glob("seg-*.kv"))
        assert damaged
        for event in generation:
            streamed += event.ids if isinstance(event, Tokens) else []
        done = generation.result
    assert done.tokens == streamed == turn(both.wide, "s", ids(20, seed=9), 400)[0].tokens
    assert re.search("damaged on disk", done.reset_reason)
    assert status(both.tight).counters["disk_pages_damaged"] > 0


def _spoil(path: Path) -> int:
    """One byte in each page's payload of a segment file."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        spots = range(3 * 4096 + 7, size, 32 * 1024)
        for spot in spots:
            file.seek(spot)
            byte = file.read(1)
            file.seek(spot)
            file.write(bytes([byte[0] ^ 0x10]))
    return len(spots)


def test_more_than_all_tiers_hold_is_refused_at_once(pair: Callable[..., Pair]) -> None:
    from atlas_client import ErrorReply
    from atlas_client.errors import ErrorCode

    both = pair("llama", "--prefill-chunk", "256", max_position_embeddings=6000)
    both.start_tight(1024, 1024, "--kv-disk-path", "none")
    with Client(both.tight.socket) as client, pytest.raises(ErrorReply) as caught:
        _ = client.generate(tokens=ids(4000), max_tokens=4).result
    assert caught.value.code is ErrorCode.OUT_OF_RAM
