"""Pages as tensors: each layer's K and V of many pages, as views of raw bytes."""

from __future__ import annotations

import dataclasses

import torch

from .base import BLOCK_TOKENS, KVGroup, PageLayout

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


@dataclasses.dataclass(frozen=True)
class LayerPages:
    """One layer of N pages. `values` [N, 2, kv_heads, BLOCK_TOKENS, head_dim], K before V; `scales` float16
    [N, 2, kv_heads, BLOCK_TOKENS], one for each token's head, when the values are int8."""

    values: torch.Tensor
    scales: torch.Tensor | None = None


def layer_pages(layout: PageLayout, group: KVGroup, raw: torch.Tensor) -> LayerPages:
    """Views of uint8 `raw` [N, layout.layer_bytes(group)], whose rows may lie apart but not overlap."""
    shape = (2, group.kv_heads, BLOCK_TOKENS, group.head_dim)
    size = 2 * group.kv_heads * BLOCK_TOKENS * group.head_dim * layout.item_bytes
    values = raw[:, :size].view(_DTYPES[layout.dtype]).unflatten(1, shape)
    if layout.dtype != "int8":
        return LayerPages(values)
    return LayerPages(values, raw[:, size:].view(torch.float16).unflatten(1, shape[:3]))


def group_layers(layout: PageLayout, group: KVGroup, raw: torch.Tensor) -> dict[int, LayerPages]:
    """By layer number, views of uint8 `raw` [N, bytes of the group's row of a block]."""
    size = layout.layer_bytes(group)
    return {
        layer: layer_pages(layout, group, raw[:, i * size : (i + 1) * size]) for i, layer in enumerate(group.layers)
    }


def payload_layers(layout: PageLayout, raw: torch.Tensor) -> dict[int, LayerPages]:
    """By layer number, views of uint8 `raw` [N, page_bytes]: payloads one after the other."""
    found: dict[int, LayerPages] = {}
    start = 0
    for group, size in zip(layout.groups, layout.group_bytes, strict=True):
        found |= group_layers(layout, group, raw[:, start : start + size])
        start += size
    return found


def slab_tensor(slab: memoryview, row_bytes: int) -> torch.Tensor:
    """A writable buffer of rows as uint8 [N, row_bytes], the same memory."""
    return torch.frombuffer(slab, dtype=torch.uint8).view(-1, row_bytes)
