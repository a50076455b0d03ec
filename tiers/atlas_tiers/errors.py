"""What the tiers raise beyond OutOfBlocks (in base, as it is part of the contract).

TierError
├── StoreLocked   another engine uses the directory
├── IndexDamaged  the index file can't be trusted; the store then rebuilds it from the slots
└── PageDamaged   a page failed its checks and was dropped
"""

from __future__ import annotations

from pathlib import Path


class TierError(Exception):
    """Base of the typed errors of this package."""


class StoreLocked(TierError):
    """Another process holds the KV directory."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} is in use by another engine; stop it (`atlasctl down`) or choose another --kv-disk-path"
        )
        self.path = path


class IndexDamaged(TierError):
    """The index is missing pieces, of another version, or not an index at all."""


class PageDamaged(TierError):
    """A page's bytes are not what was stored. It has been dropped and is not tried again."""
