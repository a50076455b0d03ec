"""The contract of the tiers: what a page is, what a tier promises, what the engine calls.

Vocabulary. A *block* is a device-pool slot of BLOCK_TOKENS tokens, all layers. A *page* is a block's content with
its key. A *sealed* page is full and immutable; a *tail* is the part-filled last page of a sequence. A *chain key*
names tokens [0, end of page): it is SHA-256 over the previous key and the page's token ids, seeded with identity and
owner, so equal keys mean equal K/V.

What is evicted: the end of a chain before its beginning; of which chain, `--kv-policy` says (see evict). The order of
use outlives a restart; how often pages were used does not, so GDSF begins anew.

States of a block: FREE, OPEN (one sequence appends to it), SEALED (immutable, shared by reference count; with no
reference it is a cache entry that may be evicted). free + open + sealed = total, on every tier.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

BLOCK_TOKENS = 64
LAYOUT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class KVGroup:
    """Layers whose K and V have one shape. Device slab: [blocks, len(layers), 2, kv_heads, BLOCK_TOKENS, head_dim]."""

    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class PageLayout:
    """How a page's bytes are laid out: the groups' slab rows one after the other, C order, little endian."""

    groups: tuple[KVGroup, ...]
    dtype: str  # "float32" | "float16" | "bfloat16"

    @property
    def item_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def group_bytes(self) -> tuple[int, ...]:
        """Bytes of one block in each group's slab."""
        return tuple(len(g.layers) * 2 * g.kv_heads * BLOCK_TOKENS * g.head_dim * self.item_bytes for g in self.groups)

    @property
    def page_bytes(self) -> int:
        return sum(self.group_bytes)

    @property
    def bytes_per_token(self) -> int:
        return self.page_bytes // BLOCK_TOKENS

    def describe(self) -> str:
        """Canonical text: part of the identity, so pages of another layout are never found."""
        groups = ";".join(f"{','.join(map(str, g.layers))}:{g.kv_heads}x{g.head_dim}" for g in self.groups)
        return f"v{LAYOUT_VERSION}/{BLOCK_TOKENS}/{self.dtype}/{groups}"


@dataclasses.dataclass(frozen=True)
class PageHeader:
    """What identifies a page wherever it lies. `tokens`: the page's own ids, BLOCK_TOKENS of them, fewer in a tail."""

    key: bytes  # chain key up to and including this page (32 bytes)
    parent: bytes  # chain key before this page (32 bytes)
    tokens: tuple[int, ...]


@dataclasses.dataclass
class TierStats:
    """Pages. free + open + sealed = total."""

    name: str
    total: int
    free: int
    open: int
    sealed: int
    page_bytes: int
    bytes_used: int
    limit_bytes: int


class PageTier(Protocol):
    """Device pool, RAM and disk. One conformance suite runs on each. Thread-safe.

    The device pool differs in two points: its blocks carry no checksum, and drop() refuses a page that a running
    sequence holds."""

    name: str

    def put(self, header: PageHeader, payload: memoryview) -> bool:
        """Stores a page, evicting others when needed. False: it does not fit or storing failed, and nothing changed;
        the cause is counted. A page already there is not written again. The payload is not kept after the call."""
        ...

    def get(self, key: bytes, into: memoryview) -> PageHeader | None:
        """Copies the page into `into` (page_bytes) and returns its header after its checksum was verified.
        None: not there, or damaged (then it is dropped, counted, and never tried again; `into` is undefined)."""
        ...

    def find(self, key: bytes) -> bool:
        """Whether the page is there, without reading it."""
        ...

    def tails(self, parent: bytes) -> Sequence[PageHeader]:
        """The tails that follow `parent`, longest first. Their keys work with get()."""
        ...

    def drop(self, key: bytes, *, erase: bool = False) -> bool:
        """Forgets a page; `erase` overwrites its bytes first."""
        ...

    def stats(self) -> TierStats: ...

    def check(self) -> None:
        """Raises AssertionError when the accounting identity does not hold."""
        ...

    def close(self) -> None: ...


class OutOfBlocks(Exception):
    """The device pool has no block left that could be freed: all are held by running sequences."""


@dataclasses.dataclass
class Ticket:
    """A write on its way. Set by the writer thread, read by the engine's loop."""

    done: bool = False
    durable: bool = False  # every page it covers is on disk
    error: str = ""
    pages: int = 0


class KVSequence(Protocol):
    """One running sequence's pages. Engine thread only. States: restoring, ready, released."""

    block_table: list[int]  # device blocks, in order; valid to attend over [0, length) once ready
    length: int  # tokens whose K/V is in the blocks
    reused: int  # tokens found in the device pool
    restored: int  # tokens brought from the host tier or disk
    reset_reason: str  # why the usable prefix ended before the last token offered; "" when nothing was lost
    ready: bool

    def reserve(self, count: int) -> None:
        """Makes room for `count` more tokens: evicts cached pages, extends block_table. Raises OutOfBlocks, changing
        nothing."""
        ...

    def commit(self, tokens: Sequence[int]) -> None:
        """The K/V of `tokens` has been written at [length, length + len(tokens)). Seals full blocks; sealed pages of a
        durable sequence are written behind."""
        ...

    def persist(self) -> Ticket:
        """Writes the tail and, in the writer thread, waits for all its pages: `ticket.done` when settled. The sequence
        must not be appended to afterwards."""
        ...

    def release(self) -> None:
        """Drops the references. Sealed pages and the tail stay as cache entries. Idempotent."""
        ...


class KVStore(Protocol):
    """The engine's one handle on all tiers. Engine thread only; its own threads read and write pages."""

    layout: PageLayout
    slabs: list[torch.Tensor]  # one a group: [blocks, layers, 2, kv_heads, BLOCK_TOKENS, head_dim]

    def open(self, tokens: Sequence[int], owner: str, *, durable: bool) -> KVSequence:
        """Begins a sequence that will hold `tokens`. Finds the longest usable prefix of tokens[:-1] over all tiers (one
        token at least is left to compute), pins what is resident, starts reading the rest. Pages of a sequence that is
        not durable stay in memory; those that a later sequence finds there are written to disk. Raises OutOfBlocks."""
        ...

    def poll(self) -> None:
        """Takes in what the reader and writer threads finished; never blocks. Sequences become ready here."""
        ...

    def wait(self, timeout: float) -> None:
        """Blocks until poll() would have something to do, or `timeout` seconds."""
        ...

    @property
    def writing(self) -> bool:
        """Whether queued writes or reads hold blocks: OutOfBlocks may then pass by itself."""
        ...

    def persist(self, tokens: Sequence[int], owner: str) -> Ticket:
        """Writes those pages of the chain that are in memory but not on disk."""
        ...

    def purge(self, tokens: Sequence[int], owner: str) -> int:
        """Erases the chain's pages that no running sequence holds, on every tier; returns how many. Waits for the disk.
        Raises OSError when bytes could not be overwritten."""
        ...

    def stats(self) -> list[TierStats]: ...

    def counters(self) -> dict[str, int]:
        """Monotonic counts: pages written, read, damaged, dropped, evicted, bytes. `device_hit_pages`,
        `host_hit_pages`, `disk_hit_pages`, `miss_pages`: of the prefixes offered to open(), by the fastest tier that
        had them."""
        ...

    @property
    def warnings(self) -> list[str]:
        """What went wrong since the start, for a person; the latest few."""
        ...

    def check(self) -> None:
        """Raises AssertionError when the accounting identity fails on any tier. Call when idle."""
        ...

    def close(self) -> None:
        """Finishes the write-behind queue and stops the threads."""
        ...
