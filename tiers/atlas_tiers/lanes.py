"""Models that mix layers with a window and layers without: each kind's pages in a store of its own, behind one handle.

A lane is one kind of layers. The lane without windows keeps every page of a sequence, the other its window's alone, so
that a long context costs little more than its full layers. A prefix is usable as far as both lanes have what they need.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence as Tokens
from pathlib import Path

from .base import PageLayout, Table, Ticket, TierStats
from .recovery import lock_directory
from .sequence import Sequence
from .store import WORKING_BLOCKS, TieredStore
from .stream import Pass, Want
from .tensors import LayerPages

NAMES = ("full", "window")  # directories of the lanes' pages on disk
MOST_WINDOW = 0.75
LOCK_WAIT_S = 5.0  # a predecessor may take so long to die


class LanedSequence:
    """See KVSequence: one sequence in every lane, all of one length once it is ready."""

    def __init__(self, store: LanedStore, lanes: list[Sequence], tokens: Tokens[int], owner: str) -> None:
        self._store, self._tokens, self._owner = store, tokens, owner
        self.lanes = lanes
        self._agreed = False

    @property
    def tables(self) -> tuple[Table, ...]:
        return tuple(table for lane in self.lanes for table in lane.tables)

    @property
    def length(self) -> int:
        return self.lanes[0].length

    @property
    def restored(self) -> int:
        return max(lane.restored for lane in self.lanes)

    @property
    def reused(self) -> int:
        prefix = self.lanes[0].reused + self.lanes[0].restored
        return prefix - self.restored

    @property
    def reset_reason(self) -> str:
        return next((lane.reset_reason for lane in self.lanes if lane.reset_reason), "")

    @property
    def ready(self) -> bool:
        """Lanes of which one lost a page while it was read begin again from nothing."""
        if not all(lane.ready for lane in self.lanes):
            return False
        if not self._agreed and len({lane.length for lane in self.lanes}) > 1:
            reason = self.reset_reason
            self.lanes = self._store.begin_again(self, self._owner)
            self.lanes[0].reset_reason = reason
        self._agreed = True
        return True

    def reserve(self, count: int) -> None:
        """See KVSequence. When a later lane has no room the earlier ones keep what they got for the next attempt."""
        for lane in self.lanes:
            lane.reserve(count)

    def commit(self, tokens: Tokens[int]) -> None:
        for lane in self.lanes:
            lane.commit(tokens)

    def persist(self) -> Ticket:
        return self._store.join([lane.persist() for lane in self.lanes])

    def release(self) -> None:
        for lane in self.lanes:
            lane.release()


class JoinedPass:
    """The lanes' slices of one forward pass."""

    def __init__(self, passes: dict[int, Pass]) -> None:
        """`passes`: by layer."""
        self._passes = passes

    def take(self, layer: int) -> LayerPages:
        """See Pass.take."""
        return self._passes[layer].take(layer)

    def close(self) -> None:
        """See Pass.close."""
        for each in set(self._passes.values()):
            each.close()


@dataclasses.dataclass
class _Joined:
    whole: Ticket
    parts: list[Ticket]


