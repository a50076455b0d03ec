"""Keys are part of the disk format: golden values, and independence from everything but the inputs."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys

import pytest
from atlas_tiers.base import KVGroup, PageLayout
from atlas_tiers.keys import PageId, chain, common_tokens, identity_hash, pack, page_key, root_key, unpack

LAYOUT = PageLayout((KVGroup((0, 1), 2, 8),), "float16")


def by_the_book() -> tuple[bytes, bytes, bytes, bytes]:
    """FORMAT.md's formulae, written down a second time."""
    layout = b"v1/64/float16/0,1:2x8"
    identity = hashlib.sha256(b"atlas.identity.v1\0" + struct.pack("<Q", 5) + b"model" + layout).digest()
    root = hashlib.sha256(b"atlas.root.v1\0" + identity + "ann ü".encode()).digest()
    page = hashlib.sha256(b"atlas.page.v1\0" + root + struct.pack("<64I", *range(64))).digest()
    tail = hashlib.sha256(b"atlas.tail.v1\0" + page + struct.pack("<3I", 7, 8, 2**32 - 1)).digest()
    return identity, root, page, tail


def test_keys_follow_the_document() -> None:
    identity, root, page, tail = by_the_book()
    assert identity_hash(b"model", LAYOUT) == identity
    assert root_key(identity, "ann ü") == root
    assert page_key(root, pack(range(64))) == page
    assert page_key(page, pack([7, 8, 2**32 - 1])) == tail


def test_golden_values() -> None:
    identity = identity_hash(b"model", LAYOUT)
    pages = chain(root_key(identity, "ann"), pack(range(130)))
    assert [page.key.hex() for page in pages] == GOLDEN
    assert pages[1].parent == pages[0].key


def test_keys_do_not_depend_on_the_process() -> None:
    code = (
        "from atlas_tiers.keys import *; from atlas_tiers.base import *;"
        "i = identity_hash(b'model', PageLayout((KVGroup((0, 1), 2, 8),), 'float16'));"
        "print(*(p.key.hex() for p in chain(root_key(i, 'ann'), pack(range(130)))))"
    )
    for seed in ("0", "12345"):
        out = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        assert out.stdout.split() == GOLDEN


def test_every_input_changes_the_key() -> None:
    identity = identity_hash(b"model", LAYOUT)
    other_layout = PageLayout(LAYOUT.groups, "bfloat16")
    roots = {
        root_key(identity, "ann"),
        root_key(identity, "bob"),
        root_key(identity_hash(b"modem", LAYOUT), "ann"),
        root_key(identity_hash(b"model", other_layout), "ann"),
    }
    assert len(roots) == 4
    root = root_key(identity, "ann")
    assert page_key(root, pack(range(64))) != page_key(root, pack([*range(63), 99]))
    assert page_key(root, pack([1])) != page_key(page_key(root, pack([1])), pack([1]))


def test_a_page_with_a_wrong_key_is_inconsistent() -> None:
    page = PageId.of(b"p" * 32, pack([1, 2, 3]))
    assert page.consistent
    assert page.is_tail
    assert not PageId(page.key, page.parent, pack([1, 2, 4])).consistent
    assert not PageId(page.key, b"q" * 32, page.packed).consistent


def test_packing() -> None:
    assert pack([1, 2**32 - 1]) == bytes([1, 0, 0, 0, 255, 255, 255, 255])
    assert unpack(pack([5, 6])) == (5, 6)
    with pytest.raises(OverflowError):
        pack([2**32])
    with pytest.raises(OverflowError):
        pack([-1])


@pytest.mark.parametrize(
    ("left", "right", "common"),
    [
        ([], [], 0),
        ([1], [], 0),
        ([1, 2], [1, 2], 2),
        ([1, 2, 3], [1, 2], 2),
        ([1, 2, 3], [1, 9, 3], 1),
        ([256], [0], 0),
    ],
)
def test_common_tokens(left: list[int], right: list[int], common: int) -> None:
    assert common_tokens(pack(left), pack(right)) == common


GOLDEN = [
    "979ab68ab580fbde8842051f36368a8366c1a4990db54db01522959ba057367a",
    "cdaa5d2ed30df13472a4eda408f0a0c81584f07c424e83154a53db3f0efff557",
]
