"""Versions of the directory on disk, and what a slot's header has room for."""

from __future__ import annotations

import struct
import tarfile
from pathlib import Path

import pytest
import xxhash
from atlas_tiers.base import KVGroup, PageLayout
from atlas_tiers.counters import Counters
from atlas_tiers.disk import DiskTier
from atlas_tiers.errors import FormatNewer, TooManyParts
from atlas_tiers.keys import PageId, pack
from tiers_support import LAYOUT, disk_config, opened, some_tokens, store, turn

OWN = b"i" * 32
OLD = Path(__file__).parent / "data" / "kv-format-1.tar.xz"  # written by the last version that wrote format 1
OLD_PAGES = [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]


def page(number: int) -> PageId:
    """Pages of the old directory: number 10 is a tail."""
    return PageId.of(b"r" * 32, pack([number, *range(63 if number < 10 else 19)]))


def content(number: int) -> bytes:
    return bytes([number + 1]) * LAYOUT.page_bytes


def tier(path: Path, layout: PageLayout = LAYOUT) -> DiskTier:
    return DiskTier(layout, OWN, disk_config(path), Counters())


def unpack_old(path: Path) -> Path:
    with tarfile.open(OLD) as archive:
        archive.extractall(path, filter="data")
    return path / "kv"


def test_the_old_directory_is_what_it_claims(tmp_path: Path) -> None:
    """By the table of format 1, without the code under test: the slots hold the pages that are to be ignored."""
    found = {}
    for segment in unpack_old(tmp_path).glob("seg-*.kv"):
        data = segment.read_bytes()
        assert struct.unpack_from("<8sI", data) == (b"ATLSKVS1", 1)
        for start in range(4096, len(data), 4096 + LAYOUT.page_bytes):
            if struct.unpack_from("<8sI", data, start) == (b"ATLSKVP1", 1):
                payload = data[start + 4096 : start + 4096 + LAYOUT.page_bytes]
                assert xxhash.xxh3_128_digest(payload) == data[start + 160 : start + 176]
                found[data[start + 96 : start + 128]] = payload
    assert {page(number).key: content(number) for number in OLD_PAGES}.items() <= found.items()


def test_an_older_format_is_dropped_in_plain_words(tmp_path: Path) -> None:
    kv = unpack_old(tmp_path)
    first = tier(kv)
    into = memoryview(bytearray(LAYOUT.page_bytes))
    assert [first.get(page(number).key, into) for number in range(11)] == [None] * 11
    assert first._counters.warnings() == [
        f"{kv}: pages of format 1 dropped (2 segment files): this version reads and writes format 2"
    ]
    assert first._counters.counts()["disk_pages_damaged"] == 0
    assert not list(kv.glob("seg-*.kv")), "their room is free again"
    for number in OLD_PAGES:
        assert first.put(page(number).header, memoryview(content(number)))
    first.check()
    first.close()
    second = tier(kv)
    assert second._counters.warnings() == []
    for number in OLD_PAGES:
        assert second.get(page(number).key, into) == page(number).header
        assert into == content(number)
    second.close()


@pytest.mark.parametrize("missing", ["index", "segments"])
def test_half_of_an_older_directory(tmp_path: Path, missing: str) -> None:
    kv = unpack_old(tmp_path)
    for path in list((kv / "index").iterdir()) if missing == "index" else list(kv.glob("seg-*.kv")):
        path.unlink()
    opened_tier = tier(kv)
    assert opened_tier.stats().sealed == 0
    assert len(opened_tier._counters.warnings()) == 1
    assert opened_tier.put(page(1).header, memoryview(content(1)))
    opened_tier.check()
    opened_tier.close()


def test_an_older_segment_among_new_ones(tmp_path: Path) -> None:
    kv = unpack_old(tmp_path)
    old = (kv / "seg-00000001.kv").read_bytes()
    first = tier(kv)
    for number in OLD_PAGES:
        first.put(page(number).header, memoryview(content(number)))
    first.close()
    (kv / "seg-00000009.kv").write_bytes(old)
    second = tier(kv)
    into = memoryview(bytearray(LAYOUT.page_bytes))
    assert [second.get(page(number).key, into) is not None for number in OLD_PAGES] == [True] * 10
    assert not (kv / "seg-00000009.kv").exists()
    second.close()


def raise_version(kv: Path, version: int) -> None:
    """Makes a directory of a later format of one of this: its segments' headers say so, checksum and all."""
    for segment in kv.glob("seg-*.kv"):
        with segment.open("r+b") as file:
            head = bytearray(file.read(4096))
            struct.pack_into("<I", head, 8, version)
            struct.pack_into("<Q", head, 4088, xxhash.xxh3_64_intdigest(head[:4088]))
            file.seek(0)
            file.write(head)


def test_a_later_format_is_left_alone(tmp_path: Path) -> None:
    """Neither read nor removed; the store says so and runs without the disk."""
    kv = tmp_path / "kv"
    tokens = some_tokens(200)
    first = store(kv)
    assert turn(first, tokens).durable
    first.close()
    raise_version(kv, 3)
    before = {path: path.read_bytes() for path in kv.rglob("*") if path.is_file()}
    with pytest.raises(FormatNewer, match="format 3"):
        tier(kv)
    second = store(kv)
    (warning,) = second.warnings
    assert "its pages are of format 3, this version knows 2: they are left alone" in warning
    sequence = opened(second, [*tokens, 1])
    assert sequence.length == 0
    sequence.release()
    second.close()
    assert {path: path.read_bytes() for path in kv.rglob("*") if path.is_file()} == before
    raise_version(kv, 2)
    third = store(kv)
    assert opened(third, [*tokens, 1]).length == len(tokens), "the later version finds its pages again"
    third.close()


def wide(parts: int) -> PageLayout:
    return PageLayout((KVGroup(tuple(range(parts)), 1, 1),), "float16")


def test_a_header_has_room_for_many_layers(tmp_path: Path) -> None:
    most = (4096 - 160 - 256 - 8) // 8
    assert most > 400
    with pytest.raises(TooManyParts, match=f"{most + 1} parts, the disk format holds {most}"):
        tier(tmp_path / "no", wide(most + 1))
    assert not (tmp_path / "no").exists()
    layout = wide(most)
    opened_tier = tier(tmp_path / "kv", layout)
    whole = memoryview(bytes(range(256)) * most)
    assert opened_tier.put(page(1).header, whole)
    entry = opened_tier.pin(page(1))
    assert entry is not None
    into = memoryview(bytearray(256))
    opened_tier.load_parts(entry, most - 1, most, into)
    assert into == whole[-256:]
    opened_tier.unpin(entry)
    assert entry.digests == b"", "digests are kept while a page is pinned"
    opened_tier.close()


def test_a_groups_bytes_are_whole_parts() -> None:
    class Odd(PageLayout):
        @property
        def group_bytes(self) -> tuple[int, ...]:
            return (1000,)

    with pytest.raises(ValueError, match="1000 bytes of 3 layers"):
        _ = Odd((KVGroup((0, 1, 2), 1, 1),), "float16").parts
