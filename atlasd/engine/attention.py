"""The one touchpoint with transformers' attention: K/V go to pages, queries attend over block tables.

Two ways in, chosen per architecture:
- "interface": the function registered as "atlas" with AttentionInterface. Tokens of several sessions lie end to end in
  one row; the keyword `step` travels untouched from the model call to the function.
- "cache": architectures that ignore the interface (Falcon, MPT, BLOOM, GPT-J) get a Cache whose layers append to the
  pages and return the gathered K/V; one session per forward pass.

Both record each layer's K/V shape when the step is a `Probe`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from atlas_kernels.attention import attend
from atlas_tiers.base import BLOCK_TOKENS, KVGroup
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface

NAME = "atlas"


@dataclasses.dataclass(frozen=True)
class Span:
    """One session's part of a step: rows [start, stop) of the batch are positions [first, first + stop - start)."""

    start: int
    stop: int
    first: int
    blocks: torch.Tensor  # int64 block ids covering [0, length)

    @property
    def length(self) -> int:
        """Context tokens once this step's are appended."""
        return self.first + self.stop - self.start


class Sink(Protocol):
    """Where a forward pass puts K/V and what its queries see."""

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """key, value: [kv_heads, rows, head_dim] of the whole batch."""

    def attend(self, layer: int, query: torch.Tensor, **variant: Any) -> torch.Tensor:
        """query [heads, rows, head_dim] → [rows, heads, head_dim]."""


class Step:
    """A forward pass over `spans`: writes K/V to the slabs and attends over each span's pages."""

    def __init__(
        self,
        slabs: list[torch.Tensor],
        groups: tuple[KVGroup, ...],
        spans: list[Span],
        on_layer: Callable[[], None] = lambda: None,
    ) -> None:
        self.spans = spans
        self._on_layer = on_layer
        self._slots = {
            layer: (slab, i) for slab, g in zip(slabs, groups, strict=True) for i, layer in enumerate(g.layers)
        }
        device = slabs[0].device
        positions = [torch.arange(s.first, s.length, device=device) for s in spans]
        self._block = torch.cat([s.blocks[p // BLOCK_TOKENS] for s, p in zip(spans, positions, strict=True)])
        self._offset = torch.cat(positions) % BLOCK_TOKENS

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._on_layer()
        slab, index = self._slots[layer]
        pages = slab[:, index]  # [blocks, 2, kv_heads, BLOCK_TOKENS, head_dim]
        pages[self._block, 0, :, self._offset] = key.transpose(0, 1)
        pages[self._block, 1, :, self._offset] = value.transpose(0, 1)

    def gather(self, layer: int, span: Span, since: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [kv_heads, span.length - since, head_dim]; `since` is a multiple of BLOCK_TOKENS."""
        slab, index = self._slots[layer]
        blocks = span.blocks[since // BLOCK_TOKENS : (span.length + BLOCK_TOKENS - 1) // BLOCK_TOKENS]
        pages = slab[:, index].permute(1, 2, 0, 3, 4).index_select(2, blocks)
        kv = pages.flatten(2, 3)[:, :, : span.length - since]
        return kv[0], kv[1]

    def attend(self, layer: int, query: torch.Tensor, **variant: Any) -> torch.Tensor:
        heads, rows, dim = query.shape
        out = query.new_empty(rows, heads, dim)
        for span in self.spans:
            window = variant.get("window")
            first_seen = max(0, span.first - window + 1) if window else 0
            k, v = self.gather(layer, span, first_seen // BLOCK_TOKENS * BLOCK_TOKENS)
            out[span.start : span.stop] = attend(query[:, span.start : span.stop], k, v, **variant).transpose(0, 1)
        return out


class Probe:
    """Records what each layer offers, computing nothing: [kv_heads, head_dim] by layer."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int]] = {}
        self.problems: list[str] = []

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        if layer in self.shapes:
            self.problems.append(f"layer {layer} writes K/V twice")
        if key.shape != value.shape:
            self.problems.append(f"layer {layer}: K {tuple(key.shape)} and V {tuple(value.shape)} differ")
        self.shapes[layer] = (key.shape[0], key.shape[2])

    def attend(self, layer: int, query: torch.Tensor, **variant: Any) -> torch.Tensor:
        return torch.zeros_like(query).transpose(0, 1)

    def groups(self) -> tuple[KVGroup, ...]:
        """Layers of one shape share a slab."""
        kinds = sorted(set(self.shapes.values()))
        return tuple(
            KVGroup(tuple(sorted(n for n, shape in self.shapes.items() if shape == kind)), *kind) for kind in kinds
        )


def atlas_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    step: Sink,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [1, H, T, D], key and value [1, G, T, D] → [1, T, H, D]."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    step.append(layer, key[0], value[0])
    out = step.attend(layer, query[0], scale=scale, window=sliding_window, softcap=softcap, sinks=s_aux)
    return out[None], None


def register() -> None:
    """Registers the function and its (absent) mask: both are needed, or the mask is None silently."""
    AttentionInterface.register(NAME, atlas_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


class _PagedLayer(CacheLayerMixin):
    """One layer of a Cache over pages. As DynamicLayer's, `get_seq_length` counts new tokens once they are appended."""

    is_sliding = False

    def __init__(self, layer: int, step: Sink, past: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layer, self._step, self._length = layer, step, past
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to set up: the pages are there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._step.append(self._layer, key_states[0], value_states[0])
        self._length += key_states.shape[2]
        if not isinstance(self._step, Step):
            return key_states, value_states
        k, v = self._step.gather(self._layer, self._step.spans[0])
        return k[None], v[None]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return -1


def paged_cache(layers: int, step: Sink, past: int) -> Cache:
    """A Cache for one session's span: `past` tokens are in the pages already."""
    return Cache(layers=[_PagedLayer(layer, step, past) for layer in range(layers)])
