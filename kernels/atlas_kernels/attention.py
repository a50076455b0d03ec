"""Attention of one sequence's query rows over its gathered keys and values.

Symbols: T query rows, L context tokens (the last row attends to all of them), H query heads, G KV heads (H a multiple
of G), D head dimension. Row i stands at position p = L - T + i and sees positions (p - window, p].

`reference` is the specification in plain torch; `attend` is what the engine calls: torch's fused kernel where the
model's variant has one, the reference otherwise.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812


def visible(rows: int, length: int, window: int | None, device: torch.device | str = "cpu") -> torch.Tensor:
    """Boolean mask [rows, length]: which positions each query row may see."""
    query = torch.arange(length - rows, length, device=device)[:, None]
    key = torch.arange(length, device=device)[None, :]
    mask = key <= query
    return mask & (key > query - window) if window else mask


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked softmax attention and its log-sum-exp.

    q [H, T, D], k and v [G, L, D] → out [H, T, D], lse [H, T] in float32. `softcap` c replaces a score s by
    c·tanh(s/c) (Gemma 2, arXiv 2408.00118); `sinks` [H] are extra logits that take weight and give nothing (gpt-oss).
    """
    group = q.shape[0] // k.shape[0]
    keys, values = (x.repeat_interleave(group, dim=0).float() for x in (k, v))
    scores = torch.matmul(q.float(), keys.transpose(1, 2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible(q.shape[1], k.shape[1], window, q.device), float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float()[:, None])
    out = torch.matmul(torch.exp(scores - lse[..., None]), values)
    return out.to(q.dtype), lse


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `reference`, without the log-sum-exp: q [H, T, D], k and v [G, L, D] → out [H, T, D]."""
    if softcap or sinks is not None:
        return reference(q, k, v, scale=scale, window=window, softcap=softcap, sinks=sinks)[0]
    rows, length = q.shape[1], k.shape[1]
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
        scale=scale,
        enable_gqa=q.shape[0] != k.shape[0],
    )[0]
