"""Decode over a context larger than the device pool, against what its bytes and arithmetic take, and against paging.

    python tests/bench/bench_stream.py [--directory DIR]

Seeded models whose KV is far larger than their weights; the context's K and V are drawn at random, the decode steps are
the engine's own (TieredStore and Forward). On a CPU the device pool and the RAM tier are both memory, and pages in RAM
are attended to where they lie. Every round does each thing once, so that a change of the machine's load hits all alike;
values are medians, ratios medians of the rounds' ratios. All ways must give the same logits, bit for bit.

`compute` is a step with everything in the device pool. A prediction adds the time of its bytes at the measured rate:
copies are one layer's slices of a context from a slab of pages to contiguous memory, by as many threads as is fastest;
disk reads are O_DIRECT, blocks of 4 MiB, at the best of several depths.

LRU paging: every slice that is not in the device pool is copied there before it is attended to, in place of the one
that was not used for longest. Each step scans the context layer by layer, so with half of it in the pool LRU evicts
just what is wanted next and nothing is ever found (`lru_hits` asks a real LRU). Then slots are taken in turn, and the
copies of a layer's slices are one or two strided ones: no work for each page, one call of the kernel for each layer.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from atlas_kernels import attention_cpu, kv
from atlas_kernels.attention import Variant
from atlas_tiers.base import BLOCK_TOKENS, BlocksComing
from atlas_tiers.disk import DiskConfig
from atlas_tiers.store import TieredStore
from atlas_tiers.stream import Pass, Want
from atlas_tiers.tensors import LayerPages, layer_pages, payload_layers
from families import VOCAB, make
from raw import Raw
from report import row

from atlasd.config import Config
from atlasd.engine.forward import Forward, Piece
from atlasd.engine.model import LoadedModel, load

BUILD = Path(__file__).parent.parent.parent / "build"
ROUNDS, STEPS, FILL_BLOCKS = 9, 4, 8
THREADS = os.cpu_count() or 1
DEPTHS = (1, 3, 6)
PREDICTED_BAR, LRU_BAR = 0.85, 1.9


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model's KV and a context length. `dtype` of the pages."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    dtype: str = "float32"


KINDS = (
    Kind("8 heads of 128, 8k", 4, 16, 8, 128, 8_000),
    Kind("2 heads of 64, 32k", 8, 8, 2, 64, 32_000),
    Kind("8 heads of 128, int8, 16k", 4, 16, 8, 128, 16_000, "int8"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=BUILD, help="on the file system to measure")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
            measure(kind, Path(scratch))
        gc.collect()


def measure(kind: Kind, scratch: Path) -> None:
    """All rounds of one kind, and its rows."""
    loaded = load_model(kind, scratch)
    context = Context(loaded, kind.tokens)
    page, pages = loaded.layout.page_bytes, context.pages
    whole = Held(context, device=pages + 2, host=0, disk=None)
    half, ring = (Held(context, device=pages // 2, host=pages // 2 + 2, disk=None, in_place=n) for n in (True, False))
    less = Held(context, device=pages // 4, host=pages // 4, disk=scratch / "kv")
    paging = Paging(context)
    steppers: dict[str, Callable[[int], torch.Tensor]] = {
        "compute": whole.step, "half": half.step, "half, ring": ring.step, "disk": less.step, "lru": paging.step,
    }  # fmt: skip
    found: list[dict[str, float]] = []
    tokens = dict.fromkeys(steppers, 7)
    with Raw(scratch / "raw", pages * page) as raw:
        raw.allocate()
        raw.write(1)
        for _ in range(ROUNDS + 1):  # the first one warms up
            copy, paging.copy_threads = copy_seconds(context)
            seconds, logits = {"copy": copy}, {}
            for name, step in steppers.items():
                start = time.perf_counter()
                for _ in range(STEPS):
                    logits[name] = step(tokens[name])
                    tokens[name] = int(logits[name].argmax())
                seconds[name] = (time.perf_counter() - start) / STEPS
            seconds["read"] = min(raw.read(depth) for depth in DEPTHS)
            found.append(seconds)
            differing = [name for name, other in logits.items() if not torch.equal(logits["compute"], other)]
            if differing:
                raise RuntimeError(f"{kind.name}: other logits with {differing}")
    report(kind, context, found[1:], away=(half.away, less.on_disk))
    for each in (whole, half, ring, less):
        each.close()


def report(kind: Kind, context: Context, rounds: list[dict[str, float]], away: tuple[int, int]) -> None:
    """Rows of one kind. `away`: pages of which each step needs the bytes from RAM, from disk."""
    share = [pages / context.pages for pages in away]
    kv_gb = context.pages * context.loaded.layout.page_bytes / 1e9

    def median(value: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(value(r) for r in rounds)

    def name(what: str) -> str:
        return f"{kind.name}: {what}"

    compute = 1e3 * median(lambda r: r["compute"])
    row("stream", name("step, all in the pool"), compute, "ms", against=f"{kv_gb:.2f} GB of KV")
    copy, read = (kv_gb / median(lambda r, what=what: r[what]) for what in ("copy", "read"))  # type: ignore[misc]
    against = f"{share[0]:.2f} of the KV at {copy:.1f} GB/s + compute"
    for way, bar in (("half", PREDICTED_BAR), ("half, ring", None)):
        ratio = median(lambda r, way=way: (r["compute"] + share[0] * r["copy"]) / r[way])  # type: ignore[misc]
        what = "half in RAM" if way == "half" else "half in RAM, copied through the ring"
        row("stream", name(what), 1e3 * median(lambda r, way=way: r[way]), "ms", against=against, ratio=ratio, bar=bar,  # type: ignore[misc]
            higher_is_better=True)  # fmt: skip
    ratio = median(lambda r: r["compute"] / r["half"])
    row("stream", name("half in RAM, against compute alone"), 1e3 * median(lambda r: r["half"]), "ms",
        against=f"compute {compute:.1f} ms", ratio=ratio, higher_is_better=True)  # fmt: skip
    lru = 1e3 * median(lambda r: r["lru"])
    row("stream", name("LRU paging through the same pool"), lru, "ms",
        ratio=median(lambda r: (r["compute"] + r["copy"]) / r["lru"]),
        against="the KV copied + compute", higher_is_better=True)  # fmt: skip
    row("stream", name("half in RAM, times faster than LRU paging"), median(lambda r: r["lru"] / r["half"]), "x",
        against=f"LRU paging {lru:.1f} ms", bar=LRU_BAR, higher_is_better=True)  # fmt: skip
    ratio = median(lambda r: (r["compute"] + share[1] * r["read"]) / r["disk"])
    row("stream", name("a part on disk alone"), 1e3 * median(lambda r: r["disk"]), "ms", ratio=ratio,
        against=f"{share[1]:.2f} of the KV at {read:.2f} GB/s + compute", higher_is_better=True)  # fmt: skip


def load_model(kind: Kind, scratch: Path) -> LoadedModel:
    path = make(
        "llama", scratch / "model", hidden_size=256, intermediate_size=512, num_hidden_layers=kind.layers,
        num_attention_heads=kind.heads, num_key_value_heads=kind.kv_heads, head_dim=kind.head_dim,
        max_position_embeddings=kind.tokens + 1000,
    )  # fmt: skip
    settings = {} if kind.dtype == "float32" else {"kv_dtype": kind.dtype}
    return load("seeded", path, Config(quant="none", state_dir=str(scratch), device="cpu", **settings), lambda *_: None)


class Context:
    """A context's pages in plain memory: what every way of decoding starts from."""

    def __init__(self, loaded: LoadedModel, tokens: int) -> None:
        self.loaded = loaded
        self.tokens = [7 + n * 31 % (VOCAB - 7) for n in range(tokens)]
        self.pages = -(-(tokens + STEPS * (ROUNDS + 1)) // BLOCK_TOKENS)
        self.raw = torch.zeros(self.pages, loaded.layout.page_bytes, dtype=torch.uint8)
        self.layers = payload_layers(loaded.layout, self.raw)
        draw = torch.Generator().manual_seed(1)
        for pages in self.layers.values():
            for n in range(self.pages):
                if pages.scales is None:
                    pages.values[n].normal_(0.0, 0.5, generator=draw)
                else:
                    pages.values[n].random_(-127, 128, generator=draw)
                    pages.scales[n].fill_(0.005)

    def slices(self, layer: int) -> torch.Tensor:
        """uint8 [pages, bytes of the layer's slice of one]"""
        offset, size = self.loaded.layout.parts[layer]
        return self.raw[:, offset : offset + size]


class Held:
    """The context as a running sequence of a store with these many pages a tier. Not `in_place`: pages in RAM are
    copied through the ring, as for an accelerator."""

    def __init__(self, context: Context, *, device: int, host: int, disk: Path | None, in_place: bool = True) -> None:
        layout = context.loaded.layout
        config = DiskConfig(disk, cap_bytes=8 << 30, free_floor_bytes=0) if disk else None
        self._store = TieredStore(
            layout, b"bench", device_blocks=device, host_bytes=host * layout.page_bytes, disk=config
        )
        self._sequence = self._store.open(context.tokens, "bench", durable=disk is not None)
        self._fill(context)
        self._forward = Forward(context.loaded, self._store if in_place else NotInPlace(self._store))

    def _fill(self, context: Context) -> None:
        for start in range(0, len(context.tokens), FILL_BLOCKS * BLOCK_TOKENS):
            tokens = context.tokens[start : start + FILL_BLOCKS * BLOCK_TOKENS]
            self._reserve(len(tokens))
            for n in range(start // BLOCK_TOKENS, -(-(start + len(tokens)) // BLOCK_TOKENS)):
                for layer, pages in self._store.pages.items():
                    for to, given in zip(_both(pages), _both(context.layers[layer]), strict=True):
                        to[self._sequence.block_table[n]] = given[n]
            self._sequence.commit(tokens)
        while self._store.writing:
            self._store.wait(0.1)
            self._store.poll()

    def _reserve(self, count: int) -> None:
        while True:
            try:
                return self._sequence.reserve(count)
            except BlocksComing:
                self._store.wait(0.1)
                self._store.poll()

    def step(self, token: int) -> torch.Tensor:
        """One decode step's logits."""
        sequence = self._sequence
        self._reserve(1)
        logits = self._forward([Piece([token], sequence.length, sequence.tables, True)])
        sequence.commit([token])
        return logits[0]

    @property
    def away(self) -> int:
        """Pages outside the device pool."""
        return len(self._sequence.away)

    @property
    def on_disk(self) -> int:
        """Pages on disk alone."""
        return sum(not page.in_ram for page in self._sequence.away.values())

    def close(self) -> None:
        self._sequence.release()
        self._store.close()


class NotInPlace:
    """A store whose RAM tier attention can't read."""

    def __init__(self, store: TieredStore) -> None:
        self.layout, self.lanes, self.pages, self._store = store.layout, store.lanes, store.pages, store
        self.host_pages: dict[int, LayerPages] = {}

    def read_ahead(self, wants: list[Want]) -> Pass:  # type: ignore[override]
        return self._store.read_ahead(wants)


class Paging:
    """LRU paging of the context through a pool with room for half of it. A Sink of the model's attention layers."""

    def __init__(self, context: Context) -> None:
        layout = context.loaded.layout
        self._context, self._layout, self._group = context, layout, layout.groups[0]
        self._slots = context.pages * len(layout.parts) // 2
        if hits := lru_hits(self._slots, context.pages, len(layout.parts)):
            raise RuntimeError(f"LRU would find {hits} slices")
        self._pool = torch.zeros(self._slots, layout.layer_bytes(self._group), dtype=torch.uint8)
        self._next, self._length = 0, len(context.tokens)
        self.copy_threads = 1

    @torch.inference_mode()
    def step(self, token: int) -> torch.Tensor:
        """One decode step's logits."""
        ids, positions = torch.tensor([[token]]), torch.tensor([[self._length]])
        self._length += 1
        keep = torch.tensor([0])
        model: Any = self._context.loaded.model
        out = model(input_ids=ids, position_ids=positions, use_cache=False, step=self, logits_to_keep=keep)
        return out.logits[0, 0].float()  # type: ignore[no-any-return]

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        to, position = self._context.layers[layer], self._length - 1
        block, offset = torch.tensor([position // BLOCK_TOKENS]), torch.tensor([position % BLOCK_TOKENS])
        kv.append(to.values, to.scales, block, offset, key, value)

    def attend(self, layer: int, query: torch.Tensor, variant: Variant) -> torch.Tensor:
        addresses = torch.cat([self._bring(layer, first, last) for first, last in self._runs()])
        group, values = self._group, layer_pages(self._layout, self._group, self._pool).values
        pages = attention_cpu.Pages(addresses, values.dtype, group.kv_heads, group.head_dim)
        call = attention_cpu.Call(variant.scale, threads=THREADS)
        return attention_cpu.attend(query, pages, [self._length - 1], call)[0]

    def _runs(self) -> Iterator[tuple[int, int]]:
        """The layer's slices in one run of slots, or two where the slots begin anew."""
        count = -(-self._length // BLOCK_TOKENS)
        fits = min(count, self._slots - self._next)
        yield 0, fits
        if fits < count:
            yield fits, count

    def _bring(self, layer: int, first: int, last: int) -> torch.Tensor:
        """Copies slices [first, last) to the slots whose turn it is; their addresses."""
        slots = range(self._next, self._next + last - first)
        self._next = slots.stop % self._slots
        copy(self._pool[slots.start : slots.stop], self._context.slices(layer)[first:last], self.copy_threads)
        return torch.arange(slots.start, slots.stop) * self._pool.stride(0) + self._pool.data_ptr()


def lru_hits(slots: int, pages: int, layers: int) -> int:
    """How many slices a real LRU of `slots` finds in the second of two steps."""
    cache: collections.OrderedDict[tuple[int, int], None] = collections.OrderedDict()
    hits = 0
    for step in range(2):
        for key in ((layer, page) for layer in range(layers) for page in range(pages)):
            hits += step and key in cache
            cache[key] = None
            cache.move_to_end(key)
            if len(cache) > slots:
                cache.popitem(last=False)
    return hits


def copy_seconds(context: Context) -> tuple[float, int]:
    """To copy the context once, layer by layer, with the number of threads that is fastest; that number."""
    into = torch.zeros(context.slices(0).shape, dtype=torch.uint8)
    found = []
    for threads in range(1, THREADS + 1):
        start = time.perf_counter()
        for layer in range(len(context.loaded.layout.parts)):
            copy(into, context.slices(layer), threads)
        found.append((time.perf_counter() - start, threads))
    return min(found)


def copy(into: torch.Tensor, given: torch.Tensor, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    into.copy_(given)
    torch.set_num_threads(before)


def _both(pages: LayerPages) -> list[torch.Tensor]:
    return [pages.values] if pages.scales is None else [pages.values, pages.scales]


if __name__ == "__main__":
    main()
