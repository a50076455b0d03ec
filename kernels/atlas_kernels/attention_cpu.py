"""Paged attention on the CPU by the compiled kernels: few query rows against the KV blocks where they lie.

Symbols as in attention.py. A *split* is a run of SPLIT_BLOCKS blocks (1024 tokens) at fixed positions. Each gives a
partial result; `merge` joins partials in ascending order. A row's numbers depend on its query, its position and the
keys it sees alone: bitwise the same wherever blocks lie, whichever rows are with it, however many threads run.

Math: out = Σ e^(s-m) v / Σ e^(s-m), lse = m + ln Σ e^(s-m), over the keys that the row sees (FlashAttention's online
softmax, arXiv 2205.14135, section 3.1), in float32; scores s as in attention.reference, which is the specification.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from atlas_kernels.cpu.library import Level, Library, library
from atlas_kernels.errors import KernelInputError

BLOCK_TOKENS = 64
SPLIT_BLOCKS = 16
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}
MAX_HEAD_DIM = 1024


@dataclasses.dataclass(frozen=True)
class Pages:
    """The KV blocks that cover positions [first, first + 64 · n).

    A layer's slice of a block is K [G, 64, D], V [G, 64, D]; for int8 codes, float16 scales [2, G, 64] follow and a
    value is code · scale. `offset` is where in each block the layer's slice begins. Whoever makes one keeps the memory
    alive and unmoved until the last call with it.
    """

    addresses: Tensor  # int64 [n] on the CPU
    dtype: torch.dtype
    kv_heads: int
    head_dim: int
    first: int = 0
    offset: int = 0  # bytes

    def __post_init__(self) -> None:
        a = self.addresses
        if a.dtype != torch.int64 or a.dim() != 1 or a.device.type != "cpu" or not a.is_contiguous():
            raise KernelInputError(f"block addresses are {a.dtype} {tuple(a.shape)} on {a.device}; expected int64 [n]")
        if self.dtype not in DTYPES:
            raise KernelInputError(f"KV blocks are {self.dtype}; expected one of {', '.join(map(str, DTYPES))}")
        if self.first < 0 or self.first % BLOCK_TOKENS:
            raise KernelInputError(f"the first block starts at {self.first}; expected a multiple of {BLOCK_TOKENS}")
        if self.kv_heads < 1 or not 1 <= self.head_dim <= MAX_HEAD_DIM:
            raise KernelInputError(f"{self.kv_heads} KV heads of {self.head_dim}; expected 1 to {MAX_HEAD_DIM}")

    @staticmethod
    def of_slab(slab: Tensor, table: Tensor, first: int = 0) -> Pages:
        """The blocks `table` (int64 [n]) of a slab [blocks, layers, 2, G, 64, D]; `layer` then chooses one."""
        if slab.dim() != 6 or slab.shape[2] != 2 or slab.shape[4] != BLOCK_TOKENS or slab.device.type != "cpu":
            raise KernelInputError(
                f"a slab is {tuple(slab.shape)} on {slab.device}; expected [blocks, layers, 2, G, 64, D]"
            )
        if not slab[0].is_contiguous():
            raise KernelInputError("a block of the slab is not contiguous")
        if table.numel() and not 0 <= int(table.min()) <= int(table.max()) < slab.shape[0]:
            raise KernelInputError(f"the block table names a block outside [0, {slab.shape[0]})")
        addresses = slab.data_ptr() + table * (slab.stride(0) * slab.element_size())
        return Pages(addresses, slab.dtype, slab.shape[3], slab.shape[5], first)

    @property
    def slice_bytes(self) -> int:
        """Bytes of one layer's slice of one block."""
        values = 2 * self.kv_heads * BLOCK_TOKENS
        return values * self.head_dim * self.dtype.itemsize + (2 * values if self.dtype == torch.int8 else 0)

    def layer(self, index: int) -> Pages:
        """The same blocks for the group's layer number `index`, where layers lie one after the other."""
        return dataclasses.replace(self, offset=index * self.slice_bytes)


@dataclasses.dataclass(frozen=True)
class Call:
    """How scores are made, and how the work is run. `window` 0 and `softcap` 0.0: none. `sinks` float32 [H]."""

    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None
    threads: int = 1
    level: Level | None = None  # None: the best this processor has


class _Attention(ctypes.Structure):
    _fields_ = [
        ("q", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("q_row_stride", "q_head_stride", "rows", "heads", "kv_heads", "dim")),
        ("positions", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "first", "offset", "window")),
        ("sinks", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("dtype", "level", "threads")),
    ]


