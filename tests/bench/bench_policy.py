"""Eviction policies on one trace of local use: seconds spent on computing again what had been computed before.

    python tests/bench/bench_policy.py [--seeds 3] [--requests 1500]

Each trace, made from its seed: eight long chats that are returned to, recent ones more often, each over one of two
system prompts; short questions that nobody asks again; bursts of an editor's completions in the middle of a file that
changes between bursts. It is replayed on a real TieredStore with a device pool of 7,168 tokens, RAM for 2,048 and disk
for about 8,192, once under each policy. No K/V is computed: a request is charged for the tokens of its prompt that it
had to compute although some earlier one had computed them before, by the cost model

    seconds(token at position p) = 0.5 ms * (1 + p / 4096)

so the figures are nearly the same on every machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from atlas_tiers.base import BLOCK_TOKENS, KVGroup, PageLayout
from atlas_tiers.disk import DiskConfig
from atlas_tiers.evict import DEFAULT_SLOPE, POLICIES
from atlas_tiers.store import TieredStore
from report import RESULTS, row

LAYOUT = PageLayout((KVGroup((0,), 1, 4),), "float32")
SLOT_BYTES = 8192  # header and payload
DEVICE_PAGES, HOST_PAGES, DISK_PAGES = 112, 32, 128
TOKEN_S = 0.0005
OWNER = "bench"


@dataclasses.dataclass
class Request:
    """`tokens` is the prompt with history; `answer` more are generated."""

    tokens: list[int]
    answer: list[int]
    durable: bool


@dataclasses.dataclass
class Bill:
    """What one replay cost."""

    recomputed_s: float = 0.0
    again: int = 0  # tokens that had been computed before, in prompts
    saved: int = 0  # of those, found in a tier
    hits: Counter[str] = dataclasses.field(default_factory=Counter)


class Trace:
    """Requests in order. The same seed gives the same ones."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._systems = [self._text(700), self._text(300)]
        self._chats = [list(self._rng.choice(self._systems)) for _ in range(8)]
        self._files = [self._text(self._rng.randrange(600, 2400)) for _ in range(6)]

    def requests(self, count: int) -> Iterator[Request]:
        """About `count` requests."""
        made = 0
        while made < count:
            roll = self._rng.random()
            some = self._visit() if roll < 0.15 else self._burst() if roll < 0.3 else [self._question()]
            yield from some
            made += len(some)

    def _text(self, count: int) -> list[int]:
        return self._rng.choices(range(50_000), k=count)

    def _visit(self) -> list[Request]:
        """A few turns of one chat; recent ones more often. A chat that has grown long is begun anew."""
        place = min(int(self._rng.expovariate(0.7)), len(self._chats) - 1)
        chat = self._chats.pop(place)
        if len(chat) > 5000:
            chat = list(self._rng.choice(self._systems))
        turns = []
        for _ in range(self._rng.randrange(1, 5)):
            prompt = chat + self._text(self._rng.randrange(20, 200))
            answer = self._text(self._rng.randrange(50, 350))
            turns.append(Request(prompt, answer, durable=True))
            chat = prompt + answer
        self._chats.insert(0, chat)
        return turns

    def _burst(self) -> list[Request]:
        """Completions at one place of a file: the text before it stays, the last lines change."""
        file = self._rng.choice(self._files)
        place = self._rng.randrange(200, len(file))
        file[place : place + 30] = self._text(30)
        size = self._rng.randrange(4, 20)
        return [
            Request(file[:place] + self._text(self._rng.randrange(5, 40)), self._text(20), False) for _ in range(size)
        ]

    def _question(self) -> Request:
        """Asked once, half of the time over a system prompt that others share."""
        system = self._rng.choice(self._systems) if self._rng.random() < 0.5 else []
        return Request(
            system + self._text(self._rng.randrange(80, 1200)), self._text(self._rng.randrange(40, 300)), False
        )


def new_store(path: Path, policy: str) -> TieredStore:
    disk = DiskConfig(path, cap_bytes=DISK_PAGES * (SLOT_BYTES + 1024) + (1 << 20), free_floor_bytes=0)
    host = HOST_PAGES * LAYOUT.page_bytes
    return TieredStore(LAYOUT, b"bench", device_blocks=DEVICE_PAGES, host_bytes=host, disk=disk, policy=policy)


def replay(policy: str, requests: list[Request], bill: Bill) -> None:
    """Serves the requests one after the other, on empty tiers."""
    seen: set[bytes] = set()
    with tempfile.TemporaryDirectory(dir=RESULTS) as scratch:
        store = new_store(Path(scratch) / "kv", policy)
        for request in requests:
            serve(store, request, bill, seen)
        bill.hits.update(store.counters())
        store.check()
        store.close()


def serve(store: TieredStore, request: Request, bill: Bill, seen: set[bytes]) -> None:
    """One request: its prefix is found, the rest computed, its pages written."""
    sequence = store.open(request.tokens, OWNER, durable=request.durable)
    while not sequence.ready:
        store.wait(1.0)
        store.poll()
    found = sequence.length
    whole = [*request.tokens, *request.answer]
    sequence.reserve(len(whole) - found)
    sequence.commit(whole[found:])
    known = 0
    while known < len(sequence.pages) and sequence.pages[known].key in seen:
        known += 1
    known = min(known * BLOCK_TOKENS, len(request.tokens) - 1)
    seen.update(page.key for page in sequence.pages)
    bill.recomputed_s += seconds(min(found, known), known)
    bill.again += known
    bill.saved += min(found, known)
    ticket = sequence.persist()
    sequence.release()
    while not ticket.done or store.writing:
        store.wait(1.0)
        store.poll()


def seconds(first: int, last: int) -> float:
    """To compute tokens [first, last), by the cost model."""
    return TOKEN_S * (last - first) * (1 + DEFAULT_SLOPE * (first + last) / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="traces, one a seed")
    parser.add_argument("--requests", type=int, default=1500, help="in each trace")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    bills = {policy: Bill() for policy in POLICIES}
    for seed in range(1, arguments.seeds + 1):
        requests = list(Trace(seed).requests(arguments.requests))
        for policy, bill in bills.items():
            replay(policy, requests, bill)
    for policy, bill in bills.items():
        pages = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares(bill.hits).items())
        against = f"prompt tokens seen before; pages: {pages}"
        row("policy", f"policy.{policy}_found", 100 * bill.saved / bill.again, "%", against=against)
    lru, gdsf = bills["lru"].recomputed_s, bills["gdsf"].recomputed_s
    row("policy", "policy.lru_recomputed_s", lru, "s")
    row("policy", "policy.gdsf_recomputed_s", gdsf, "s", against=f"LRU: {lru:.1f} s", ratio=gdsf / lru)


def shares(hits: Counter[str]) -> dict[str, float]:
    """Of the pages of all prompts, by where they were found."""
    names = {"device_hit": "device", "host_hit": "RAM", "disk_hit": "disk", "miss": "none"}
    total = sum(hits[f"{name}_pages"] for name in names)
    return {text: hits[f"{name}_pages"] / total for name, text in names.items()}


if __name__ == "__main__":
    main()
