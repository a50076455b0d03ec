"""Blocks and payloads: the bytes of a page are the groups' rows in order, on both copy paths."""

from __future__ import annotations

import pytest
import torch
from atlas_tiers.base import KVGroup, PageLayout
from atlas_tiers.device import DeviceMemory
from atlas_tiers.memory import aligned_buffer

LAYOUT = PageLayout((KVGroup((0, 2), 2, 4), KVGroup((1,), 1, 8)), "bfloat16")


@pytest.fixture(params=["memmove", "torch"])
def memory(request: pytest.FixtureRequest) -> DeviceMemory:
    """With the path that a CPU takes, and the one that any other device takes."""
    made = DeviceMemory(LAYOUT, 3, "cpu")
    made._on_cpu = request.param == "memmove"
    return made


def test_shapes_and_zero_at_first(memory: DeviceMemory) -> None:
    assert [tuple(slab.shape) for slab in memory.slabs] == [(3, 2, 2, 2, 64, 4), (3, 1, 2, 1, 64, 8)]
    assert all(slab.dtype == torch.bfloat16 and not slab.any() for slab in memory.slabs)


def test_a_payload_is_the_rows_in_order(memory: DeviceMemory) -> None:
    for slab in memory.slabs:
        slab.copy_(torch.randn(slab.shape))
    payload = aligned_buffer(LAYOUT.page_bytes)
    memory.read(1, payload)
    rows = b"".join(slab[1].contiguous().view(torch.int16).numpy().tobytes() for slab in memory.slabs)
    assert bytes(payload) == rows
    memory.write(2, payload)
    assert all(torch.equal(slab[1], slab[2]) for slab in memory.slabs)
    assert not any(torch.equal(slab[0], slab[1]) for slab in memory.slabs)


def test_duplicate_and_erase(memory: DeviceMemory) -> None:
    for slab in memory.slabs:
        slab.copy_(torch.randn(slab.shape))
    memory.duplicate(0, 2)
    assert all(torch.equal(slab[0], slab[2]) for slab in memory.slabs)
    memory.erase(0)
    assert all(not slab[0].any() and slab[1].any() and slab[2].any() for slab in memory.slabs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_round_trip() -> None:
    memory = DeviceMemory(LAYOUT, 2, "cuda")
    payload, back = aligned_buffer(LAYOUT.page_bytes), aligned_buffer(LAYOUT.page_bytes)
    payload[:] = bytes(range(256)) * (LAYOUT.page_bytes // 256)
    memory.write(1, payload)
    memory.read(1, back)
    assert back == payload