class _Merge(ctypes.Structure):
    _fields_ = [
        ("parts", ctypes.c_void_p),
        ("part_lse", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("splits", "rows", "heads", "dim")),
        ("sinks", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
    ]


class _Functions:
    """The library's attention functions with their types."""

    def __init__(self, loaded: Library) -> None:
        call, address = ctypes.POINTER(_Attention), ctypes.c_void_p
        self.best = loaded.best
        self.attend = loaded.function("atlas_attend", ctypes.c_int, call, address, address)
        self.splits = loaded.function("atlas_attend_splits", ctypes.c_int, call, address, address)
        self.count = loaded.function("atlas_split_count", ctypes.c_int64, call)
        self.merge = loaded.function("atlas_merge", ctypes.c_int, ctypes.POINTER(_Merge), ctypes.c_int)


@functools.cache
def _functions() -> _Functions:
    return _Functions(library())


def attend(q: Tensor, pages: Pages, positions: Sequence[int], call: Call) -> tuple[Tensor, Tensor]:
    """Attention over all of `pages`, sinks included: q [H, T, D] → out [T, H, D] and lse [H, T], float32.

    Row i stands at positions[i] and sees (positions[i] - window, positions[i]]; `pages` must hold those. A row that
    sees nothing gets 0 and -inf. Raises KernelInputError, and Unavailable where there is no compiled library.
    """
    struct, keep = _arguments(q, pages, positions, call)
    heads, rows, dim = q.shape
    out, lse = torch.empty(rows, heads, dim), torch.empty(heads, rows)
    _done(_functions().attend(ctypes.byref(struct), out.data_ptr(), lse.data_ptr()))
    del keep
    return out, lse


def partials(q: Tensor, pages: Pages, positions: Sequence[int], call: Call) -> tuple[Tensor, Tensor]:
    """Each split that `pages` touch by itself, ascending, sinks left out: parts [S, T, H, D] and lse [S, H, T].

    The first one is number pages.first // 1024. Keys that `pages` do not hold are taken for keys that no row sees.
    Raises as `attend`.
    """
    struct, keep = _arguments(q, pages, positions, call)
    heads, rows, dim = q.shape
    count = _functions().count(ctypes.byref(struct))
    parts, lse = torch.empty(count, rows, heads, dim), torch.empty(count, heads, rows)
    _done(_functions().splits(ctypes.byref(struct), parts.data_ptr(), lse.data_ptr()))
    del keep
    return parts, lse


def merge(parts: Tensor, lse: Tensor, sinks: Tensor | None = None, level: Level | None = None) -> tuple[Tensor, Tensor]:
    """Joins partials [S, T, H, D] with lse [S, H, T] in their order, then the sinks: out [T, H, D], lse [H, T].

    What `attend` gives, bitwise, when these are all its splits in ascending order. Raises as `attend`.
    """
    splits, rows, heads, dim = parts.shape
    if tuple(lse.shape) != (splits, heads, rows):
        raise KernelInputError(f"partials {tuple(parts.shape)} come with lse {tuple(lse.shape)}")
    for name, tensor in (("partials", parts), ("lse", lse)):
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise KernelInputError(f"{name} are {tensor.dtype} on {tensor.device}; expected contiguous float32")
    _check_sinks(sinks, heads)
    out, total = torch.empty(rows, heads, dim), torch.empty(heads, rows)
    pointers = (parts.data_ptr(), lse.data_ptr(), splits, rows, heads, dim, _address(sinks))
    struct = _Merge(*pointers, out.data_ptr(), total.data_ptr())
    _done(_functions().merge(ctypes.byref(struct), _level(level)))
    return out, total


def _arguments(q: Tensor, pages: Pages, positions: Sequence[int], call: Call) -> tuple[_Attention, tuple[object, ...]]:
    """The struct, and what must live as long as it."""
    if q.dim() != 3 or q.device.type != "cpu" or not q.is_floating_point():
        raise KernelInputError(f"queries are {q.dtype} {tuple(q.shape)} on {q.device}; expected floats [H, T, D]")
    heads, rows, dim = q.shape
    if dim != pages.head_dim or heads % pages.kv_heads or len(positions) != rows or not rows:
        raise KernelInputError(
            f"queries {tuple(q.shape)} at {len(positions)} positions do not fit "
            f"{pages.kv_heads} KV heads of {pages.head_dim}"
        )
    if min(positions) < 0 or call.window < 0 or call.softcap < 0:
        raise KernelInputError(f"a negative position, window ({call.window}) or softcap ({call.softcap})")
    _check_sinks(call.sinks, heads)
    q = q.float()
    if q.stride(2) != 1 and dim != 1:
        q = q.contiguous()
    at = (ctypes.c_int64 * rows)(*positions)
    struct = _Attention(
        q.data_ptr(), q.stride(1), q.stride(0), rows, heads, pages.kv_heads, dim,
        ctypes.addressof(at), pages.addresses.data_ptr(), pages.addresses.shape[0], pages.first, pages.offset,
        call.window, _address(call.sinks), call.scale, call.softcap,
        DTYPES[pages.dtype], _level(call.level), call.threads,
    )  # fmt: skip
    return struct, (q, at)


def _check_sinks(sinks: Tensor | None, heads: int) -> None:
    if sinks is not None and (sinks.dtype != torch.float32 or sinks.shape != (heads,) or not sinks.is_contiguous()):
        raise KernelInputError(f"sinks are {sinks.dtype} {tuple(sinks.shape)}; expected float32 [{heads}]")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _level(level: Level | None) -> Level:
    return _functions().best if level is None else level


def _done(status: int) -> None:
    if status == -1:
        raise KernelInputError("this processor does not have that instruction set")
    if status:
        raise MemoryError("scratch memory for attention")
