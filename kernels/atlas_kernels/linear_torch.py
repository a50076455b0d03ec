"""The quantized linear layer in plain torch, on every device: panels of rows are decoded and multiplied in cache."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from atlas_kernels.reference import PackedWeight, exponent_bias

PANEL_WEIGHTS = (
    1 << 19
)  # 2 MiB in float32. Smaller ones pay for calls, larger ones leave the cache (README: measurements)
PANEL_WEIGHTS_DEVICE = 1 << 24  # an accelerator wants few launches


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """As reference.linear. On a CPU it computes in float32; elsewhere in x's dtype, to which the weights are rounded.

    A panel's values do not depend on M. Memory: one panel beside the inputs and outputs.
    """
    compute = torch.float32 if x.device.type == "cpu" else x.dtype
    rows = x.reshape(-1, x.shape[-1]).to(compute)
    bias = None if bias is None else bias.to(compute)
    step = _panel_rows(weight)
    if step >= weight.codes.shape[0]:
        product = functional.linear(rows, _panel(weight, slice(None), compute), bias)
    else:
        product = _by_panels(rows, weight, bias, step)
    return product.to(x.dtype).view(*x.shape[:-1], -1)


def _by_panels(rows: Tensor, weight: PackedWeight, bias: Tensor | None, step: int) -> Tensor:
    outputs = weight.codes.shape[0]
    product = rows.new_empty(rows.shape[0], outputs)
    for start in range(0, outputs, step):
        part = slice(start, start + step)  # [start, start + step), cut off at `outputs`
        product[:, part] = functional.linear(
            rows, _panel(weight, part, rows.dtype), None if bias is None else bias[part]
        )
    return product


def _panel_rows(weight: PackedWeight) -> int:
    budget = PANEL_WEIGHTS if weight.codes.device.type == "cpu" else PANEL_WEIGHTS_DEVICE
    return max(1, budget // max(1, weight.codes.shape[1]))


def _panel(weight: PackedWeight, part: slice, dtype: torch.dtype) -> Tensor:
    """Rows `part` of the matrix. With the sign extended to 16 bits, one shift and one mask place all fields."""
    mantissa = weight.mantissa_bits
    bits = weight.codes[part].view(torch.int8).to(torch.int16)
    bits.bitwise_left_shift_(10 - mantissa).bitwise_and_((0x7F << (10 - mantissa)) - 0x8000)
    panel = bits.view(torch.float16).to(torch.float32)
    _scale(panel, weight.scales[part].to(torch.float32) * 2.0 ** (15 - exponent_bias(mantissa)), weight.block_size)
    if weight.outlier_index.shape[1]:
        panel.scatter_add_(1, weight.outlier_index[part].long(), weight.outlier_value[part].to(torch.float32))
    return panel.to(dtype)


def _scale(panel: Tensor, scales: Tensor, block: int) -> None:
    """Multiplies each block of columns by its scale, in place; the last block may be ragged."""
    whole = panel.shape[1] // block
    if whole * block == panel.shape[1]:
        panel.view(panel.shape[0], whole, block).mul_(scales.unsqueeze(-1))
        return
    if whole:
        panel[:, : whole * block].view(-1, whole, block).mul_(scales[:, :whole].unsqueeze(-1))
    panel[:, whole * block :].mul_(scales[:, whole:])
