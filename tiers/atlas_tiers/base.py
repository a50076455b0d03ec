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
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .held import Held
    from .index import Entry
    from .keys import PageId
    from .stream import Slices, Want
    from .tensors import LayerPages

BLOCK_TOKENS = 64
LAYOUT_VERSION = 1
AWAY = -1  # in a table: the page is in no block
SCALE_BYTES = 2  # float16, of int8 values


@dataclasses.dataclass(frozen=True)
class KVGroup:
    """Layers whose K and V have one shape. Device slab: [blocks, len(layers), 2, kv_heads, BLOCK_TOKENS, head_dim].
    `window`: each row attends to the last `window` tokens only; None: to all."""

    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class PageLayout:
    """How a page's bytes are laid out: the groups' slab rows one after the other, C order, little endian."""

    groups: tuple[KVGroup, ...]
    dtype: str  # "float32" | "float16" | "bfloat16" | "int8"

    @property
    def item_bytes(self) -> int:
        return {"float32": 4, "int8": 1}.get(self.dtype, 2)

    def layer_bytes(self, group: KVGroup) -> int:
        """Bytes of one layer of one block: values [2, kv_heads, BLOCK_TOKENS, head_dim]; for int8 then float16 scales
        [2, kv_heads, BLOCK_TOKENS], each for one token's head."""
        vectors = 2 * group.kv_heads * BLOCK_TOKENS
        return vectors * (group.head_dim * self.item_bytes + (SCALE_BYTES if self.dtype == "int8" else 0))

    @property
    def group_bytes(self) -> tuple[int, ...]:
        """Bytes of one block in each group's slab."""
        return tuple(len(g.layers) * self.layer_bytes(g) for g in self.groups)

    @property
    def window(self) -> int | None:
        """The longest window, if every layer has one: older tokens are of no use then. None: all tokens are."""
        windows = [group.window for group in self.groups]
        return max(w for w in windows if w) if all(windows) else None

    @property
    def page_bytes(self) -> int:
        return sum(self.group_bytes)

    @functools.cached_property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """(offset, bytes) of each layer's K and V in the payload: groups in order, layers in order, end to end. Each
        can be verified alone. Raises ValueError when a group's bytes are not a whole number for each layer."""
        found: list[tuple[int, int]] = []
        offset = 0
        for group, size in zip(self.groups, self.group_bytes, strict=True):
            if size % len(group.layers):
                raise ValueError(f"{size} bytes of {len(group.layers)} layers can't be divided into parts")
            for _ in group.layers:
                found.append((offset, size // len(group.layers)))
                offset += size // len(group.layers)
        return tuple(found)

    def span(self, first: int, last: int) -> tuple[int, int]:
        """(offset, bytes) of parts [first, last) in the payload. Raises ValueError when there are no such parts."""
        if not 0 <= first < last <= len(self.parts):
            raise ValueError(f"parts {first} to {last} of a page of {len(self.parts)}")
        end = sum(self.parts[last - 1])
        return self.parts[first][0], end - self.parts[first][0]

    @property
    def bytes_per_token(self) -> int:
        return self.page_bytes // BLOCK_TOKENS

    def by_lane(self) -> list[PageLayout]:
        """The groups whose layers attend to everything, then those with a window; one of them if there is one kind."""
        kinds = [[g for g in self.groups if not g.window], [g for g in self.groups if g.window]]
        return [PageLayout(tuple(groups), self.dtype) for groups in kinds if groups]

    def first_needed(self, length: int) -> int:
        """Of a sequence of `length` tokens, the first block that its next token attends to."""
        return max(0, length - self.window + 1) // BLOCK_TOKENS if self.window else 0

    def describe(self) -> str:
        """Canonical text: part of the identity, so pages of another layout are never found."""
        groups = ";".join(_describe(group) for group in self.groups)
        return f"v{LAYOUT_VERSION}/{BLOCK_TOKENS}/{self.dtype}/{groups}"


def _describe(group: KVGroup) -> str:
    window = f"w{group.window}" if group.window else ""
    return f"{','.join(map(str, group.layers))}:{group.kv_heads}x{group.head_dim}{window}"


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

    def pin(self, page: PageId) -> Entry[Any] | None:
        """Exactly this page, kept from being evicted until unpin(). None: not there. Counts as a use."""
        ...

    def unpin(self, entry: Entry[Any]) -> None:
        """Undoes one pin()."""
        ...

    def verify(self, entry: Entry[Any]) -> None:
        """Checks every part of a pinned page. Raises PageDamaged; the page is then dropped and never tried again."""
        ...

    def load_parts(self, entry: Entry[Any], first: int, last: int, into: memoryview) -> None:
        """Copies parts [first, last) of a pinned page (see PageLayout.parts), end to end, into `into`, which has just
        their size, and verifies them; the other parts are neither read nor checked. Raises PageDamaged: the page is
        dropped and `into` undefined. Raises ValueError for parts or a buffer that don't fit."""
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


class BlocksComing(OutOfBlocks):
    """Not now: blocks will be free when pages have been written that are on their way to disk."""


@dataclasses.dataclass
class Ticket:
    """A write on its way. Set by the writer thread, read by the engine's loop."""

    done: bool = False
    durable: bool = False  # every page it covers is on disk
    error: str = ""
    pages: int = 0


@dataclasses.dataclass(frozen=True)
class Table:
    """Where a running sequence's pages are, in order: device blocks, AWAY for a page that is in none. `away`: by
    position, those that are read from a lower tier in every pass. In neither: before every layer's window."""

    blocks: Sequence[int]
    away: Mapping[int, Held] = dataclasses.field(default_factory=dict)


class KVSequence(Protocol):
    """One running sequence's pages. Engine thread only. States: restoring, ready, released."""

    @property
    def tables(self) -> Sequence[Table]:
        """By lane; valid to attend over [0, length) once ready, until the next reserve() of any sequence."""
        ...

    @property
    def length(self) -> int:
        """Tokens whose K/V is in the pages."""
        ...

    @property
    def reused(self) -> int:
        """Tokens found in the device pool."""
        ...

    @property
    def restored(self) -> int:
        """Tokens brought from the host tier or disk, or read there."""
        ...

    @property
    def reset_reason(self) -> str:
        """Why the usable prefix ended before the last token offered; "" when nothing was lost."""
        ...

    @property
    def ready(self) -> bool:
        """Whether everything that was found has been brought."""
        ...

    def reserve(self, count: int) -> None:
        """Makes room for `count` more tokens: evicts cached pages, sends running sequences' pages away, extends
        block_table. Raises OutOfBlocks (BlocksComing: try again when pages have been written), not extending it."""
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
    lanes: dict[int, int]  # by layer: which of a sequence's tables is its
    pages: dict[int, LayerPages]  # by layer: the device pool's blocks
    host_pages: dict[int, LayerPages]  # by layer: the RAM tier's places, where attention may read them in place

    def open(self, tokens: Sequence[int], owner: str, *, durable: bool) -> KVSequence:
        """Begins a sequence that will hold `tokens`. Finds the longest usable prefix of tokens[:-1] over all tiers (one
        token at least is left to compute), pins what is resident, starts reading the rest. Pages of a sequence that is
        not durable stay in memory; those that a later sequence finds there are written to disk. Raises OutOfBlocks."""
        ...

    def note_prefill(self, tokens: int, position: int, seconds: float) -> None:
        """A pass over `tokens` of one prompt alone, at [position, position + tokens), took so long. open() leaves pages
        out that it expects to be computed faster than read, and says so in reset_reason. Less than a page of tokens
        tells nothing and is ignored."""
        ...

    def read_ahead(self, wants: Sequence[Want]) -> Slices:
        """Starts bringing layer slices of away pages for one forward pass, in order. Raises PageDamaged later, in
        take(); close() ends the pass."""
        ...

    @property
    def pool_blocks(self) -> int:
        """Blocks of the device pool, of the smallest where there are several, that a chunk of new tokens may take."""
        ...

    @property
    def capacity(self) -> int:
        """Tokens that one sequence can have at most, over all tiers."""
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

    def purge(self, tokens: Sequence[int], owner: str, *, keep: int = 0) -> int:
        """Erases the chain's pages that no running sequence holds, on every tier, but for those that end within the
        first `keep` tokens (others share them); returns how many. Waits for the disk. Raises OSError when bytes could
        not be overwritten."""
        ...

    def locate(self, tokens: Sequence[int], owner: str) -> dict[str, int]:
        """How many of `tokens` have their K/V in which tier, by the tier's name (the fastest that holds it) or
        "nowhere": the counts add up. Changes nothing, not even the order of use; looks at memory alone."""
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
