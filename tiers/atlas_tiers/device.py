"""The device pool's memory: one slab a group, copies between blocks and payloads."""

from __future__ import annotations

import ctypes

import torch

from .base import PageLayout
from .memory import address, aligned_buffer, prefault
from .tensors import LayerPages, group_layers

PREFAULT_BYTES = 512 << 20  # of the slabs' beginnings, where blocks are taken from first; half of each at most


class DeviceMemory:
    """Slabs of raw bytes [blocks, group_bytes], zero at first, so that what lies beyond a sequence's length is always
    finite. A payload is the groups' rows of one block, one after the other. Copies may run on any thread."""

    def __init__(self, layout: PageLayout, blocks: int, device: str) -> None:
        """Raises OSError or torch.OutOfMemoryError when there is not that much memory."""
        self._layout = layout
        self._on_cpu = torch.device(device).type == "cpu"
        sizes = layout.group_bytes
        self._rows = [_slab(blocks, size, device, self._on_cpu, PREFAULT_BYTES // len(sizes)) for size in sizes]
        self._bases = [row.data_ptr() for row in self._rows]
        self.layers: dict[int, LayerPages] = {}
        for group, rows in zip(layout.groups, self._rows, strict=True):
            self.layers |= group_layers(layout, group, rows)

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
        for rows in self._rows:
            rows[target].copy_(rows[source])

    def erase(self, block: int) -> None:
        """Overwrites a block with zeros."""
        for rows in self._rows:
            rows[block].zero_()

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


def _slab(blocks: int, row_bytes: int, device: str, on_cpu: bool, prefaulted: int) -> torch.Tensor:
    if not on_cpu:
        return torch.zeros((blocks, row_bytes), dtype=torch.uint8, device=device)
    memory = aligned_buffer(blocks * row_bytes)  # torch.zeros would touch, and so commit, all of it
    prefault(memory[: min(prefaulted, blocks * row_bytes // 2)])
    return torch.frombuffer(memory, dtype=torch.uint8).view(blocks, row_bytes)
