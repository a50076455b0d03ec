"""A disk tier in a test's directory, with pages whose bytes follow from a number."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

from atlas_tiers.base import PageLayout
from atlas_tiers.counters import Counters
from atlas_tiers.disk import DiskTier
from atlas_tiers.keys import PageId, pack
from tiers_support import LAYOUT, disk_config

OWN, OTHER = b"i" * 32, b"j" * 32
ROOT = b"r" * 32
SLOT = 4096 + -(-LAYOUT.page_bytes // 4096) * 4096


def page(number: int, count: int = 64) -> PageId:
    return PageId.of(ROOT, pack([number, *range(count - 1)]))


def payload(number: int, size: int = LAYOUT.page_bytes) -> memoryview:
    return memoryview(bytearray(random.Random(number).randbytes(size)))


@contextlib.contextmanager
def tier(path: Path, identity: bytes = OWN, layout: PageLayout = LAYOUT, **options: int) -> Iterator[DiskTier]:
    opened = DiskTier(layout, identity, disk_config(path, **options), Counters())
    try:
        yield opened
        opened.check()
    finally:
        opened.close()


def counts(opened: DiskTier) -> dict[str, int]:
    return opened._counters.counts()


def fill(opened: DiskTier, numbers: range) -> None:
    for number in numbers:
        assert opened.put(page(number).header, payload(number))


def survivors(opened: DiskTier, numbers: range) -> set[int]:
    """The pages that can be read; each must be right."""
    into = memoryview(bytearray(LAYOUT.page_bytes))
    found = set()
    for number in numbers:
        header = opened.get(page(number).key, into)
        if header is not None:
            assert header == page(number).header
            assert into == payload(number), f"page {number} is wrong"
            found.add(number)
    return found
