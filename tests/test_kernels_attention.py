"""Paged attention by the compiled kernels against the definition in float64, on every instruction set there is."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

import pytest
import torch
from atlas_kernels.attention_cpu import BLOCK_TOKENS, SPLIT_BLOCKS, Call, Pages, attend, merge, partials
from atlas_kernels.cpu.library import Level, library
from atlas_kernels.errors import KernelInputError
from kernel_support import LEVELS, Guarded, compiled, each_level, poisoned
from torch import Tensor

pytestmark = compiled
SPLIT = BLOCK_TOKENS * SPLIT_BLOCKS


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned():
        yield


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    memory = Guarded()
    yield memory
    memory.close()


@dataclasses.dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    dim: int
    rows: int
    length: int
    window: int = 0
    softcap: float = 0.0

    def call(self, level: Level | None = None, threads: int = 1, sinks: Tensor | None = None) -> Call:
        return Call(self.dim**-0.5, self.window, self.softcap, sinks, threads, level)

    @property
    def positions(self) -> range:
        return range(self.length - self.rows, self.length)


CASES = [
    Case(6, 2, 64, 1, 1500),
    Case(8, 1, 80, 3, 2100, softcap=30.0),
    Case(5, 5, 36, 16, 200, window=100),
    Case(4, 2, 33, 7, 1100, window=50),
    Case(7, 1, 256, 2, 130),
    Case(4, 4, 128, 1, 2 * SPLIT + 1, window=SPLIT),
    Case(2, 1, 1, 2, 3),
    Case(3, 1, 40, 1, SPLIT),
    Case(32, 4, 72, 16, 1025),
]
named = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.heads}-{c.kv_heads}x{c.dim}-{c.rows}of{c.length}")


class Context:
    """Random KV blocks of one layer among others in a slab, in shuffled places; `kv` is what they hold, in float64."""

    def __init__(self, case: Case, dtype: torch.dtype, seed: int, spread: float = 1.0) -> None:
        make = torch.Generator().manual_seed(seed)
        count, spare = -(-case.length // BLOCK_TOKENS), 3
        shape = (count + spare, 2, 2, case.kv_heads, BLOCK_TOKENS, case.dim)
        self.slab = (torch.randn(shape, generator=make) * spread).to(dtype)
        self.table = torch.randperm(count + spare, generator=make)[:count]
        self.pages = Pages.of_slab(self.slab, self.table).layer(1)
        held = self.slab[self.table, 1].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : case.length]
        self.k, self.v = held[0].double(), held[1].double()
        self.q = torch.randn(case.heads, case.rows, case.dim, generator=make)


def definition(q: Tensor, k: Tensor, v: Tensor, positions: Sequence[int], call: Call) -> tuple[Tensor, Tensor]:
    """Row by row and head by head in float64: [T, H, D] and [H, T]."""
    heads, rows, _ = q.shape
    out, lse = torch.zeros(rows, heads, v.shape[2], dtype=torch.float64), torch.zeros(heads, rows, dtype=torch.float64)
    for t, position in enumerate(positions):
        first = max(0, position - call.window + 1) if call.window else 0
        for h in range(heads):
            g = h * k.shape[0] // heads
            s = (k[g, first : position + 1] @ q[h, t].double()) * call.scale
            if call.softcap:
                s = torch.tanh(s / call.softcap) * call.softcap
            logits = s if call.sinks is None else torch.cat([s, call.sinks[h : h + 1].double()])
            lse[h, t] = torch.logsumexp(logits, 0)
            out[t, h] = torch.exp(s - lse[h, t]) @ v[g, first : position + 1]
    return out, lse


def close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 2e-6) -> None:
    for name, a, b in zip(("out", "lse"), found, expected, strict=True):
        assert a.shape == b.shape
        worst = float((a.double() - b).abs().max())
        assert worst <= tolerance * max(1.0, float(b.abs().max())), f"{name} differs by {worst}"


@each_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@named
def test_it_computes_the_definition(case: Case, dtype: torch.dtype, level: Level) -> None:
    context = Context(case, dtype, seed=case.length)
    found = attend(context.q, context.pages, case.positions, case.call(level, threads=2))
    close(found, definition(context.q, context.k, context.v, case.positions, case.call()))


@each_level
@named
def test_int8_codes_with_scales(case: Case, level: Level) -> None:
    make = torch.Generator().manual_seed(5)
    count = -(-case.length // BLOCK_TOKENS)
    codes = torch.randint(-127, 128, (count, 2, case.kv_heads, BLOCK_TOKENS, case.dim), generator=make).to(torch.int8)
    scales = (torch.rand(count, 2, case.kv_heads, BLOCK_TOKENS, generator=make) * 0.02 + 1e-6).half()
    flat = torch.cat([codes.view(count, -1), scales.view(count, -1).view(torch.int8)], dim=1)
    order = torch.randperm(count, generator=make)
    stored = flat[order].contiguous()
    addresses = stored.data_ptr() + order.argsort() * stored.shape[1]
    pages = Pages(addresses, torch.int8, case.kv_heads, case.dim)
    assert pages.slice_bytes == stored.shape[1]
    kv = (codes.double() * scales.double()[..., None]).permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : case.length]
    q = torch.randn(case.heads, case.rows, case.dim, generator=make)
    found = attend(q, pages, case.positions, case.call(level))
    close(found, definition(q, kv[0], kv[1], case.positions, case.call()))


@each_level
def test_scores_far_apart(level: Level) -> None:
    case = Case(4, 2, 64, 2, 1200)
    context = Context(case, torch.float32, 1, spread=30.0)
    found = attend(context.q, context.pages, case.positions, case.call(level))
    close(found, definition(context.q, context.k, context.v, case.positions, case.call()), 1e-5)


@each_level
def test_sinks_take_weight(level: Level) -> None:
    case = Case(6, 2, 64, 3, 1100)
    context, sinks = Context(case, torch.float32, 2), torch.linspace(-3, 9, 6)
    found = attend(context.q, context.pages, case.positions, case.call(level, sinks=sinks))
    close(found, definition(context.q, context.k, context.v, case.positions, case.call(sinks=sinks)))


@each_level
@named
def test_a_row_does_not_depend_on_the_batch(case: Case, level: Level) -> None:
    context = Context(case, torch.bfloat16, 3)
    out, lse = attend(context.q, context.pages, case.positions, case.call(level))
    for t, position in enumerate(case.positions):
        alone = attend(context.q[:, t : t + 1], context.pages, [position], case.call(level))
        assert torch.equal(alone[0][0], out[t])
        assert torch.equal(alone[1][:, 0], lse[:, t])


@each_level
def test_a_row_does_not_depend_on_keys_that_it_does_not_see(level: Level) -> None:
    case = Case(4, 2, 64, 4, 300, window=100)
    context = Context(case, torch.float32, 4)
    out, lse = attend(context.q, context.pages, case.positions, case.call(level))
    block, offset = divmod(case.length - 1, BLOCK_TOKENS)
    context.slab[context.table[block], :, :, :, offset:] = float("nan")  # the last row sees it, and empty places follow
    context.slab[context.table[: (case.positions[0] - case.window + 1) // BLOCK_TOKENS]] = float("inf")
    again, again_lse = attend(context.q, context.pages, case.positions, case.call(level))
    assert torch.equal(again[:3], out[:3])
    assert torch.equal(again_lse[:, :3], lse[:, :3])
    assert bool(again[3].isnan().all())


@each_level
@named
def test_neither_places_nor_threads_change_a_bit(case: Case, level: Level) -> None:
    context = Context(case, torch.float16, 6)
    expected = attend(context.q, context.pages, case.positions, case.call(level))
    other = torch.full((2 * len(context.table) + 1, *context.slab.shape[1:]), float("nan")).half()
    table = torch.arange(len(context.table)).flip(0) * 2 + 1
    other[table] = context.slab[context.table]
    for threads in (1, 2, 3):
        pages = Pages.of_slab(other, table).layer(1)
        found = attend(context.q, pages, case.positions, case.call(level, threads))
        assert all(map(torch.equal, found, expected))


@each_level
def test_threads_change_no_bit_of_a_large_call(level: Level) -> None:
    case = Case(8, 2, 64, 2, 8 * SPLIT + 70)
    context = Context(case, torch.float32, 7)
    expected = attend(context.q, context.pages, case.positions, case.call(level))
    for threads in (2, 3, 2, 3):
        found = attend(context.q, context.pages, case.positions, case.call(level, threads))
        assert all(map(torch.equal, found, expected))


@each_level
@named
def test_partials_merge_into_the_whole(case: Case, level: Level) -> None:
    context = Context(case, torch.float32, 8)
    sinks = torch.randn(case.heads)
    whole = attend(context.q, context.pages, case.positions, case.call(level, sinks=sinks))
    parts, lse = partials(context.q, context.pages, case.positions, case.call(level, sinks=sinks))
    assert parts.shape[0] == -(-case.length // SPLIT)
    one_by_one = []
    for split in range(parts.shape[0]):
        held = context.table[split * SPLIT_BLOCKS : (split + 1) * SPLIT_BLOCKS]
        pages = Pages.of_slab(context.slab, held, split * SPLIT).layer(1)
        one_by_one.append(partials(context.q, pages, case.positions, case.call(level, threads=2)))
    assert torch.equal(torch.cat([part for part, _ in one_by_one]), parts)
    assert torch.equal(torch.cat([part for _, part in one_by_one]), lse)
    assert all(map(torch.equal, merge(parts, lse, sinks, level), whole))


@each_level
def test_blocks_before_the_window_may_be_left_out(level: Level) -> None:
    case = Case(4, 2, 64, 2, 2 * SPLIT + 500, window=700)
    context = Context(case, torch.float32, 9)
    expected = attend(context.q, context.pages, case.positions, case.call(level))
    first = (case.positions[0] - case.window + 1) // BLOCK_TOKENS
    pages = Pages.of_slab(context.slab, context.table[first:], first * BLOCK_TOKENS).layer(1)
    assert all(map(torch.equal, attend(context.q, pages, case.positions, case.call(level)), expected))


@each_level
def test_a_split_that_a_row_does_not_see_counts_for_nothing(level: Level) -> None:
    case = Case(4, 2, 64, 2, SPLIT + 1)
    context = Context(case, torch.float32, 10)
    parts, lse = partials(context.q, context.pages, case.positions, case.call(level))
    assert bool((lse[1, :, 0] == -math.inf).all())
    assert not bool(parts[1, 0].any())
    assert bool(lse[1, :, 1].isfinite().all())
    out, total = merge(parts[:1, :1].contiguous(), lse[:1, :, :1].contiguous(), level=level)
    assert torch.equal(out[0], parts[0, 0])
    assert torch.equal(total[:, 0], lse[0, :, 0])


@each_level
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("dim", [32, 33, 47, 80])
def test_nothing_is_read_beside_a_block(
    level: Level, at_end: bool, dtype: torch.dtype, dim: int, guarded: Guarded
) -> None:
    block = torch.ones(
        Pages(torch.zeros(1, dtype=torch.int64), dtype, 3, dim).slice_bytes // dtype.itemsize, dtype=dtype
    )
    memory = guarded.copy(block, at_end=at_end)
    q = guarded.copy(torch.ones(6, 2, dim), at_end=at_end)
    pages = Pages(guarded.copy(torch.tensor([memory.data_ptr()]), at_end=at_end), dtype, 3, dim)
    out, _ = attend(q, pages, [62, 63], Call(0.01, level=level))
    assert bool(out.isfinite().all())


@each_level
def test_strided_queries(level: Level) -> None:
    case = Case(6, 2, 64, 3, 200)
    context = Context(case, torch.float32, 11)
    expected = attend(context.q, context.pages, case.positions, case.call(level))
    rows_first = context.q.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.zeros(6, 3, 128)[:, :, ::2].copy_(context.q)
    for q in (rows_first, wide):
        assert all(map(torch.equal, attend(q, context.pages, case.positions, case.call(level)), expected))


def test_two_callers_at_once() -> None:
    case = Case(8, 2, 64, 2, 4 * SPLIT)
    context = Context(case, torch.float32, 12)
    expected = attend(context.q, context.pages, case.positions, case.call())
    wrong: list[int] = []

    def work() -> None:
        for n in range(40):
            found = attend(context.q, context.pages, case.positions, case.call(threads=3))
            if not all(map(torch.equal, found, expected)):
                wrong.append(n)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


FORK = """
import os, torch
from atlas_kernels.attention_cpu import Call, Pages, attend
slab = torch.randn(80, 1, 2, 2, 64, 64)
pages, q = Pages.of_slab(slab, torch.arange(80)), torch.randn(8, 1, 64)
run = lambda: attend(q, pages, [5119], Call(0.125, threads=3))[0]
before = run()
child = os.fork()
same = all(torch.equal(run(), before) for _ in range(20))
if child == 0:
    os._exit(0 if same else 1)
