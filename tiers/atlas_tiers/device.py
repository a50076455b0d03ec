"""The device pool's memory: one slab a group, copies between blocks and payloads. The one file that imports torch."""

from __future__ import annotations

import ctypes

import torch

from .base import BLOCK_TOKENS, KVGroup, PageLayout
from .memory import address, aligned_buffer, prefault

PREFAULT_BYTES = 128 << 20  # of each slab's beginning, where blocks are taken from first

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class DeviceMemory:
    """Slabs [blocks, layers, 2, kv_heads, BLOCK_TOKENS, head_dim], zero at first, so that what lies beyond a sequence's
    length is always finite. A payload is the groups' rows of one block, one after the other. Copies may run on any
    thread."""

    def __init__(self, layout: PageLayout, blocks: int, device: str) -> None:
        """Raises OSError or torch.OutOfMemoryError when there is not that much memory."""
        self._layout = layout
        self._on_cpu = torch.device(device).type == "cpu"
        self.slabs = [_slab(layout, group, blocks, device, self._on_cpu) for group in layout.groups]
        rows = [slab.flatten(1).view(torch.uint8) for slab in self.slabs]
        self._rows = rows  # [blocks, group_bytes]
        self._bases = [row.data_ptr() for row in rows]

    def read(self, block: int, into: memoryview) -> None:
        """Copies a block to a payload buffer of page_bytes."""
        start = 0
        for group, size in enumerate(self._layout.group_bytes):
            self._copy(group, block, into[start : start + size], to_block=False)
            start += size

    def write(self, block: int, payload: memoryview) -> None:
        """Copies a payload of page_bytes to a block."""
        start = 0
        for group, size in enumerate(self._layout.group_bytes):
            self._copy(group, block, payload[start : start + size], to_block=True)
            start += size

    def duplicate(self, source: int, target: int) -> None:
        """Copies one block to another."""
        for slab in self.slabs:
            slab[target].copy_(slab[source])

    def erase(self, block: int) -> None:
        """Overwrites a block with zeros."""
        for slab in self.slabs:
            slab[block].zero_()

    def _copy(self, group: int, block: int, part: memoryview, *, to_block: bool) -> None:
        if self._on_cpu:  # memmove gives up the interpreter lock and starts no OpenMP team on this thread
            inside, outside = self._bases[group] + block * part.nbytes, address(part)
            target, source = (inside, outside) if to_block else (outside, inside)
            ctypes.memmove(target, source, part.nbytes)
            return
        row, bytes_ = self._rows[group][block], torch.frombuffer(part, dtype=torch.uint8)
        if to_block:
            row.copy_(bytes_)
        else:
            bytes_.copy_(row)


def _slab(layout: PageLayout, group: KVGroup, blocks: int, device: str, on_cpu: bool) -> torch.Tensor:
    dtype = _DTYPES[layout.dtype]
    shape = (blocks, len(group.layers), 2, group.kv_heads, BLOCK_TOKENS, group.head_dim)
    if not on_cpu:
        return torch.zeros(shape, dtype=dtype, device=device)
    count = 1
    for size in shape:
        count *= size
    memory = aligned_buffer(count * dtype.itemsize)  # torch.zeros would touch, and so commit, all of it
    prefault(memory[:PREFAULT_BYTES])
    return torch.frombuffer(memory, dtype=dtype).view(shape)
