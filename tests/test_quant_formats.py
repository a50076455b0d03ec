"""The 8-bit floats, the quantization of one matrix, and the linear layer, against references written here."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from atlas_kernels import linear_torch
from atlas_kernels.dispatch import quantized_linear
from atlas_kernels.errors import KernelInputError
from atlas_kernels.reference import decode, dequantize
from atlas_kernels.reference import linear as reference_linear
from torch import Tensor

from atlasd.quant.formats import E4M3, FORMATS, BadRecipe, FloatFormat, NonFiniteWeight, Recipe
from atlasd.quant.linear import QuantizedLinear
from atlasd.quant.quantize import encode, quantize

ALL_CODES = torch.arange(256, dtype=torch.uint8)
formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())


def value_of(code: int, exponent_bits: int) -> Fraction:
    """A code's value by the definition of a binary float, in exact arithmetic."""
    mantissa_bits = 7 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    exponent, mantissa = divmod(code & 0x7F, 2**mantissa_bits)
    fraction = Fraction(mantissa, 2**mantissa_bits)
    magnitude = (
        fraction * Fraction(2) ** (1 - bias) if exponent == 0 else (1 + fraction) * Fraction(2) ** (exponent - bias)
    )
    return -magnitude if code & 0x80 else magnitude


def nearest_code(value: float, fmt: FloatFormat) -> int:
    """The nearest code by trying all, ties to the even one."""
    target = abs(Fraction(value))
    codes = range(fmt.max_code + 1)
    best = min(codes, key=lambda code: (abs(value_of(code, fmt.exponent_bits) - target), code & 1))
    return best | (0x80 if math.copysign(1, value) < 0 else 0)


@formats
def test_every_code_decodes_to_its_definition(fmt: FloatFormat) -> None:
    expected = [float(value_of(code, fmt.exponent_bits)) for code in range(256)]
    assert decode(ALL_CODES, fmt.mantissa_bits).tolist() == expected
    assert fmt.max_value == expected[fmt.max_code]


def test_e4m3_is_the_hardware_format() -> None:
    finite = ALL_CODES[(ALL_CODES & 0x7F) != 0x7F]
    assert torch.equal(decode(finite, 3), finite.view(torch.float8_e4m3fn).to(torch.float32))


def test_e4m3_rounds_like_the_hardware_format() -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * 40
    codes, _ = encode(values, E4M3)
    assert torch.equal(codes, values.to(torch.float8_e4m3fn).view(torch.uint8))


@formats
def test_encoding_takes_the_nearest_code_and_the_even_one_on_ties(fmt: FloatFormat) -> None:
    levels = [float(value_of(code, fmt.exponent_bits)) for code in range(fmt.max_code + 1)]
    middles = [(low + high) / 2 for low, high in itertools.pairwise(levels)]
    noise = torch.randn(100, generator=torch.Generator().manual_seed(2)).tolist()
    values = levels + middles + [-middle for middle in middles] + noise + [0.0, 1e-30, 1e-42, 1e9, -1e9]
    codes, error = encode(torch.tensor(values), fmt)
    assert codes.tolist() == [nearest_code(value, fmt) for value in values]
    assert torch.equal(error, decode(codes, fmt.mantissa_bits).abs() - torch.tensor(values).abs())


def test_e4m3_never_produces_its_nan() -> None:
    weights = torch.randn(64, 256, generator=torch.Generator().manual_seed(3)) * torch.logspace(-20, 20, 64)[:, None]
    codes = quantize(weights, Recipe("e4m3", z_threshold=0)).weight.codes
    assert int((codes & 0x7F).max()) == 0x7E