raise SystemExit(os.waitpid(child, 0)[1] or not same)
"""


def test_a_forked_child_has_threads_of_its_own() -> None:
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], timeout=120).returncode == 0


def test_what_does_not_fit_is_refused() -> None:
    case = Case(4, 2, 64, 1, 100)
    context = Context(case, torch.float32, 13)
    q, pages, call = context.q, context.pages, case.call()
    refused = [
        (q.int(), pages, [99], call),
        (q[0], pages, [99], call),
        (q[:3], pages, [99], call),
        (q[:, :, :32], pages, [99], call),
        (q, pages, [98, 99], call),
        (q, pages, [-1], call),
        (q, pages, [99], dataclasses.replace(call, window=-1)),
        (q, pages, [99], dataclasses.replace(call, sinks=torch.zeros(3))),
    ]
    for arguments in refused:
        with pytest.raises(KernelInputError):
            attend(*arguments)
    with pytest.raises(KernelInputError, match="outside"):
        Pages.of_slab(context.slab, torch.tensor([0, len(context.slab)]))
    with pytest.raises(KernelInputError, match="multiple of 64"):
        dataclasses.replace(pages, first=10)
    with pytest.raises(KernelInputError, match="float64"):
        dataclasses.replace(pages, dtype=torch.float64)
    with pytest.raises(KernelInputError, match="lse"):
        merge(torch.zeros(1, 1, 4, 64), torch.zeros(1, 1, 4))


@pytest.mark.skipif(LEVELS[-1:] == [Level.AVX512_VBMI], reason="this processor has every level")
def test_a_level_that_the_processor_lacks_is_refused() -> None:
    case = Case(2, 1, 64, 1, 10)
    context = Context(case, torch.float32, 14)
    with pytest.raises(KernelInputError, match="instruction set"):
        attend(context.q, context.pages, case.positions, case.call(Level(library().best + 1)))
