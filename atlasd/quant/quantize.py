"""One weight matrix to the 8-bit float: outliers, block scales, codes; in row chunks, so that memory stays bounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from atlas_kernels.reference import PackedWeight
from torch import Tensor
from torch.nn import functional

from atlasd.quant.formats import FloatFormat, NonFiniteWeight, Recipe

CHUNK_WEIGHTS = 1 << 18  # weights worked on at a time: temporaries of 1 MiB each, which stay in cache
SCALE_MIN = torch.finfo(torch.float32).tiny  # a block below this scale is all zeros
HALF_MIN, HALF_MAX = 2.0**-14, 65504.0  # between them float16 has its full precision


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantized matrix [N, K] and how far it is from its source."""

    weight: PackedWeight
    format: FloatFormat
    squared_error: float  # sum over all weights


@torch.no_grad()
def quantize(source: Tensor, recipe: Recipe, name: str = "weight") -> Quantized:
    """Quantizes a float matrix [N, K] on its own device, by `recipe`.

    Raises NonFiniteWeight, naming `name`, when it holds NaN or infinity.
    """
    rows, columns = source.shape
    slots = recipe.outlier_slots(columns)
    codes = source.new_empty(rows, columns, dtype=torch.uint8)
    scales = source.new_empty(rows, recipe.blocks(columns), dtype=torch.bfloat16)
    index = source.new_zeros(rows, slots, dtype=index_dtype(columns))
    value = source.new_zeros(rows, slots, dtype=torch.float16)
    bounds = _outlier_bounds(source, recipe.z_threshold, name)
    errors = dict.fromkeys(recipe.candidates, 0.0)
    likely = recipe.candidates[0]  # its codes are kept as they come; when another one wins, they are made again
    for part, weights in _chunks(source):
        inliers, index[part], value[part] = _take_outliers(weights, slots, *bounds)
        for fmt in errors:
            coded = _encode_blocks(inliers, recipe.block_size, fmt)
            errors[fmt] += coded.squared_error
            if fmt is likely:
                codes[part], scales[part] = coded.codes, coded.scales
    best = min(errors, key=lambda fmt: errors[fmt])
    if best is not likely:
        for part, weights in _chunks(source):
            coded = _encode_blocks(_take_outliers(weights, slots, *bounds)[0], recipe.block_size, best)
            codes[part], scales[part] = coded.codes, coded.scales
    packed = PackedWeight(codes, scales, index, value, best.mantissa_bits, recipe.block_size)
    return Quantized(packed, best, errors[best])


def index_dtype(in_features: int) -> torch.dtype:
    """Dtype of outlier_index: int16 where every column fits."""
    return torch.int16 if in_features <= 1 << 15 else torch.int32


def _chunks(source: Tensor) -> Iterator[tuple[slice, Tensor]]:
    step = max(1, CHUNK_WEIGHTS // max(1, source.shape[1]))
    for start in range(0, source.shape[0], step):
        part = slice(start, start + step)
        yield part, source[part].to(torch.float32)


def _outlier_bounds(source: Tensor, z: float, name: str) -> tuple[float, float]:
    """Weights outside [low, high] are outliers: mean ± z · standard deviation over the whole matrix."""
    total = squares = 0.0
    for _, rows in _chunks(source):
        if not bool(torch.isfinite(rows).all()):
            raise NonFiniteWeight(
                f"{name} holds NaN or infinite weights", "the checkpoint is damaged: download it again, or use another"
            )
        total += float(rows.sum(dtype=torch.float64))
        squares += float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2
    count = max(1, source.numel())
    mean = total / count
    deviation = max(0.0, squares / count - mean * mean) ** 0.5
    return (mean - z * deviation, mean + z * deviation) if z else (-float("inf"), float("inf"))


class _Coded(NamedTuple):
    codes: Tensor  # uint8 [rows, K]
    scales: Tensor  # bfloat16 [rows, G]
    squared_error: float


def _encode_blocks(weights: Tensor, block: int, fmt: FloatFormat) -> _Coded:
    """Rows in blocks along K. A block's largest weight lands on (nearly) the format's largest value."""
    columns = weights.shape[1]
    blocks = functional.pad(weights, (0, -columns % block)).reshape(weights.shape[0], -1, block)
    exact = blocks.abs().amax(dim=2) / fmt.max_value
    scales = exact.to(torch.bfloat16).masked_fill_(exact < SCALE_MIN, 0.0)
    wide = scales.to(torch.float32).unsqueeze(2)
    codes, error = encode(blocks / wide.masked_fill(wide == 0, 1.0), fmt)
    squared = float(torch.linalg.vector_norm(error.mul_(wide), dtype=torch.float64)) ** 2
    return _Coded(codes.flatten(1)[:, :columns], scales, squared)


def _take_outliers(weights: Tensor, slots: int, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """Takes the `slots` largest outliers out of each row: the rows with zeros there, columns, float16 values."""
    magnitude = weights.abs()
    eligible = ((weights < low) | (weights > high)) & (magnitude >= HALF_MIN) & (magnitude <= HALF_MAX)
    top, columns = magnitude.mul_(eligible).topk(slots, dim=1)
    unused = top == 0
    taken = weights.gather(1, columns).masked_fill_(unused, 0.0)
    columns.masked_fill_(unused, 0)
    return weights.scatter_add(1, columns, -taken), columns, taken.to(torch.float16)


def encode(values: Tensor, fmt: FloatFormat) -> tuple[Tensor, Tensor]:
    """The uint8 codes nearest to float32 `values` (ties to even; beyond the largest value, that one), and their
    magnitudes' errors. Any shape.

    With e the value's exponent, at least 1 - bias, the code is (e + bias - 1) · 2^M + round(|v| · 2^(M - e)): a
    mantissa that rounds up to 2^(M+1) carries into the exponent by itself.
    """
    bias, mantissa = fmt.bias, fmt.mantissa_bits
    magnitude = values.abs()
    inside = magnitude.clamp(max=fmt.max_value)
    exponent = (inside.view(torch.int32) >> 23).clamp_(min=128 - bias)  # with float32's own bias of 127
    factor = (254 + mantissa - exponent).bitwise_left_shift_(23).view(torch.float32)
    steps = inside.mul_(factor).round_()
    codes = exponent.sub_(128 - bias).bitwise_left_shift_(mantissa).add_(steps.to(torch.int32)).clamp_(max=fmt.max_code)
    negative = (values.view(torch.int32) >> 24).bitwise_and_(0x80)
    return codes.bitwise_or_(negative).to(torch.uint8), steps.div_(factor).sub_(magnitude)
