"""Which implementation computes what. Callers use these functions and no implementation directly."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from atlas_kernels import linear_cpu, linear_torch
from atlas_kernels.cpu.library import Unavailable, library
from atlas_kernels.errors import KernelInputError
from atlas_kernels.reference import PackedWeight

log = logging.getLogger("atlas_kernels")


def quantized_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x [..., K] times the quantized [N, K] matrix transposed, plus bias [N]: [..., N] in x's dtype; see reference.

    Raises KernelInputError for a wrong shape, dtype or device.
    """
    inputs, device = x.shape[-1], x.device
    if inputs != weight.codes.shape[1] or not x.is_floating_point():
        raise KernelInputError(
            f"activations {x.dtype} {tuple(x.shape)} do not fit a weight of {tuple(weight.codes.shape)}"
        )
    if device != weight.codes.device:
        raise KernelInputError(f"activations are on {device}, the weight is on {weight.codes.device}")
    if device.type == "cpu" and not (x.requires_grad and torch.is_grad_enabled()) and compiled():
        few = x.numel() <= linear_cpu.MAX_ROWS * inputs
        compute = linear_cpu.linear if few else linear_cpu.linear_by_panels
        return compute(x, weight, bias, threads=torch.get_num_threads())
    return linear_torch.linear(x, weight, bias)


@functools.cache
def compiled() -> bool:
    """Whether the CPU kernels are there, compiled now if need be; says once why not."""
    try:
        library()
    except Unavailable as error:
        log.warning("CPU kernels: %s. Linear layers run in torch, slower.", error)
        return False
    return True


def check(weight: PackedWeight) -> None:
    """Raises KernelInputError unless the parts of `weight` have the dtypes and shapes of the format."""
    rows, columns = weight.codes.shape
    groups = -(-columns // weight.block_size)
    slots = weight.outlier_index.shape[-1]
    expected = {
        "codes": (weight.codes, (rows, columns), (torch.uint8,)),
        "scales": (weight.scales, (rows, groups), (torch.bfloat16,)),
        "outlier_index": (weight.outlier_index, (rows, slots), (torch.int16, torch.int32)),
        "outlier_value": (weight.outlier_value, (rows, slots), (torch.float16,)),
    }
    for name, (tensor, shape, dtypes) in expected.items():
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            raise KernelInputError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {dtypes[0]} {shape}")
    if weight.mantissa_bits not in (3, 4, 5):
        raise KernelInputError(f"mantissa_bits is {weight.mantissa_bits}; expected 3, 4 or 5")
