"""Pages of a running sequence that are not in the device pool: pinned in a lower tier, read where they lie."""

from __future__ import annotations

import dataclasses
from typing import Any

from .catalog import Catalog
from .index import Entry


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Held:
    """One page, pinned in `tier` until let_go()."""

    tier: Catalog[Any]
    entry: Entry[Any]

    @property
    def in_ram(self) -> bool:
        """Whether the page lies in the host tier: `entry.place` is then its number in the slab."""
        return self.tier.name == "host"

    def let_go(self) -> None:
        """Undoes the pin. Once."""
        self.tier.unpin(self.entry)
