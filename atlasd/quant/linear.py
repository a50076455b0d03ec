"""The linear layer with quantized weights that takes the place of nn.Linear."""

from __future__ import annotations

from typing import Any

import torch
from atlas_kernels.dispatch import check, quantized_linear
from atlas_kernels.reference import PackedWeight, dequantize
from torch import Tensor, nn

from atlasd.quant.formats import Recipe, format_of
from atlasd.quant.quantize import Quantized, index_dtype

# The names of a layer's tensors in a saved model. `weight` keeps the source's name: the loader finds its target by it.
PARTS = ("weight", "weight_scale", "outlier_index", "outlier_value", "weight_format")


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b with W as 8-bit floats. x [..., in_features]; y [..., out_features] in x's dtype.

    Everything is a Parameter without gradient, not a buffer: buffers are not offloaded. No part is of a float8 dtype:
    those get cast. `weight_format` holds the mantissa bits, so that the format survives saving and loading.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, recipe: Recipe, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.block_size = recipe.block_size
        slots = recipe.outlier_slots(in_features)
        self.weight = _frozen(torch.zeros(out_features, in_features, dtype=torch.uint8))
        self.weight_scale = _frozen(torch.zeros(out_features, recipe.blocks(in_features), dtype=torch.bfloat16))
        self.outlier_index = _frozen(torch.zeros(out_features, slots, dtype=index_dtype(in_features)))
        self.outlier_value = _frozen(torch.zeros(out_features, slots, dtype=torch.float16))
        self.weight_format = _frozen(torch.zeros(1, dtype=torch.uint8))
        self.bias = _frozen(torch.zeros(out_features, dtype=dtype)) if bias else None
        self._packed: PackedWeight | None = None

    @staticmethod
    def parts(quantized: Quantized) -> dict[str, nn.Parameter]:
        """What a layer stores of `quantized`, by parameter name."""
        packed = quantized.weight
        kind = torch.tensor([packed.mantissa_bits], dtype=torch.uint8, device=packed.codes.device)
        tensors = (packed.codes, packed.scales, packed.outlier_index, packed.outlier_value, kind)
        return {name: _frozen(tensor) for name, tensor in zip(PARTS, tensors, strict=True)}

    def packed(self) -> PackedWeight:
        """The weight as the kernels take it. Raises BadRecipe before loading, KernelInputError for wrong parts."""
        held = self._packed
        if held is None or held.codes is not self.weight or held.outlier_value is not self.outlier_value:
            mantissa = format_of(
                int(self.weight_format.item())
            ).mantissa_bits  # waits for the device: once, not per step
            parts = (self.weight, self.weight_scale, self.outlier_index, self.outlier_value)
            held = PackedWeight(*parts, mantissa, self.block_size)
            check(held)
            self._packed = held
        return held

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._packed = None  # the parameters keep their identity, the format in them may not

    def dequantized(self) -> Tensor:
        """The weight it stands for: float32 [out_features, in_features]."""
        return dequantize(self.packed())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] to [..., out_features]. Raises KernelInputError."""
        return quantized_linear(x, self.packed(), self.bias)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, block_size={self.block_size}"


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