@pytest.mark.parametrize("columns", [1, 17, 128, 130, 384])
@pytest.mark.parametrize("z", [0.0, 3.0])
@formats
def test_relative_error_is_within_half_a_step(fmt: FloatFormat, columns: int, z: float) -> None:
    weights = torch.randn(40, columns, generator=torch.Generator().manual_seed(4)) * 0.02
    done = quantize(weights, Recipe(fmt.name, 128, z))
    error = (dequantize(done.weight) - weights).abs()
    blocks = [weights[:, start : start + 128] for start in range(0, columns, 128)]
    largest = torch.cat([block.abs().amax(1, keepdim=True).expand_as(block) for block in blocks], 1)
    smallest_step = largest * 1.01 / fmt.max_value * 2.0 ** (1 - fmt.bias - fmt.mantissa_bits)
    bound = torch.maximum(weights.abs() * 2.0**-fmt.mantissa_bits, smallest_step) / 2
    assert bool((error <= bound * 1.0001).all())
    assert done.squared_error == pytest.approx(float(error.double().square().sum()), rel=1e-2)


def test_outliers_are_exact_and_leave_zeros_in_the_codes() -> None:
    weights = torch.randn(32, 512, generator=torch.Generator().manual_seed(5)) * 0.02
    weights[3, 100] = 1.5  # float16 holds both exactly
    weights[3, 101] = -2.25
    recipe = Recipe("e2m5")
    packed = quantize(weights, recipe).weight
    assert packed.outlier_index.shape == packed.outlier_value.shape == (32, recipe.outlier_slots(512)) == (32, 2)
    assert dequantize(packed)[3, 100:102].tolist() == [1.5, -2.25]
    assert packed.codes[3, 100:102].tolist() == [0, 0]
    assert float(packed.scales[3, 0]) < 0.1  # they do not count for their block's largest weight
    unused = packed.outlier_value == 0
    assert bool(unused.any())
    assert bool((packed.outlier_index[unused] == 0).all())


def test_outliers_are_those_beyond_the_threshold_and_the_largest_of_a_row() -> None:
    weights = torch.randn(64, 1024, generator=torch.Generator().manual_seed(6)) + 0.5
    packed = quantize(weights, Recipe(z_threshold=2.5)).weight
    far = (weights - weights.mean()).abs() > 2.5 * weights.std()
    for row, (index, value) in enumerate(zip(packed.outlier_index.long(), packed.outlier_value, strict=True)):
        held = index[value != 0]
        candidates = weights[row].abs().masked_fill(~far[row], 0).topk(len(index))
        assert set(held.tolist()) == set(candidates.indices[candidates.values > 0].tolist())


def test_slots_depend_on_the_shape_alone() -> None:
    assert Recipe(z_threshold=0).outlier_slots(4096) == 0
    assert [Recipe().outlier_slots(columns) for columns in (1, 8, 384, 1024, 4096)] == [1, 1, 2, 3, 12]
    assert Recipe(z_threshold=0.01).outlier_slots(64) == 64


@pytest.mark.parametrize("scale", [1e-36, 1e-8, 1e-4, 1.0, 1e4, 1e8, 1e30])
def test_no_scale_of_the_weights_costs_accuracy(scale: float) -> None:
    weights = torch.randn(16, 256, generator=torch.Generator().manual_seed(7)).double()
    reached = dequantize(quantize((weights * scale).float(), Recipe("e2m5")).weight).double() / scale
    assert float((reached - weights).square().mean()) < 6e-5


def test_weights_beyond_float16_are_no_outliers() -> None:
    weights = torch.randn(4, 128, generator=torch.Generator().manual_seed(8))
    weights[1, 7] = 1e5
    packed = quantize(weights, Recipe()).weight
    assert bool(torch.isfinite(packed.outlier_value).all())
    assert float(dequantize(packed)[1, 7]) == pytest.approx(1e5, rel=0.02)


def test_zeros_stay_zeros() -> None:
    assert not bool(dequantize(quantize(torch.zeros(3, 200), Recipe()).weight).any())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_named(bad: float) -> None:
    weights = torch.randn(700, 512, dtype=torch.bfloat16)
    weights[600, 5] = bad
    with pytest.raises(NonFiniteWeight, match=r"layers\.3\.up\.weight.*download"):
        quantize(weights, Recipe(), "layers.3.up.weight")


