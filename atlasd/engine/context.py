"""One session's context during a forward pass: where the K and V of each of its blocks are, and how to get at them.

A block is in the device pool, in the RAM tier where that can be read in place, or among the slices that are read ahead.
Layers that attend to everything and layers with a window may keep different blocks: each kind is a *lane*.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from atlas_kernels import kv
from atlas_kernels.attention import Variant, splits
from atlas_tiers.base import BLOCK_TOKENS, PageLayout, Table
from atlas_tiers.held import Held
from atlas_tiers.stream import Slices, Want
from atlas_tiers.tensors import LayerPages


class Pages(Protocol):
    """What a pass needs of a KVStore."""

    layout: PageLayout
    lanes: dict[int, int]
    pages: dict[int, LayerPages]
    host_pages: dict[int, LayerPages]

    def read_ahead(self, wants: Sequence[Want]) -> Slices: ...


class Lies(enum.Enum):
    """Where a block's K and V are."""

    DEVICE = "device"
    HOST = "host"
    AHEAD = "ahead"
    PAST = "past"  # nowhere: before every layer's window


@dataclasses.dataclass(frozen=True)
class Run:
    """Blocks [start, stop) of a context that lie in one kind of place. `rows`: int64, their rows in that tier's pages,
    empty for slices that are read ahead; `held`: the pages, for those that are away."""

    start: int
    stop: int
    lies: Lies
    rows: torch.Tensor
    held: tuple[Held, ...] = ()

    def cut(self, blocks: range) -> Run | None:
        """The part of it in `blocks`; None: there is none."""
        start, stop = max(self.start, blocks.start), min(self.stop, blocks.stop)
        if start >= stop:
            return None
        part = slice(start - self.start, stop - self.start)
        return Run(start, stop, self.lies, self.rows[part], self.held[part])

    def __len__(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Places:
    """Where one lane's blocks of a context are. `blocks`: int64 device blocks; -1 where a page is in none."""

    blocks: torch.Tensor
    runs: tuple[Run, ...]

    @staticmethod
    def of(table: Table, in_place: bool, device: torch.device) -> Places:
        """`in_place`: whether attention may read the RAM tier where it is."""
        blocks = torch.tensor(table.blocks, dtype=torch.int64, device=device)
        runs: list[Run] = []
        kinds = [_lies(block, table.away.get(n), in_place) for n, block in enumerate(table.blocks)]
        begin = 0
        for n in range(1, len(kinds) + 1):
            if n == len(kinds) or kinds[n] is not kinds[begin]:
                held = tuple(table.away[p] for p in range(begin, n) if p in table.away)
                runs.append(Run(begin, n, kinds[begin], _rows(kinds[begin], blocks[begin:n], held), held))
                begin = n
        return Places(blocks, tuple(runs))

    def cut(self, keys: range) -> list[Run]:
        """The runs that the blocks of positions `keys` make."""
        blocks = block_range(keys)
        return [part for run in self.runs if (part := run.cut(blocks)) is not None]


@dataclasses.dataclass(frozen=True)
class Span:
    """One session's part of a step: rows [start, stop) of the batch are positions [first, first + stop - start)."""

    start: int
    stop: int
    first: int
    places: tuple[Places, ...]  # by lane

    @property
    def length(self) -> int:
        """Context tokens once this step's are appended."""
        return self.first + self.stop - self.start

    @property
    def positions(self) -> range:
        """Of its query rows."""
        return range(self.first, self.length)

    @property
    def resident(self) -> bool:
        """Whether the device pool has every block that is needed."""
        return all(run.lies in (Lies.DEVICE, Lies.PAST) for places in self.places for run in places.runs)


def span(start: int, stop: int, first: int, tables: Sequence[Table], pages: Pages, device: torch.device) -> Span:
    """A session's part of a step; `tables` as in KVSequence."""
    in_place = bool(pages.host_pages)
    return Span(start, stop, first, tuple(Places.of(table, in_place, device) for table in tables))


def _lies(block: int, held: Held | None, in_place: bool) -> Lies:
    if held is None:
        return Lies.DEVICE if block >= 0 else Lies.PAST
    return Lies.HOST if held.in_ram and in_place else Lies.AHEAD


def _rows(lies: Lies, blocks: torch.Tensor, held: tuple[Held, ...]) -> torch.Tensor:
    if lies is Lies.DEVICE:
        return blocks
    if lies is Lies.HOST:
        return torch.tensor([page.entry.place for page in held], dtype=torch.int64)
    return torch.empty(0, dtype=torch.int64)


def block_range(keys: range) -> range:
    """The blocks that positions `keys` lie in."""
    return range(keys.start // BLOCK_TOKENS, -(-keys.stop // BLOCK_TOKENS))


def key_splits(span: Span, window: int | None) -> list[range]:
    """The runs of keys that the span's rows attend to, in order, from the first block on that one of them sees."""
    found = splits(span.positions, Variant(1.0, window))
    first = Variant(1.0, window).first_seen(span.first) // BLOCK_TOKENS * BLOCK_TOKENS
    return [range(max(keys.start, first), keys.stop) for keys in found]


def wants(spans: Sequence[Span], layout: PageLayout, lanes: Mapping[int, int]) -> list[Want]:
    """The slices that attention over `spans` will not find at hand, in the order in which it asks for them."""
    windows = {layer: group.window for group in layout.groups for layer in group.layers}
    found: list[Want] = []
    for layer in sorted(windows):
        for each in spans:
            for keys in key_splits(each, windows[layer]):
                runs = each.places[lanes[layer]].cut(keys)
                held = [page for run in runs if run.lies is Lies.AHEAD for page in run.held]
                found += [Want(layer, held)] if held else []
    return found


class Reader:
    """Gathers K and V of contexts, layer by layer and split by split, in the order of `wants`."""

    def __init__(self, pages: Pages, spans: Sequence[Span]) -> None:
        self._pages = pages
        self._cuts: dict[tuple[int, range], list[Run]] = {}  # by lane's places and keys: every layer of it asks anew
        needed = [] if all(span.resident for span in spans) else wants(spans, pages.layout, pages.lanes)
        self._ahead = pages.read_ahead(needed) if needed else None

    def gather(self, layer: int, span: Span, keys: range, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [kv_heads, len(keys), head_dim] at positions `keys`, which begin a block. Raises PageDamaged."""
        runs = self._cut(layer, span, keys)
        if len(runs) == 1 and runs[0].lies is Lies.DEVICE:
            both = self._read(self._pages.pages[layer], runs[0].rows, dtype)
        else:
            both = self._join(layer, runs, dtype)
        both = both.flatten(2, 3)[:, :, : len(keys)]
        return both[0], both[1]

    def _join(self, layer: int, runs: list[Run], dtype: torch.dtype) -> torch.Tensor:
        """[2, kv_heads, blocks, BLOCK_TOKENS, head_dim], each run from where it lies. In fresh memory, as one run is:
        a matrix product may depend on its operands' alignment."""
        device, taken = self._pages.pages[layer].values.device, 0
        slices = self._next(layer, runs)
        parts: list[torch.Tensor] = []
        for run in runs:
            if run.lies is Lies.DEVICE:
                parts.append(self._read(self._pages.pages[layer], run.rows, dtype))
            elif run.lies is Lies.HOST:
                parts.append(self._read(self._pages.host_pages[layer], run.rows, dtype))
            elif slices is not None:
                rows = torch.arange(taken, taken + len(run))
                taken += len(run)
                parts.append(self._read(slices, rows, dtype))
        return torch.cat([part.to(device) for part in parts], dim=2)

    def _read(self, pages: LayerPages, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return kv.gather(pages.values, pages.scales, rows, dtype)

    def chunks(self, layer: int, span: Span, parts: list[range]) -> list[range]:
        """`parts` (adjoining splits), those joined that addresses() can give at once: all but the ones that are read
        ahead, whose slices are gone when the next ones come."""
        found: list[range] = []
        joinable = False
        for keys in parts:
            at_hand = all(run.lies is not Lies.AHEAD for run in self._cut(layer, span, keys))
            if at_hand and joinable:
                found[-1] = range(found[-1].start, keys.stop)
            else:
                found.append(keys)
            joinable = at_hand
        return found

    def _cut(self, layer: int, span: Span, keys: range) -> list[Run]:
        places = span.places[self._pages.lanes[layer]]
        runs = self._cuts.get((id(places), keys))
        if runs is None:
            runs = self._cuts[id(places), keys] = places.cut(keys)
        return runs

    def addresses(self, layer: int, span: Span, keys: range) -> torch.Tensor:
        """int64: where in memory the layer's slice of each block of `keys` begins; valid until the next split is asked
        for. On a CPU only. Raises PageDamaged."""
        runs = self._cut(layer, span, keys)
        slices = self._next(layer, runs)
        parts: list[torch.Tensor] = []
        taken = 0
        for run in runs:
            rows = run.rows
            if run.lies is Lies.DEVICE:
                pages = self._pages.pages[layer]
            elif run.lies is Lies.HOST:
                pages = self._pages.host_pages[layer]
            elif slices is not None:
                pages, rows = slices, torch.arange(taken, taken + len(run))
                taken += len(run)
            values = pages.values
            parts.append(rows * (values.stride(0) * values.element_size()) + values.data_ptr())
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _next(self, layer: int, runs: list[Run]) -> LayerPages | None:
        """The slices that are read ahead for these runs, if there are any."""
        count = sum(len(run) for run in runs if run.lies is Lies.AHEAD)
        if self._ahead is None or not count:
            return None
        slices = self._ahead.take(layer)
        if slices.values.shape[0] != count:
            raise ValueError(f"layer {layer} wants {count} pages, {slices.values.shape[0]} were read ahead")
        return slices

    def close(self) -> None:
        """Ends what is being read ahead."""
        if self._ahead is not None:
            self._ahead.close()
