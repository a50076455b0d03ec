"""Attention of one sequence's query rows over its keys and values, whole or in splits.

Symbols: T query rows, L context tokens (the last row attends to all of them), H query heads, G KV heads (H a multiple
of G), D head dimension. Row i stands at position p = L - T + i and sees positions (p - window, p].

`reference` is the specification in plain torch. What the engine calls works in *splits*: runs of SPLIT_TOKENS keys at
fixed positions. Each gives a partial result with the log-sum-exp of its scores, and `Merged` joins them in ascending
order (FlashAttention's online softmax, arXiv 2205.14135, section 3.1), so the result depends on positions and
values alone, never on where a page lay.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional as F  # noqa: N812

SPLIT_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a model's attention layer does to scores. `softcap` c replaces a score s by c·tanh(s/c) (Gemma 2, arXiv
    2408.00118); `sinks` [H] are extra logits that take weight and give nothing (gpt-oss); `window`: see above."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def first_seen(self, position: int) -> int:
        """The first position that a row at `position` sees."""
        return max(0, position - self.window + 1) if self.window else 0


def visible(rows: int, length: int, window: int | None, device: torch.device | str = "cpu") -> torch.Tensor:
    """Boolean mask [rows, length]: which positions each query row may see."""
    return _mask(range(length - rows, length), range(length), window, device)


def _mask(rows: range, keys: range, window: int | None, device: torch.device | str) -> torch.Tensor:
    query = torch.arange(rows.start, rows.stop, device=device)[:, None]
    key = torch.arange(keys.start, keys.stop, device=device)[None, :]
    mask = key <= query
    return mask & (key > query - window) if window else mask


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked softmax attention and its log-sum-exp, in float32.

    q [H, T, D], k and v [G, L, D] → out [H, T, D] in q's dtype, lse [H, T] in float32. `mask` [T, L]: which keys each
    row sees; None: those of the last T positions. Every row must see a key.
    """
    group = q.shape[0] // k.shape[0]
    keys, values = (x.repeat_interleave(group, dim=0).float() for x in (k, v))
    scores = torch.matmul(q.float(), keys.transpose(1, 2)) * variant.scale
    if variant.softcap:
        scores = variant.softcap * torch.tanh(scores / variant.softcap)
    if mask is None:
        mask = visible(q.shape[1], k.shape[1], variant.window, q.device)
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    if variant.sinks is not None:
        lse = torch.logaddexp(lse, variant.sinks.float()[:, None])
    out = torch.matmul(torch.exp(scores - lse[..., None]), values)
    return out.to(q.dtype), lse


def splits(rows: range, variant: Variant) -> list[range]:
    """The runs of keys that query rows at positions `rows` attend to, ascending: multiples of SPLIT_TOKENS apart, all
    but the last one whole. Keys that no row sees may be at the first one's beginning."""
    first = variant.first_seen(rows.start) // SPLIT_TOKENS * SPLIT_TOKENS
    return [range(start, min(start + SPLIT_TOKENS, rows.stop)) for start in range(first, rows.stop, SPLIT_TOKENS)]


def seeing(rows: range, keys: range, variant: Variant) -> range:
    """Those of the positions `rows` whose queries see a key of `keys`; one run."""
    stop = keys.stop - 1 + variant.window if variant.window else rows.stop
    return range(max(rows.start, keys.start), min(rows.stop, stop))


def partial(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: range, keys: range, variant: Variant
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the queries at positions `rows` to the keys at positions `keys` alone, sinks left out.

    q [H, len(rows), D], k and v [G, len(keys), D] → out [H, len(rows), D] and lse [H, len(rows)], float32. Every row
    must see a key (`seeing`).
    """
    unmasked = keys.stop - 1 <= rows.start and variant.first_seen(rows.stop - 1) <= keys.start
    if q.device.type != "cpu" or variant.softcap:
        bare = dataclasses.replace(variant, sinks=None, window=None)
        mask = None if unmasked else _mask(rows, keys, variant.window, q.device)
        full = torch.ones(len(rows), len(keys), dtype=torch.bool, device=q.device) if mask is None else mask
        out, lse = reference(q, k, v, bare, full)
        return out.float(), lse
    causal = not unmasked and rows == keys and variant.first_seen(rows.stop - 1) <= keys.start
    bias = None
    if not unmasked and not causal:
        hidden = ~_mask(rows, keys, variant.window, q.device)
        bias = q.new_zeros(len(rows), len(keys)).masked_fill_(hidden, float("-inf"))[None, None]
    # The operator under scaled_dot_product_attention on a CPU; that function keeps its log-sum-exp to itself.
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[None], k[None], v[None], 0.0, causal, attn_mask=bias, scale=variant.scale
    )
    return out[0].float(), lse[0].float()


class Merged:
    """Joins partial results of T query rows; add() in ascending order of keys."""

    def __init__(self, heads: int, rows: range, dim: int, device: torch.device) -> None:
        self._rows = rows
        self._out = torch.zeros(heads, len(rows), dim, dtype=torch.float32, device=device)
        self._lse = torch.full((heads, len(rows)), float("-inf"), dtype=torch.float32, device=device)

    def add(self, rows: range, out: torch.Tensor, lse: torch.Tensor) -> None:
        """`out` [H, len(rows), D], `lse` [H, len(rows)] for the queries at positions `rows`."""
        part = slice(rows.start - self._rows.start, rows.stop - self._rows.start)
        before = self._lse[:, part]
        total = torch.logaddexp(before, lse)
        self._out[:, part].mul_(torch.exp(before - total)[..., None]).add_(out * torch.exp(lse - total)[..., None])
        self._lse[:, part] = total

    def result(self, variant: Variant) -> torch.Tensor:
        """out [H, T, D] in float32, with the sinks' weight taken away."""
        if variant.sinks is None:
            return self._out
        total = torch.logaddexp(self._lse, variant.sinks.float()[:, None])
        return self._out * torch.exp(self._lse - total)[..., None]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant) -> torch.Tensor:
    """As `reference` without the log-sum-exp, over keys that are all at hand: q [H, T, D], k and v [G, L, D] →
    out [H, T, D]. torch's fused kernel where the variant has one."""
    if variant.softcap or variant.sinks is not None:
        return reference(q, k, v, variant)[0]
    rows, length, window = q.shape[1], k.shape[1], variant.window
    if window and length > window and rows == 1:
        k, v = k[:, length - window :], v[:, length - window :]
    plain_causal = rows == length and not (window and length > window)
    mask = None if rows == 1 or plain_causal else visible(rows, length, window, q.device)
    return F.scaled_dot_product_attention(
        q[None],
        k[None],
        v[None],
        attn_mask=mask,
        is_causal=plain_causal and rows > 1,
        scale=variant.scale,
        enable_gqa=q.shape[0] != k.shape[0],
    )[0]
