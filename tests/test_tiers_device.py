"""Blocks and payloads: the bytes of a page are the groups' rows in order, on both copy paths."""

from __future__ import annotations

import pytest
import torch
from atlas_tiers.base import KVGroup, PageLayout
from atlas_tiers.device import DeviceMemory
from atlas_tiers.memory import aligned_buffer
from atlas_tiers.tensors import payload_layers, slab_tensor

LAYOUT = PageLayout((KVGroup((0, 2), 2, 4), KVGroup((1,), 1, 8)), "bfloat16")


@pytest.fixture(params=["memmove", "torch"])
def memory(request: pytest.FixtureRequest) -> DeviceMemory:
    """With the path that a CPU takes, and the one that any other device takes."""
    made = DeviceMemory(LAYOUT, 3, "cpu")
    made._on_cpu = request.param == "memmove"
    return made


def test_shapes_and_zero_at_first(memory: DeviceMemory) -> None:
    shapes = {layer: tuple(pages.values.shape) for layer, pages in memory.layers.items()}
    assert shapes == {0: (3, 2, 2, 64, 4), 2: (3, 2, 2, 64, 4), 1: (3, 2, 1, 64, 8)}
    assert all(p.values.dtype == torch.bfloat16 and not p.values.any() for p in memory.layers.values())


def fill(memory: DeviceMemory) -> None:
    for pages in memory.layers.values():
        pages.values.copy_(torch.randn(pages.values.shape))


def test_a_payload_is_the_rows_in_order(memory: DeviceMemory) -> None:
    fill(memory)
    payload = aligned_buffer(LAYOUT.page_bytes)
    memory.read(1, payload)
    layers = [layer for group in LAYOUT.groups for layer in group.layers]
    rows = b"".join(memory.layers[layer].values[1].contiguous().view(torch.int16).numpy().tobytes() for layer in layers)
    assert bytes(payload) == rows
    memory.write(2, payload)
    assert all(torch.equal(p.values[1], p.values[2]) for p in memory.layers.values())
    assert not any(torch.equal(p.values[0], p.values[1]) for p in memory.layers.values())


def test_a_payload_read_as_layers_is_the_block(memory: DeviceMemory) -> None:
    fill(memory)
    payload = aligned_buffer(LAYOUT.page_bytes)
    memory.read(1, payload)
    found = payload_layers(LAYOUT, slab_tensor(payload, LAYOUT.page_bytes))
    assert all(torch.equal(found[n].values[0], memory.layers[n].values[1]) for n in (0, 1, 2))


def test_int8_pages_have_scales_beside_their_codes() -> None:
    layout = PageLayout(LAYOUT.groups, "int8")
    memory = DeviceMemory(layout, 3, "cpu")
    pages = memory.layers[2]
    assert pages.scales is not None
    assert (tuple(pages.values.shape), tuple(pages.scales.shape)) == ((3, 2, 2, 64, 4), (3, 2, 2, 64))
    assert layout.page_bytes == 2 * (2 * 2 * 64 * (4 + 2)) + 2 * 1 * 64 * (8 + 2)
    pages.values[1], pages.scales[1] = 7, 0.5
    memory.duplicate(1, 0)
    assert bool((pages.values[0] == 7).all())
    assert bool((pages.scales[0] == 0.5).all())
    assert not memory.layers[0].values.any()
    assert not pages.values[2].any()


def test_duplicate_and_erase(memory: DeviceMemory) -> None:
    fill(memory)
    memory.duplicate(0, 2)
    assert all(torch.equal(p.values[0], p.values[2]) for p in memory.layers.values())
    memory.erase(0)
    assert all(not p.values[0].any() and p.values[1].any() and p.values[2].any() for p in memory.layers.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_round_trip() -> None:
    memory = DeviceMemory(LAYOUT, 2, "cuda")
    payload, back = aligned_buffer(LAYOUT.page_bytes), aligned_buffer(LAYOUT.page_bytes)
    payload[:] = bytes(range(256)) * (LAYOUT.page_bytes // 256)
    memory.write(1, payload)
    memory.read(1, back)
    assert back == payload
