"""K and V going into pages and coming out of them, in the pages' own type or as int8 with a scale for each vector.

Symbols: N pages, G KV heads, B tokens a page, D head dimension, T rows. `values` [N, 2, G, B, D], K before V;
`scales` [N, 2, G, B] in float16 for int8 values, else None.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127
SMALLEST_SCALE = 2.0**-24  # of float16, subnormal: smaller ones are 0, and so are their vectors


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] → int8 codes [..., D] and float16 scales [...]: x ≈ code · scale. Symmetric; the scale is the largest
    magnitude / 127 as float16 holds it. A vector that float16 scales can't reach (above 8.3e6) saturates."""
    wide = x.float()
    scales = (wide.abs().amax(dim=-1) / LARGEST).clamp(max=torch.finfo(torch.float16).max).to(torch.float16)
    steps = wide / scales.float().clamp(min=SMALLEST_SCALE)[..., None]
    return steps.round().clamp_(-LARGEST, LARGEST).to(torch.int8), scales


def append(values: Tensor, scales: Tensor | None, page: Tensor, offset: Tensor, key: Tensor, value: Tensor) -> None:
    """Writes row t of `key` and `value` [G, T, D] to token `offset`[t] of page `page`[t] (int64 [T])."""
    for which, x in enumerate((key.transpose(0, 1), value.transpose(0, 1))):
        if scales is None:
            values[page, which, :, offset] = x.to(values.dtype)
        else:
            values[page, which, :, offset], scales[page, which, :, offset] = quantize(x)


def gather(values: Tensor, scales: Tensor | None, pages: Tensor, dtype: torch.dtype) -> Tensor:
    """K and V of the pages `pages` (int64 [n]) side by side: [2, G, n, B, D] in `dtype`."""
    picked = values.permute(1, 2, 0, 3, 4).index_select(2, pages)
    if scales is None:
        return picked.to(dtype)
    return picked.to(dtype) * scales.permute(1, 2, 0, 3).index_select(2, pages).to(dtype)[..., None]
