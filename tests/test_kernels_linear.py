"""The quantized linear layer by the compiled kernels against the definition in float64, on every instruction set."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from atlas_kernels import dispatch, linear_torch
from atlas_kernels.cpu.library import Level
from atlas_kernels.dispatch import quantized_linear
from atlas_kernels.errors import KernelInputError
from atlas_kernels.linear_cpu import MAX_ROWS, linear, linear_by_panels
from atlas_kernels.reference import PackedWeight, dequantize
from kernel_support import Guarded, compiled, each_level, poisoned
from torch import Tensor

from atlasd.quant.formats import FORMATS, Recipe
from atlasd.quant.quantize import quantize

pytestmark = compiled
SHAPES = [(96, 384), (384, 1024), (33, 200), (5, 64), (1, 1), (7, 63), (66, 65), (130, 2049), (2, 33_000)]
shapes = pytest.mark.parametrize(("outputs", "inputs"), SHAPES)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned():
        yield


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    memory = Guarded()
    yield memory
    memory.close()


def packed(outputs: int, inputs: int, name: str = "e2m5", block: int = 128, z: float = 3.0) -> PackedWeight:
    make = torch.Generator().manual_seed(outputs * inputs)
    return quantize(torch.randn(outputs, inputs, generator=make) * 0.02, Recipe(name, block, z)).weight


def close(y: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None, step: float = 0.0) -> None:
    """Within two float32 steps of the sum of magnitudes, plus `step` of the result, to which that is rounded."""
    w, b = dequantize(weight).double(), torch.zeros(y.shape[-1]).double() if bias is None else bias.double()
    expected = torch.nn.functional.linear(x.double(), w, b)
    magnitude = torch.nn.functional.linear(x.double().abs(), w.abs(), b.abs())
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    assert bool(((y.double() - expected).abs() <= 2.0**-22 * magnitude + step * expected.abs()).all())


@each_level
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 13, 16])
@shapes
def test_it_computes_the_definition(outputs: int, inputs: int, rows: int, level: Level) -> None:
    weight = packed(outputs, inputs)
    x, bias = torch.randn(rows, inputs), torch.randn(outputs)
    close(linear(x, weight, bias, threads=2, level=level), x, weight, bias)
    close(linear(x, weight, None, level=level), x, weight, None)


@each_level
@pytest.mark.parametrize("name", FORMATS)
def test_every_code_of_every_format(name: str, level: Level) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    weight = packed(2, 256, name, z=0)
    weight = dataclasses.replace(weight, codes=codes, scales=torch.ones(2, 2, dtype=torch.bfloat16))
    values = linear(torch.eye(256)[:, :], weight, None, level=level)
    assert torch.equal(values[:, 0], dequantize(weight)[0])


@each_level
@pytest.mark.parametrize("block", [1, 16, 32, 48, 64, 100, 192, 1000])
@pytest.mark.parametrize("z", [0.0, 1.0, 3.0])
def test_block_sizes_and_numbers_of_outliers(block: int, z: float, level: Level) -> None:
    weight, x = packed(50, 330, block=block, z=z), torch.randn(3, 330)
    close(linear(x, weight, None, threads=2, level=level), x, weight, None)


@each_level
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_activations_of_16_bits(dtype: torch.dtype, level: Level) -> None:
    weight, x = packed(96, 384), torch.randn(2, 3, 384).to(dtype)
    bias = torch.randn(96).to(dtype)
    close(linear(x, weight, bias, level=level), x, weight, bias, 2**-8 if dtype == torch.bfloat16 else 2**-11)


@each_level
@pytest.mark.parametrize("block", [128, 100])
@shapes
def test_a_row_does_not_depend_on_the_batch_nor_on_threads(outputs: int, inputs: int, block: int, level: Level) -> None:
    weight, x, bias = packed(outputs, inputs, block=block), torch.randn(19, inputs), torch.randn(outputs)
    alone = torch.cat([linear(x[m : m + 1], weight, bias, level=level) for m in range(19)])
    for rows, threads in zip((2, 3, 4, 5, 7, 8, 9, 16, 19), (1, 2, 3) * 3, strict=True):
        assert torch.equal(linear(x[:rows], weight, bias, threads=threads, level=level), alone[:rows])


@each_level
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("block", [128, 64, 33])
@pytest.mark.parametrize(("outputs", "inputs"), [*SHAPES, (1100, 1024)])
def test_panels_give_what_plain_torch_gives(outputs: int, inputs: int, block: int, name: str, level: Level) -> None:
    weight, bias = packed(outputs, inputs, name, block, z=2.0), torch.randn(outputs)
    x = torch.randn(2, 17, inputs)
    for threads in (1, 2):
        y = linear_by_panels(x, weight, bias, threads=threads, level=level)
        assert torch.equal(y, linear_torch.linear(x, weight, bias))
    half = x.bfloat16()
    assert torch.equal(linear_by_panels(half, weight, None, level=level), linear_torch.linear(half, weight, None))


@each_level
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
def test_no_scale_of_the_weights_costs_accuracy(scale: float, level: Level) -> None:
    make = torch.Generator().manual_seed(7)
    weight = quantize((torch.randn(16, 256, generator=make).double() * scale).float(), Recipe("e3m4")).weight
    x = torch.randn(4, 256)
    close(linear(x, weight, None, level=level), x, weight, None)


@each_level
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("block", [128, 33])
@pytest.mark.parametrize(("outputs", "inputs"), [(5, 64), (7, 63), (1, 1), (9, 300)])
def test_nothing_is_read_beside_a_buffer(
    outputs: int, inputs: int, block: int, at_end: bool, level: Level, guarded: Guarded
) -> None:
    plain = packed(outputs, inputs, block=block, z=1.5)
    names = ("codes", "scales", "outlier_index", "outlier_value")
    weight = dataclasses.replace(plain, **{n: guarded.copy(getattr(plain, n), at_end=at_end) for n in names})
    for rows in (1, 3, 8):
        x, bias = torch.randn(rows, inputs), torch.randn(outputs)
        y = linear(guarded.copy(x, at_end=at_end), weight, guarded.copy(bias, at_end=at_end), level=level)
        close(y, x, plain, bias)
        assert torch.equal(linear_by_panels(x, weight, bias, level=level), linear_torch.linear(x, plain, bias))


@each_level
def test_an_index_out_of_range_reads_no_other_memory(level: Level, guarded: Guarded) -> None:
    weight = packed(4, 64, z=1.0)
    wrong = torch.full_like(weight.outlier_index, -1)
    wrong[::2] = 32767
    y = linear(guarded.copy(torch.ones(2, 64), at_end=True), dataclasses.replace(weight, outlier_index=wrong), None)
    assert bool(y.isfinite().all())
    panels = linear_by_panels(torch.ones(2, 64), dataclasses.replace(weight, outlier_index=wrong), None, level=level)
    assert bool(panels.isfinite().all())


def test_no_rows_and_leading_shapes() -> None:
    weight = packed(20, 40)
    assert linear(torch.zeros(0, 40), weight, None).shape == (0, 20)
    x = torch.randn(2, 1, 3, 40)
    assert linear(x, weight, None).shape == (2, 1, 3, 20)
    assert torch.equal(linear(x, weight, None).view(6, 20), linear(x.view(6, 40), weight, None))
    assert torch.equal(linear(x.transpose(0, 2), weight, None), linear(x, weight, None).transpose(0, 2))


def test_a_weight_in_pieces_is_refused() -> None:
    weight = packed(20, 64)
    with pytest.raises(KernelInputError, match="not contiguous"):
        linear(torch.zeros(1, 32), dataclasses.replace(weight, codes=weight.codes[:, :32]), None)


def test_callers_get_it_for_few_rows_and_panels_for_many() -> None:
    weight, bias = packed(96, 384), torch.randn(96)
    x = torch.randn(MAX_ROWS + 1, 384)
    assert dispatch.compiled()
    few = quantized_linear(x[:MAX_ROWS], weight, bias)
    assert torch.equal(few, linear(x[:MAX_ROWS], weight, bias))
    assert torch.equal(quantized_linear(x, weight, bias), linear_torch.linear(x, weight, bias))
    taught = x[:1].clone().requires_grad_()
    quantized_linear(taught, weight, bias).sum().backward()
    assert taught.grad is not None
