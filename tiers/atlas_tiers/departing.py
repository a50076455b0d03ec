"""Pages between leaving the index in memory and their slot being free: first the index commit, then the last reader."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .index import Entry
from .segment import Place
from .space import Space


class Departing:
    """Not thread-safe: the disk tier calls it under `_state`."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._unrecorded: list[Entry[Place]] = []  # gone from memory, their records not yet deleted
        self._lingering: set[Place] = set()  # records deleted, but a reader is still in the slot

    def __len__(self) -> int:
        return len(self._unrecorded) + len(self._lingering)

    @property
    def waiting(self) -> list[Entry[Place]]:
        """Entries whose records the next commit is to delete."""
        return list(self._unrecorded)

    @property
    def places(self) -> list[Place]:
        """The slots of all of them."""
        return [*(entry.place for entry in self._unrecorded), *self._lingering]

    def add(self, entries: Iterable[Entry[Place]]) -> None:
        """Takes entries that have just left the index."""
        self._unrecorded += entries

    def take_back(self, entries: Sequence[Entry[Place]]) -> None:
        """They are not going after all."""
        back = {id(entry) for entry in entries}
        self._unrecorded = [entry for entry in self._unrecorded if id(entry) not in back]

    def committed(self, deleted: Sequence[Entry[Place]]) -> None:
        """The records of `deleted`, the longest waiting, are deleted durably: slots without a reader are free."""
        self._unrecorded = self._unrecorded[len(deleted) :]
        for entry in deleted:
            if entry.pins:
                self._lingering.add(entry.place)
            else:
                self._space.give_back(entry.place)

    def vacate(self, entry: Entry[Place]) -> None:
        """The last reader of one of these is done; before the commit that changes nothing yet."""
        if entry.place in self._lingering:
            self._lingering.remove(entry.place)
            self._space.give_back(entry.place)

    def read_in(self, segment: int) -> bool:
        """Whether a reader is still in a slot of this segment whose record is deleted."""
        return any(place.segment == segment for place in self._lingering)
