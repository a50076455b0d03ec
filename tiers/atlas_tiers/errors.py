"""What the tiers raise beyond OutOfBlocks (in base, as it is part of the contract).

TierError
├── StoreLocked   another engine uses the directory
├── FormatNewer   a later version wrote the directory; also an OSError, as the store then runs without the disk
├── TooManyParts  a layout with more layers than a slot's header has room for
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


class FormatNewer(TierError, OSError):
    """The segments were written by a later version, which may want them back. Nothing was changed."""

    def __init__(self, version: int, known: int) -> None:
        super().__init__(
            f"its pages are of format {version}, this version knows {known}: they are left alone. Use the later "
            "version, choose another --kv-disk-path, or delete the directory's seg-*.kv files"
        )


class TooManyParts(TierError):
    """The layout's pages can't be kept on disk."""

    def __init__(self, parts: int, limit: int) -> None:
        super().__init__(f"a page of this model has {parts} parts, the disk format holds {limit}")


class IndexDamaged(TierError):
    """The index is missing pieces, of another version, or not an index at all."""


class PageDamaged(TierError):
    """A page's bytes are not what was stored. It has been dropped and is not tried again."""
