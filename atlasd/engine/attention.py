"""The one touchpoint with transformers' attention: K/V go to pages, queries attend over block tables.

Two ways in, chosen per architecture:
- "interface": the function registered as "atlas" with AttentionInterface. Tokens of several sessions lie end to end in
  one row; the keyword `step` travels untouched from the model call to the function.
- "cache": architectures that ignore the interface (Falcon, MPT, BLOOM, GPT-J) get a Cache whose layers append to the
  pages and return the gathered K/V; one session per forward pass.

Both record each layer's K/V shape when the step is a `Probe`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from atlas_kernels import attention_cpu, kv
from atlas_kernels.attention import Merged, Variant, attend, partial, seeing
from atlas_kernels.dispatch import compiled
from atlas_tiers.base import BLOCK_TOKENS, KVGroup
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface

from .context import Pages, Reader, Span, key_splits

NAME = "atlas"
FEW_ROWS = 16  # query rows that are attended to where the blocks lie; more are worth gathering K and V for
SMALL_WORK = 1 << 19  # keys times heads times head dimension; less is done by one thread


class Sink(Protocol):
    """Where a forward pass puts K/V and what its queries see."""

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """key, value: [kv_heads, rows, head_dim] of the whole batch."""

    def attend(self, layer: int, query: torch.Tensor, variant: Variant) -> torch.Tensor:
        """query [heads, rows, head_dim] → [rows, heads, head_dim]."""


class Step:
    """A forward pass over `spans`: writes K/V to the device pool's blocks and attends over each span's pages."""

    def __init__(
        self, pages: Pages, spans: list[Span], on_layer: Callable[[], None] = lambda: None, threads: int = 0
    ) -> None:
        """`threads`: most for attention to blocks in place; the pass's matrices may be worth fewer. 0: as for these."""
        self.spans = spans
        self._threads = threads or torch.get_num_threads()
        self._pages = pages.pages
        self._on_layer = on_layer
        self._windows = {layer: group.window for group in pages.layout.groups for layer in group.layers}
        device = spans[0].places[0].blocks.device
        positions = [torch.arange(s.first, s.length, device=device) for s in spans]
        self._lanes = pages.lanes
        self._blocks = [
            torch.cat([s.places[lane].blocks[p // BLOCK_TOKENS] for s, p in zip(spans, positions, strict=True)])
            for lane in range(len(spans[0].places))
        ]  # by lane, int64 [rows]
        self._offset = torch.cat(positions) % BLOCK_TOKENS
        self._reader = Reader(pages, spans)

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._on_layer()
        to = self._pages[layer]
        kv.append(to.values, to.scales, self._blocks[self._lanes[layer]], self._offset, key, value)

    def context(self, layer: int, span: Span, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """All of a span's K and V, [kv_heads, length, head_dim]."""
        parts = [self._reader.gather(layer, span, keys, dtype) for keys in key_splits(span, None)]
        k, v = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return k, v

    def attend(self, layer: int, query: torch.Tensor, variant: Variant) -> torch.Tensor:
        if variant.window != self._windows[layer]:
            raise ValueError(
                f"layer {layer} has window {variant.window}, had {self._windows[layer]} when it was probed"
            )
        heads, rows, dim = query.shape
        out = query.new_empty(rows, heads, dim)
        for span in self.spans:
            mine = query[:, span.start : span.stop]
            out[span.start : span.stop] = self._attend(layer, span, mine, variant).transpose(0, 1)
        return out

    def _attend(self, layer: int, span: Span, query: torch.Tensor, variant: Variant) -> torch.Tensor:
        """[heads, rows, head_dim]. In splits, so that the result is the same wherever the pages lie; on an accelerator
        with all pages at hand the fused kernel does it at once, and the two agree up to rounding."""
        parts = key_splits(span, variant.window)
        if query.device.type == "cpu" and query.shape[1] <= FEW_ROWS and compiled():
            return self._attend_in_place(layer, span, query, parts, variant)
        if query.device.type != "cpu" and span.resident:
            keys = range(parts[0].start, span.length)
            return attend(query, *self._reader.gather(layer, span, keys, query.dtype), variant)
        merged = Merged(query.shape[0], span.positions, query.shape[2], query.device)
        for keys in parts:
            rows = seeing(span.positions, keys, variant)
            mine = query[:, rows.start - span.first : rows.stop - span.first]
            k, v = self._reader.gather(layer, span, keys, query.dtype)
            merged.add(rows, *partial(mine, k, v, rows, keys, variant))
        return merged.result(variant)

    def _attend_in_place(
        self, layer: int, span: Span, query: torch.Tensor, parts: list[range], variant: Variant
    ) -> torch.Tensor:
        """As _attend, by the compiled kernel, which reads blocks where they lie: splits one after the other at once, as
        far as they are at hand together."""
        to = self._pages[layer]
        sinks = None if variant.sinks is None else variant.sinks.float().contiguous()
        work = (span.length - parts[0].start) * query.shape[0] * query.shape[2]
        threads = self._threads if work > SMALL_WORK else 1
        call = attention_cpu.Call(variant.scale, variant.window or 0, variant.softcap or 0.0, sinks, threads)

        def pages(keys: range) -> attention_cpu.Pages:
            addresses = self._reader.addresses(layer, span, keys)
            kv_heads, dim = to.values.shape[2], to.values.shape[4]
            return attention_cpu.Pages(addresses, to.values.dtype, kv_heads, dim, first=keys.start)

        chunks = self._reader.chunks(layer, span, parts)
        if len(chunks) == 1:
            return attention_cpu.attend(query, pages(chunks[0]), span.positions, call)[0].transpose(0, 1)
        found = [attention_cpu.partials(query, pages(keys), span.positions, call) for keys in chunks]
        out, lse = (torch.cat(each) for each in zip(*found, strict=True))
        return attention_cpu.merge(out, lse, sinks)[0].transpose(0, 1)

    def close(self) -> None:
        """Ends what is being read ahead."""
        self._reader.close()


class Probe:
    """Records what each layer offers, computing nothing: [kv_heads, head_dim] and the window by layer."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int]] = {}
        self.windows: dict[int, int | None] = {}
        self.problems: list[str] = []

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        if layer in self.shapes:
            self.problems.append(f"layer {layer} writes K/V twice")
        if key.shape != value.shape:
            self.problems.append(f"layer {layer}: K {tuple(key.shape)} and V {tuple(value.shape)} differ")
        self.shapes[layer] = (key.shape[0], key.shape[2])

    def attend(self, layer: int, query: torch.Tensor, variant: Variant) -> torch.Tensor:
        self.windows[layer] = variant.window
        return torch.zeros_like(query).transpose(0, 1)

    def groups(self) -> tuple[KVGroup, ...]:
        """Layers of one shape and window share a slab; those that attend to everything come first."""
        layers: dict[tuple[int, int, int], list[int]] = {}
        for layer, shape in sorted(self.shapes.items()):
            layers.setdefault((self.windows.get(layer) or 0, *shape), []).append(layer)
        return tuple(KVGroup(tuple(layers[kind]), *kind[1:], kind[0] or None) for kind in sorted(layers))


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
    return step.attend(layer, query[0], Variant(scale, sliding_window, softcap, s_aux))[None], None


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
        k, v = self._step.context(self._layer, self._step.spans[0], key_states.dtype)
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
