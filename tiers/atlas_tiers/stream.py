"""Reading ahead: layer slices of pages that are not in the device pool, brought through a ring of buffers.

A forward pass knows at its start which slices its attention will want, in which order. While it computes with one
buffer, threads fill the next ones. A slice is verified before it is handed out.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol

import torch

from .base import KVGroup, PageLayout
from .counters import Counters
from .held import Held
from .memory import aligned_buffer
from .tensors import LayerPages, layer_pages

RING_BYTES = 64 << 20
MOST_BUFFERS = 8
TASK_BYTES = 1 << 20  # read by one thread, page after page: less is not worth waking one for


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
        self._views: dict[tuple[int, KVGroup, int], LayerPages] = {}
        self._readers = readers
        self._threads = ThreadPoolExecutor(readers, "kv-stream")

    def begin(self, wants: Sequence[Want]) -> Pass:
        """Starts reading what a pass will want, in order."""
        while len(self._buffers) < self._count:
            memory = aligned_buffer(self._bytes)
            self._buffers.append(_Buffer(memory, torch.frombuffer(memory, dtype=torch.uint8)))
        return Pass(self, wants)

    def tasks(self, want: Want) -> list[range]:
        """A Want's pages in the portions that one thread reads."""
        size = self._layout.layer_bytes(self._groups[want.layer])
        count, step = len(want.pages), max(1, TASK_BYTES // size)
        return [range(start, min(start + step, count)) for start in range(0, count, step)]

    def read(self, buffer: int, want: Want, task: range) -> None:
        """Fills a portion of a buffer that nobody uses. Any thread. Raises PageDamaged."""
        part, size = self._parts[want.layer], self._layout.layer_bytes(self._groups[want.layer])
        for n in task:
            page = want.pages[n]
            page.tier.load_parts(page.entry, part, part + 1, self._buffers[buffer].memory[n * size : (n + 1) * size])
            self._counters.add("streamed_host_bytes" if page.in_ram else "streamed_disk_bytes", size)

    def start(self, work: Callable[[], None]) -> list[Future[None]]:
        """Runs `work` on every reading thread."""
        return [self._threads.submit(work) for _ in range(self._readers)]

    def view(self, buffer: int, want: Want) -> LayerPages:
        """A filled buffer as pages."""
        group, count = self._groups[want.layer], len(want.pages)
        found = self._views.get((buffer, group, count))
        if found is None:
            size = self._layout.layer_bytes(group)
            raw = self._buffers[buffer].tensor[: count * size].view(count, size)
            found = self._views[buffer, group, count] = layer_pages(self._layout, group, raw)
        return found

    @property
    def depth(self) -> int:
        """Buffers: one is used while the others are filled."""
        return self._count

    def close(self) -> None:
        """Stops the threads."""
        self._threads.shutdown(cancel_futures=True)


class Pass:
    """See Slices. The threads take portions in order, as far as buffers are free."""

    def __init__(self, ring: Ring, wants: Sequence[Want]) -> None:
        self._ring, self._wants = ring, wants
        portions = [ring.tasks(want) for want in wants]
        self._left = [len(tasks) for tasks in portions]  # portions not yet read, by want
        self._queue = deque((number, task) for number, tasks in enumerate(portions) for task in tasks)
        self._errors: dict[int, Exception] = {}  # by want
        lock = threading.Lock()
        self._room, self._filled = threading.Condition(lock), threading.Condition(lock)
        self._taken = 0
        self._stopped = False
        self._working = ring.start(self._work)

    def _fillable(self) -> bool:
        """The buffer of the last slices that were handed out is still in use; all others may be filled."""
        return self._queue[0][0] < max(0, self._taken - 1) + self._ring.depth

    def _work(self) -> None:
        while True:
            with self._room:
                self._room.wait_for(lambda: self._stopped or not self._queue or self._fillable())
                if self._stopped or not self._queue:
                    return
                number, task = self._queue.popleft()
            error = None
            try:
                self._ring.read(number % self._ring.depth, self._wants[number], task)
            except Exception as failure:
                error = failure  # for the thread that takes the slices
            with self._filled:
                if error is not None:
                    self._errors[number] = error
                self._left[number] -= 1
                if not self._left[number]:
                    self._filled.notify()

    def take(self, layer: int) -> LayerPages:
        """See Slices."""
        number = self._taken
        if number >= len(self._wants) or self._wants[number].layer != layer:
            raise ValueError(f"layer {layer} wants pages that were not read ahead")
        with self._filled:
            self._taken += 1
            self._room.notify_all()
            self._filled.wait_for(lambda: not self._left[number])
            if number in self._errors:
                raise self._errors[number]
        return self._ring.view(number % self._ring.depth, self._wants[number])

    def close(self) -> None:
        """See Slices."""
        with self._room:
            self._stopped = True
            self._room.notify_all()
        wait(self._working)