class LanedStore:
    """See KVStore."""

    def __init__(self, layout: PageLayout, stores: list[TieredStore]) -> None:
        """`stores`: one for each of layout.by_lane(), with one event."""
        self.layout = layout
        self.stores = stores
        self.pages = {layer: pages for store in stores for layer, pages in store.pages.items()}
        self.host_pages = {layer: pages for store in stores for layer, pages in store.host_pages.items()}
        self.lanes = {layer: lane for lane, store in enumerate(stores) for layer in store.pages}
        self._joined: list[_Joined] = []

    # --- sequences ---------------------------------------------------------------------------------

    def open(self, tokens: Tokens[int], owner: str, *, durable: bool) -> LanedSequence:
        """Begins a sequence in every lane, with the longest prefix that all have; see KVStore.open."""
        limit = self._usable(tokens, owner)
        return LanedSequence(self, self._open(tokens, owner, durable, limit), tokens, owner)

    def _usable(self, tokens: Tokens[int], owner: str) -> int:
        limit = max(0, len(tokens) - 1)
        while True:
            found = min(store.usable(tokens[: limit + 1], owner) for store in self.stores)
            if found == limit:
                return limit
            limit = found

    def _open(self, tokens: Tokens[int], owner: str, durable: bool, limit: int) -> list[Sequence]:
        lanes: list[Sequence] = []
        try:
            for store in self.stores:
                lanes.append(store.open(tokens, owner, durable=durable, limit=limit))
        except BaseException:
            for lane in lanes:
                lane.release()
            raise
        return lanes

    def begin_again(self, sequence: LanedSequence, owner: str) -> list[Sequence]:
        """The same sequence with nothing reused. Takes no blocks, so it can't fail."""
        durable = sequence.lanes[0].durable
        for lane in sequence.lanes:
            lane.release()
        return self._open([0], owner, durable, 0)

    def read_ahead(self, wants: Tokens[Want]) -> JoinedPass:
        """See KVStore.read_ahead."""
        passes: dict[int, Pass] = {}
        try:
            for lane, store in enumerate(self.stores):
                mine = [want for want in wants if self.lanes[want.layer] == lane]
                if mine:
                    reading = store.read_ahead(mine)
                    passes |= dict.fromkeys((want.layer for want in mine), reading)
        except BaseException:
            JoinedPass(passes).close()
            raise
        return JoinedPass(passes)

    def note_prefill(self, tokens: int, position: int, seconds: float) -> None:
        """See KVStore.note_prefill."""
        for store in self.stores:
            store.note_prefill(tokens, position, seconds)

    # --- progress ----------------------------------------------------------------------------------

    def poll(self) -> None:
        """Takes in finished reads and writes; never blocks."""
        for store in self.stores:
            store.poll()
        for joined in [each for each in self._joined if all(part.done for part in each.parts)]:
            self._joined.remove(joined)
            joined.whole.durable = all(part.durable for part in joined.parts)
            joined.whole.error = "; ".join(part.error for part in joined.parts if part.error)
            joined.whole.pages = sum(part.pages for part in joined.parts)
            joined.whole.done = True

    def join(self, parts: list[Ticket]) -> Ticket:
        """A ticket that poll() settles when all parts are."""
        joined = _Joined(Ticket(), parts)
        self._joined.append(joined)
        return joined.whole

    def wait(self, timeout: float) -> None:
        """Blocks until poll() has something to do, or `timeout` seconds."""
        self.stores[0].wait(timeout)

    @property
    def writing(self) -> bool:
        """See KVStore.writing."""
        return any(store.writing for store in self.stores)

    @property
    def pool_blocks(self) -> int:
        """Blocks of the smallest device pool."""
        return min(store.pool_blocks for store in self.stores)

    @property
    def capacity(self) -> int:
        """Tokens that one sequence can have at most."""
        return min(store.capacity for store in self.stores)

    # --- chains without a sequence -----------------------------------------------------------------

    def persist(self, tokens: Tokens[int], owner: str) -> Ticket:
        """See KVStore.persist."""
        return self.join([store.persist(tokens, owner) for store in self.stores])

    def purge(self, tokens: Tokens[int], owner: str, *, keep: int = 0) -> int:
        """See KVStore.purge."""
        return sum(store.purge(tokens, owner, keep=keep) for store in self.stores)

    def locate(self, tokens: Tokens[int], owner: str) -> dict[str, int]:
        """See KVStore.locate; of the lane that keeps every page."""
        return self.stores[0].locate(tokens, owner)

    # --- accounts ----------------------------------------------------------------------------------

    def stats(self) -> list[TierStats]:
        """Each tier's pages and bytes over all lanes; a page is one lane's."""
        tiers: dict[str, TierStats] = {}
        for stats in (stats for store in self.stores for stats in store.stats()):
            known = tiers.get(stats.name)
            tiers[stats.name] = stats if known is None else _sum(known, stats)
        return list(tiers.values())

    def counters(self) -> dict[str, int]:
        """See KVStore.counters."""
        total: Counter[str] = Counter()
        for store in self.stores:
            total.update(store.counters())
        return dict(total)

    @property
    def warnings(self) -> list[str]:
        """See KVStore.warnings."""
        return [warning for store in self.stores for warning in store.warnings]

    def check(self) -> None:
        """See KVStore.check."""
        for store in self.stores:
            store.check()

    def close(self) -> None:
        """See KVStore.close."""
        for store in self.stores:
            store.close()
        self.poll()


def _sum(left: TierStats, right: TierStats) -> TierStats:
    numbers = {
        field.name: getattr(left, field.name) + getattr(right, field.name)
        for field in dataclasses.fields(TierStats)
        if field.name != "name"
    }
    return TierStats(name=left.name, **numbers)


def split_blocks(lanes: list[PageLayout], budget: int, context: int, chunk: int) -> list[int]:
    """Blocks for each lane out of `budget` bytes, in the proportion in which a context of `context` tokens needs them
    when it is computed in chunks of `chunk` tokens. A lane with a window gets what one sequence keeps there, up to
    MOST_WINDOW of the bytes: its pages are wanted in every step, and the other lane's can be read where they lie."""
    weights = [lane_blocks(lane, context, chunk) for lane in lanes]
    size = sum(weight * lane.page_bytes for weight, lane in zip(weights, lanes, strict=True))
    blocks = [int(budget * weight / size) for weight in weights]
    if len(lanes) == 1:
        return blocks
    full, window = (lane.page_bytes for lane in lanes)
    least = min(weights[1], int(MOST_WINDOW * budget / window))
    if blocks[1] >= least:
        return blocks
    return [(budget - least * window) // full, least]


def lane_blocks(lane: PageLayout, context: int, chunk: int) -> int:
    """Blocks that one sequence of `context` tokens keeps in this lane at most."""
    whole = -(-context // 64) + 1
    if lane.window is None:
        return whole
    return min(whole, -(-lane.window // 64) + max(-(-chunk // 64) + 2, WORKING_BLOCKS))


def lane_directories(path: Path, lanes: int) -> list[Path]:
    """Where each lane's pages lie: `path` itself for a single one."""
    return [path] if lanes == 1 else [path / name for name in NAMES[:lanes]]


def others_bytes(path: Path, lanes: int, cap: int) -> int:
    """Bytes that pages of models of the other kind take in `path`, which count too. Above half of `cap` they are
    removed: pages of other models go first. Nothing else in `path` is looked at, let alone touched. Raises OSError;
    StoreLocked when they would go and another engine uses them."""
    folders = [path] if lanes > 1 else [path / name for name in NAMES if (path / name).is_dir()]
    own = {folder: _own_files(folder) for folder in folders}
    used = sum(file.stat().st_size for files in own.values() for file in files)
    if used <= cap // 2:
        return used
    for folder, files in own.items():
        lock = lock_directory(folder, LOCK_WAIT_S)
        try:
            for file in files:
                file.unlink(missing_ok=True)
            for index in {file.parent for file in files} - {folder}:
                index.rmdir()
        finally:
            os.close(lock)
    return 0


def _own_files(folder: Path) -> list[Path]:
    """A store's files in `folder` but for its lock. See FORMAT.md."""
    indexes = [folder / "index", folder / "index.new"]
    return [*folder.glob("seg-*.kv"), *(file for index in indexes for file in index.glob("*.mdb"))]
