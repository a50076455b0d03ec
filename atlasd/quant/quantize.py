"""One weight matrix to the 8-bit float: outliers, block scales, codes; in row chunks, so that memory stays bounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from atlas_kernels.reference import PackedWeight
from torch import Tensor
from torch.nn import functional

from atlasd.quant.formats import FloatFormat, NonFiniteWeight, Recipe

CHUNK_WEIGHTS = 1 << 18  # weights worked on at a time: temporaries of 1 MiB each, which stay in cache
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

    Memory beside the source: a byte a weight for each format tried. Raises NonFiniteWeight, naming `name`, when it holds NaN or infinity.
    """
    bounds = _outlier_bounds(source, recipe.z_threshold, name)
    rows, columns = source.shape
    slots = recipe.outlier_slots(columns)
    index = source.new_zeros(rows, slots, dtype=index_dtype(columns))
    value = source.new_zeros(rows, slots, dtype=torch.float16)
    attempts = [_Attempt(source, recipe, fmt) for fmt in recipe.candidates]
    for part, weights in _chunks(source):
        if slots:
            weights, index[part], value[part] = _take_outliers(weights, slots, *bounds)
        for attempt in attempts:
            attempt.add(part, weights)
    best = min(attempts, key=lambda attempt: attempt.squared_error)
    packed = PackedWeight(best.codes, best.scales, index, value, best.format.mantissa_bits, recipe.block_size)
    return Quantized(packed, best.format, best.squared_error)


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


class _Attempt:
    """One matrix in one format."""

    def __init__(self, source: Tensor, recipe: Recipe, fmt: FloatFormat) -> None:
        rows, columns = source.shape
        self.format, self.block = fmt, recipe.block_size
        self.codes = source.new_empty(rows, columns, dtype=torch.uint8)
        self.scales = source.new_empty(rows, recipe.blocks(columns), dtype=torch.bfloat16)
        self.squared_error = 0.0

    def add(self, part: slice, weights: Tensor) -> None:
        """Encodes the rows `part`. A block's largest weight lands on (nearly) the largest value."""
        columns = weights.shape[1]
        padded = functional.pad(weights, (0, -columns % self.block))
        blocks = padded.reshape(weights.shape[0], -1, self.block)
        scales = _round_up(blocks.abs().amax(dim=2) / self.format.max_value)
        wide = scales.to(torch.float32).unsqueeze(2)
        codes, error = encode(blocks / wide.masked_fill(wide == 0, 1.0), self.format)
        self.squared_error += float(torch.linalg.vector_norm(error.mul_(wide), dtype=torch.float64)) ** 2
        self.codes[part], self.scales[part] = codes.flatten(1)[:, :columns], scales


def _take_outliers(weights: Tensor, slots: int, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """Takes the `slots` largest outliers out of each row: the rows with zeros there, columns, float16 values."""
    magnitude = weights.abs()
    eligible = ((weights < low) | (weights > high)) & (magnitude >= HALF_MIN) & (magnitude <= HALF_MAX)
    top, columns = magnitude.mul_(eligible).topk(slots, dim=1)
    unused = top == 0
    taken = weights.gather(1, columns).masked_fill_(unused, 0.0)
    columns.masked_fill_(unused, 0)
    return weights.scatter_add(1, columns, -taken), columns, taken.to(torch.float16)


def _round_up(scales: Tensor) -> Tensor:
    """The least bfloat16 not below each float32 scale, so that no weight is clipped; zero below the normal range."""
    nearest = scales.to(torch.bfloat16)
    above = (nearest.view(torch.int16) + 1).view(torch.bfloat16)
    chosen = torch.where(nearest.to(torch.float32) < scales, above, nearest)
    return chosen.masked_fill(scales < torch.finfo(torch.float32).tiny, 0.0)


def encode(values: Tensor, fmt: FloatFormat) -> tuple[Tensor, Tensor]:
    """The uint8 codes nearest to float32 `values` (ties to even; beyond the largest value, that one), and the error of
    their magnitudes. Any shape.

    With e the value's exponent, at least 1 - bias, the code is (e + bias - 1) · 2^M + round(|v| · 2^(M - e)): a
    mantissa that rounds up to 2^(M+1) carries into the exponent by itself.
    """
    bias, mantissa = fmt.bias, fmt.mantissa_bits
    magnitude = values.abs().clamp_(max=fmt.max_value)
    exponent = (magnitude.view(torch.int32) >> 23).clamp_(min=128 - bias)  # with float32's own bias of 127
    factor = (254 + mantissa - exponent).bitwise_left_shift_(23).view(torch.float32)
    steps = (magnitude * factor).round_()
    codes = exponent.sub_(128 - bias).bitwise_left_shift_(mantissa).add_(steps.to(torch.int32)).clamp_(max=fmt.max_code)
    negative = (values.view(torch.int32) >> 24).bitwise_and_(0x80)
    return codes.bitwise_or_(negative).to(torch.uint8), steps.div_(factor).sub_(magnitude)
