"""Pages whose bytes follow from their tokens: a test can tell what must be in a block without the code under test."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from atlas_tiers.base import BLOCK_TOKENS, KVGroup, PageLayout, Ticket
from atlas_tiers.disk import DiskConfig
from atlas_tiers.sequence import Sequence as RunningSequence
from atlas_tiers.store import TieredStore

from atlasd.engine.context import Reader, key_splits, span

LAYOUT = PageLayout((KVGroup((0, 2), 2, 4), KVGroup((1,), 1, 8)), "float32")
IDENTITY = b"model A, quantized so"
PATIENCE_S = 30.0


def disk_config(path: Path, *, pages: int = 10_000, **options: int | float) -> DiskConfig:
    """A directory with room for about `pages` pages of LAYOUT and no floor."""
    slot = 4096 + -(-LAYOUT.page_bytes // 4096) * 4096
    values: dict[str, int | float] = {
        "cap_bytes": (1 << 20) + pages * (slot + 2048),
        "free_floor_bytes": 0,
        "segment_bytes": 8 * slot,
        "lock_wait_s": 5.0,
        **options,
    }
    return DiskConfig(path, **values)  # type: ignore[arg-type]


def store(path: Path | None, *, blocks: int = 32, host_pages: int = 0, **options: object) -> TieredStore:
    """A small store over `path`."""
    disk = options.pop("disk", disk_config(path) if path else None)
    identity = options.pop("identity", IDENTITY)
    layout = options.pop("layout", LAYOUT)
    host = host_pages * LAYOUT.page_bytes
    return TieredStore(layout, identity, device_blocks=blocks, host_bytes=host, disk=disk, **options)  # type: ignore[arg-type]


def values(tokens: Sequence[int], owner: str, identity: bytes = IDENTITY) -> list[float]:
    """What K and V must be at each position: a function of the owner, the model and all tokens up to there."""
    state = hashlib.blake2b(identity + b"|" + owner.encode() + b"|", digest_size=3)
    result = []
    for token in tokens:
        state.update(token.to_bytes(4, "little"))
        result.append(float(int.from_bytes(state.digest(), "little")))
    return result


def write(tiered: TieredStore, sequence: RunningSequence, tokens: Sequence[int], owner: str, **names: bytes) -> None:
    """What the engine does in a step: computes K/V for tokens[length:] and commits them."""
    start = sequence.length
    sequence.reserve(len(tokens) - start)
    wanted = values(tokens, owner, **names)
    for position in range(start, len(tokens)):
        block = sequence.block_table[position // BLOCK_TOKENS]
        for layer, pages in tiered.pages.items():
            pages.values[block, :, :, position % BLOCK_TOKENS] = wanted[position] + layer
    sequence.commit(tokens[start:])


def assert_content(tiered: TieredStore, sequence: RunningSequence, tokens: Sequence[int], owner: str) -> None:
    """Every element in [0, length) is what the tokens say, and the length is allowed."""
    wanted = torch.tensor(values(tokens, owner)[: sequence.length])
    assert len(wanted) == sequence.length
    if not sequence.length:
        return
    cpu = torch.device("cpu")
    whole = span(0, sequence.length, 0, sequence.tables, tiered, cpu)
    reader = Reader(tiered, [whole])
    try:
        for layer in sorted(tiered.pages):
            for keys in key_splits(whole, None):
                keys = range(max(keys.start, 64 * sequence.first_needed), keys.stop)
                if not keys:
                    continue
                expected = (wanted[keys.start : keys.stop] + layer)[None, :, None]
                for found in reader.gather(layer, whole, keys, torch.float32):
                    wrong = (found != expected).any(0).any(1)
                    assert not wrong.any(), f"wrong content from token {keys.start + int(wrong.int().argmax())}"
    finally:  # reads go on after one that failed: into buffers and from pages that the next ones use
        reader.close()


def opened(tiered: TieredStore, tokens: Sequence[int], owner: str = "ann", *, durable: bool = True) -> RunningSequence:
    """A ready sequence whose prefix was checked."""
    sequence = tiered.open(tokens, owner, durable=durable)
    until_ready(tiered, sequence)
    assert sequence.reused + sequence.restored == sequence.length < max(1, len(tokens))
    assert_content(tiered, sequence, tokens, owner)
    return sequence


def until_ready(tiered: TieredStore, *sequences: RunningSequence) -> None:
    """Polls until they are."""
    deadline = time.monotonic() + PATIENCE_S
    while not all(sequence.ready for sequence in sequences):
        assert time.monotonic() < deadline, "a sequence did not become ready"
        tiered.wait(0.1)
        tiered.poll()


def settled(tiered: TieredStore, ticket: Ticket) -> Ticket:
    """The ticket when it is done."""
    deadline = time.monotonic() + PATIENCE_S
    while not ticket.done:
        assert time.monotonic() < deadline, "a ticket was not settled"
        tiered.wait(0.1)
        tiered.poll()
    tiered.poll()
    return ticket


def turn(tiered: TieredStore, tokens: Sequence[int], owner: str = "ann", *, durable: bool = True) -> Ticket:
    """One whole request that ends with `tokens`: open, compute, persist, release."""
    sequence = opened(tiered, tokens, owner, durable=durable)
    write(tiered, sequence, tokens, owner)
    assert_content(tiered, sequence, tokens, owner)
    ticket = settled(tiered, sequence.persist())
    sequence.release()
    return ticket


def some_tokens(count: int, seed: int = 0) -> list[int]:
    """Reproducible token ids."""
    return random.Random(seed).choices(range(50_000), k=count)
