"""Reading ahead: layer slices of pages that are not in the device pool, brought through a ring of buffers.

A forward pass knows at its start which slices its attention will want, in which order. While it computes with one
buffer, threads fill the next ones. A slice is verified before it is handed out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from .base import PageLayout
from .counters import Counters
from .held import Held
from .memory import aligned_buffer
from .tensors import LayerPages, layer_pages

RING_BYTES = 64 << 20
MOST_BUFFERS = 8
PAGES_A_TASK = 4  # read by one thread after the other


@dataclasses.dataclass(frozen=True)
class Want:
    """One layer's slices of some pages, in order."""

    layer: int
    pages: Sequence[Held]


class Slices(Protocol):
    """The slices of one forward pass, one after the other."""

    def take(self, layer: int) -> LayerPages:
        """The next slices, valid until the next call. Raises PageDamaged, and ValueError when `layer` is not the one
        whose turn it is."""
        ...

    def close(self) -> None:
        """Waits for the reads that are under way: buffers and pins may be used otherwise then."""
        ...


@dataclasses.dataclass
class _Buffer:
    memory: memoryview
    tensor: torch.Tensor  # uint8, the same bytes


class Ring:
    """The buffers and the threads that fill them; one pass at a time uses it. `most`: pages in one Want."""

    def __init__(self, layout: PageLayout, counters: Counters, *, most: int, readers: int) -> None:
        self._layout, self._counters = layout, counters
        self._groups = {layer: group for group in layout.groups for layer in group.layers}
        self._parts = {layer: n for n, layer in enumerate(layer for g in layout.groups for layer in g.layers)}
        self._bytes = most * max(layout.layer_bytes(group) for group in layout.groups)
        self._count = max(2, min(MOST_BUFFERS, RING_BYTES // self._bytes))
        self._buffers: list[_Buffer] = []
        self._threads = ThreadPoolExecutor(readers, "kv-stream")

    def begin(self, wants: Sequence[Want]) -> Pass:
        """Starts reading what a pass will want, in order."""
        while len(self._buffers) < self._count:
            memory = aligned_buffer(self._bytes)
            self._buffers.append(_Buffer(memory, torch.frombuffer(memory, dtype=torch.uint8)))
        return Pass(self, wants)

    def fill(self, buffer: int, want: Want) -> list[Future[None]]:
        """Starts filling a buffer that nobody uses."""
        size = self._layout.layer_bytes(self._groups[want.layer])
        starts = range(0, len(want.pages), PAGES_A_TASK)
        return [self._threads.submit(self._read, buffer, want, start, size) for start in starts]

    def _read(self, buffer: int, want: Want, start: int, size: int) -> None:
        part = self._parts[want.layer]
        for n, page in enumerate(want.pages[start : start + PAGES_A_TASK], start):
            into = self._buffers[buffer].memory[n * size : (n + 1) * size]
            page.tier.load_parts(page.entry, part, part + 1, into)
            self._counters.add("streamed_host_bytes" if page.in_ram else "streamed_disk_bytes", size)

    def view(self, buffer: int, want: Want) -> LayerPages:
        """A filled buffer as pages."""
        group = self._groups[want.layer]
        size = self._layout.layer_bytes(group)
        raw = self._buffers[buffer].tensor[: len(want.pages) * size].view(len(want.pages), size)
        return layer_pages(self._layout, group, raw)

    @property
    def depth(self) -> int:
        """Buffers: one is used while the others are filled."""
        return self._count

    def close(self) -> None:
        """Stops the threads."""
        self._threads.shutdown(cancel_futures=True)


class Pass:
    """The slices of one forward pass, one after the other."""

    def __init__(self, ring: Ring, wants: Sequence[Want]) -> None:
        self._ring, self._wants = ring, wants
        self._filling: list[list[Future[None]]] = []
        self._taken = 0
        self._fill()

    def _fill(self) -> None:
        """The buffer of the last slices that were handed out is still in use; all others may be filled."""
        while len(self._filling) < min(len(self._wants), max(0, self._taken - 1) + self._ring.depth):
            number = len(self._filling)
            self._filling.append(self._ring.fill(number % self._ring.depth, self._wants[number]))

    def take(self, layer: int) -> LayerPages:
        """The next slices, valid until the next call. Raises PageDamaged, and ValueError when `layer` is not the one
        whose turn it is."""
        number = self._taken
        if number >= len(self._wants) or self._wants[number].layer != layer:
            raise ValueError(f"layer {layer} wants pages that were not read ahead")
        self._taken += 1
        self._fill()
        for task in self._filling[number]:
            task.result()
        return self._ring.view(number % self._ring.depth, self._wants[number])

    def close(self) -> None:
        """Waits for the reads that are under way: buffers and pins may be used otherwise then."""
        for tasks in self._filling[max(0, self._taken - 1) :]:
            for task in tasks:
                if not task.cancel():
                    task.exception()
