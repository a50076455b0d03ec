"""Keys of pages: chained SHA-256 over token ids. Pure.

    identity  = H("atlas.identity.v1", len(fingerprint) as u64, fingerprint, layout.describe())
    root      = H("atlas.root.v1", identity, owner as UTF-8)
    page key  = H("atlas.page.v1", parent, 64 token ids as little-endian u32)
    tail key  = H("atlas.tail.v1", parent, 1..63 token ids)

H is SHA-256 over the concatenation; every label ends with a NUL and all other parts but the last have a fixed or a
stated length, so two different inputs never give the same bytes. `parent` is the key of the page before, or the root.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import sys
from array import array
from collections.abc import Sequence

from .base import BLOCK_TOKENS, PageHeader, PageLayout

KEY_BYTES = 32
TOKEN_BYTES = 4
PACKED_BYTES = BLOCK_TOKENS * TOKEN_BYTES


def pack(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32. Raises OverflowError for an id outside [0, 2**32)."""
    ids = array("I", tokens)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


def unpack(packed: bytes) -> tuple[int, ...]:
    """The inverse of pack()."""
    return struct.unpack(f"<{len(packed) // TOKEN_BYTES}I", packed)


def identity_hash(fingerprint: bytes, layout: PageLayout) -> bytes:
    """32 bytes that differ whenever the model, its settings or the page layout differ."""
    size = struct.pack("<Q", len(fingerprint))
    return hashlib.sha256(b"atlas.identity.v1\0" + size + fingerprint + layout.describe().encode()).digest()


def layout_hash(layout: PageLayout) -> bytes:
    """32 bytes that name how a page's bytes are laid out."""
    return hashlib.sha256(b"atlas.layout.v1\0" + layout.describe().encode()).digest()


def root_key(identity: bytes, owner: str) -> bytes:
    """The parent of an owner's first pages: chains of two owners share no key."""
    return hashlib.sha256(b"atlas.root.v1\0" + identity + owner.encode("utf-8", "surrogateescape")).digest()


def page_key(parent: bytes, packed: bytes) -> bytes:
    """Key of the page that holds `packed` (1 to 64 ids) after `parent`. A part-filled page's is of the tail domain."""
    label = b"atlas.page.v1\0" if len(packed) == PACKED_BYTES else b"atlas.tail.v1\0"
    return hashlib.sha256(label + parent + packed).digest()


@dataclasses.dataclass(frozen=True, slots=True)
class PageId:
    """A PageHeader with its tokens packed. Two are equal only if key, parent and every token are. `depth`: pages before
    it in the chain, as far as known; eviction alone looks at it."""

    key: bytes
    parent: bytes
    packed: bytes
    depth: int = dataclasses.field(default=0, compare=False)

    @classmethod
    def of(cls, parent: bytes, packed: bytes, depth: int = 0) -> PageId:
        """The page of `packed` after `parent`, which `depth` pages end with."""
        return cls(page_key(parent, packed), parent, packed, depth)

    @classmethod
    def from_header(cls, header: PageHeader) -> PageId:
        """Takes a header as it is; `consistent` says whether its key belongs to its tokens."""
        return cls(header.key, header.parent, pack(header.tokens))

    @property
    def header(self) -> PageHeader:
        """The contract's form."""
        return PageHeader(self.key, self.parent, unpack(self.packed))

    @property
    def count(self) -> int:
        """Tokens in the page."""
        return len(self.packed) // TOKEN_BYTES

    @property
    def is_tail(self) -> bool:
        """Whether the page is part-filled."""
        return len(self.packed) < PACKED_BYTES

    @property
    def consistent(self) -> bool:
        """Whether the key is the one these tokens give after this parent."""
        return self.key == page_key(self.parent, self.packed)


def chain(root: bytes, packed: bytes) -> list[PageId]:
    """The full pages of `packed` in order; a part-filled rest is left out."""
    pages: list[PageId] = []
    parent = root
    for start in range(0, len(packed) - PACKED_BYTES + 1, PACKED_BYTES):
        pages.append(PageId.of(parent, packed[start : start + PACKED_BYTES], len(pages)))
        parent = pages[-1].key
    return pages


def common_tokens(left: bytes, right: bytes) -> int:
    """Length in tokens of the longest common prefix of two packed sequences."""
    low, high = 0, min(len(left), len(right)) // TOKEN_BYTES
    while low < high:  # the first `low` tokens are equal, the first `high` + 1 are not or do not exist
        middle = (low + high + 1) // 2
        if left[: middle * TOKEN_BYTES] == right[: middle * TOKEN_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low