def test_auto_takes_the_format_with_the_least_error() -> None:
    seed = torch.Generator().manual_seed(9)
    gauss = torch.randn(64, 512, generator=seed)
    wide = gauss.sign() * 2 ** (-14 * torch.rand(64, 512, generator=seed))
    mixed = gauss.sign() * 2 ** (-6 * torch.rand(64, 512, generator=seed).sqrt())
    chosen = set()
    for weights in (gauss, wide * wide.abs(), mixed):
        errors = {name: quantize(weights, Recipe(name)).squared_error for name in FORMATS}
        best = quantize(weights, Recipe("auto"))
        assert best.squared_error == min(errors.values())
        chosen.add(best.format.name)
    assert "e2m5" in chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 8, 300])
@pytest.mark.parametrize(("rows", "columns"), [(96, 384), (1100, 1024), (33, 200), (5, 64)])
def test_the_layer_computes_what_the_specification_says(
    rows: int, columns: int, tokens: int, dtype: torch.dtype
) -> None:
    seed = torch.Generator().manual_seed(rows)
    layer = filled(torch.randn(rows, columns, generator=seed) * 0.02, torch.randn(rows, generator=seed).to(dtype))
    x = torch.randn(2, tokens, columns, generator=seed).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert y.shape == (2, tokens, rows)
    expected = torch.nn.functional.linear(x.double(), layer.dequantized().double(), layer.bias.double())
    step = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    scale = float(expected.abs().max())
    assert float((y.double() - expected).abs().max()) <= scale * step
    assert torch.allclose(reference_linear(x, layer.packed(), layer.bias).double(), expected, atol=scale * step)


def test_large_weights_go_through_several_panels() -> None:
    assert linear_torch.PANEL_WEIGHTS * 2 < 1100 * 1024  # or the test above does not reach that path


def test_a_layer_keeps_its_format_through_a_state_dict() -> None:
    weights = torch.randn(16, 128, generator=torch.Generator().manual_seed(10))
    source, target = filled(weights, None, "e4m3"), filled(weights, None, "e2m5")
    x = torch.randn(4, 128)
    assert not torch.equal(source(x), target(x))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(x), target(x))


def test_an_empty_layer_and_wrong_inputs_are_errors() -> None:
    with pytest.raises(BadRecipe, match="quantize it again"):
        QuantizedLinear(8, 8, False, Recipe())(torch.ones(1, 8))
    packed = quantize(torch.ones(8, 16), Recipe()).weight
    with pytest.raises(KernelInputError, match="do not fit"):
        quantized_linear(torch.ones(1, 8), packed, None)
    layer = filled(torch.ones(8, 16), None)
    layer.weight_scale = torch.nn.Parameter(torch.ones(8, 2, dtype=torch.bfloat16), requires_grad=False)
    with pytest.raises(KernelInputError, match="scales"):
        layer.packed()


@pytest.mark.parametrize(
    "settings", [{"format": "e5m2"}, {"block_size": 0}, {"z_threshold": -1.0}, {"z_threshold": float("nan")}]
)
def test_a_bad_recipe_says_what_would_do(settings: dict[str, object]) -> None:
    with pytest.raises(BadRecipe, match="use "):
        Recipe(**settings)  # type: ignore[arg-type]


def filled(weights: Tensor, bias: Tensor | None, name: str = "auto") -> QuantizedLinear:
    """A layer that holds `weights` in blocks of 128."""
    recipe = Recipe(name)
    layer = QuantizedLinear(weights.shape[1], weights.shape[0], bias is not None, recipe)
    for part, tensor in QuantizedLinear.parts(quantize(weights, recipe)).items():
        setattr(layer, part, tensor)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    return layer
