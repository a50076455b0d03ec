"""Quantization on load as a registered quantizer of transformers, named "atlas".

After `import atlasd.quant.hf`, `AutoModelForCausalLM.from_pretrained(path, quantization_config=AtlasQuantConfig())`
reads one tensor at a time, quantizes it and frees its source; `save_pretrained` writes standard safetensors, which
plain `from_pretrained` loads again bit for bit. The loaded model has `atlas_quantization`, a Report.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from atlasd.quant.formats import (
    AUTO,
    BadRecipe,
    IncompleteWeights,
    NothingQuantized,
    OffloadRefused,
    QuantizationError,
    Recipe,
    format_of,
)
from atlasd.quant.linear import PARTS, QuantizedLinear
from atlasd.quant.pages import PageReleaser
from atlasd.quant.quantize import quantize

METHOD = "atlas"
LAYOUT = 1  # of the saved tensors; another one is refused


@dataclasses.dataclass(frozen=True)
class Report:
    """What was quantized. Bytes and bits are of the replaced weights with scales and outliers, without biases."""

    replaced: int  # layers
    kept: list[str]  # "name: reason" of every other matrix
    formats: dict[str, int]  # layers by format
    bytes: int
    bits_per_weight: float


@register_quantization_config(METHOD)
class AtlasQuantConfig(QuantizationConfigMixin):
    """The recipe, as transformers passes it around and saves it in config.json. Raises BadRecipe.

    `on_tensor(done, total)` is called after each quantized layer, in the thread that loads; it is not saved.
    """

    def __init__(
        self,
        format: str = AUTO,
        block_size: int = 128,
        z_threshold: float = 3.0,
        modules_to_not_convert: list[str] | None = None,
        on_tensor: Callable[[int, int], None] | None = None,
        layout: int = LAYOUT,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if unknown or layout != LAYOUT or quant_method != METHOD:
            extra = ", ".join(unknown) or f"{quant_method} layout {layout}"
            raise BadRecipe(
                f"the quantization settings hold {extra}, unknown to this version", "quantize the model again"
            )
        self.quant_method = METHOD  # type: ignore[assignment]  # the enum lists only their own methods
        self.layout = LAYOUT
        self.format, self.block_size, self.z_threshold = format, block_size, z_threshold
        self.modules_to_not_convert = modules_to_not_convert
        self.on_tensor = on_tensor
        self.recipe()

    def recipe(self) -> Recipe:
        """The checked recipe of one matrix."""
        return Recipe(self.format, self.block_size, self.z_threshold)

    def to_dict(self) -> dict[str, Any]:
        """What is saved."""
        return {name: copy.deepcopy(value) for name, value in vars(self).items() if name != "on_tensor"}

    def __deepcopy__(self, memo: dict[int, Any]) -> AtlasQuantConfig:
        return AtlasQuantConfig(on_tensor=self.on_tensor, **self.to_dict())  # the callback's owner is not copied


@register_quantizer(METHOD)
class AtlasHfQuantizer(HfQuantizer):
    """Puts QuantizedLinear in the place of the model's linear layers and fills them as the weights arrive."""

    requires_calibration = False
    quantization_config: AtlasQuantConfig

    def __init__(self, quantization_config: AtlasQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.recipe = quantization_config.recipe()
        self.layers: dict[str, QuantizedLinear] = {}
        self.kept: list[str] = []
        self.failure: QuantizationError | None = None
        self.filled: set[str] = set()
        self.pages = PageReleaser(())

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises OffloadRefused for a device map that spreads the model over RAM or disk."""
        if isinstance(device_map, dict):
            _refuse_offload(device_map)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """True for the weight of a replaced layer while its source is a full-precision checkpoint."""
        layer, _, part = param_name.rpartition(".")
        return not self.pre_quantized and part == "weight" and layer in self.layers

    def get_quantize_ops(self) -> ConversionOps:
        """The operation the loader runs on each weight."""
        return AtlasQuantize(self)

    def is_serializable(self) -> bool:
        """A quantized model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        chosen = self.quantization_config.modules_to_not_convert
        in_fp32 = list(model._keep_in_fp32_modules or ())
        skipped = self.get_modules_to_not_convert(model, chosen, in_fp32, add_default_skips=True)
        self.pages = PageReleaser(kwargs.get("checkpoint_files") or ())
        self.layers, self.kept = replace_linears(model, self.recipe, skipped)
        if not self.layers:
            seen = ", ".join(self.kept[:8]) or "no matrix at all"
            raise NothingQuantized(
                f"{type(model).__name__} has no linear layer that can be quantized (seen: {seen})",
                "load it unquantized with --quant none",
            )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.failure is not None:
            raise self.failure
        if not self.pre_quantized:
            _refuse_offload(getattr(model, "hf_device_map", {}))
        missing = [name for name, layer in self.layers.items() if not self._is_filled(name, layer)]
        if missing:
            raise IncompleteWeights(
                f"the checkpoint lacks the weights of {len(missing)} layers ({', '.join(missing[:4])})",
                "it is incomplete or of another model: download it again",
            )
        for layer in self.layers.values():
            layer.requires_grad_(False)
        self.pages.release()
        model.atlas_quantization = report(self.layers, self.kept)  # type: ignore[assignment]
        return model

    def _is_filled(self, name: str, layer: QuantizedLinear) -> bool:
        loaded = (getattr(layer, part) for part in PARTS)
        return name in self.filled or all(getattr(part, "_is_hf_initialized", False) for part in loaded)


class AtlasQuantize(ConversionOps):
    """Turns one full-precision weight into the parts of its layer.

    The loader catches whatever an operation raises and reports it as text. So the first failure is kept, the rest of
    the load is let pass without work, and the quantizer raises the failure, typed, when the loader is done.
    """

    def __init__(self, quantizer: AtlasHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], **kwargs: Any
    ) -> dict[str, nn.Parameter]:
        """Full-precision weights by parameter name (a tensor, or a list of one) to the parts of their layers."""
        converted: dict[str, nn.Parameter] = {}
        for name, value in input_dict.items():
            source = value[0] if isinstance(value, list) else value
            layer = name.removesuffix(".weight")
            if layer in self.quantizer.layers:
                converted.update(self._quantize(layer, source))
            else:
                converted[name] = nn.Parameter(source, requires_grad=False)
        return converted

    def _quantize(self, name: str, source: Tensor) -> dict[str, nn.Parameter]:
        owner = self.quantizer
        layer = owner.layers[name]
        try:
            if owner.failure is None:
                _check_shape(name, source, layer)
                parts = QuantizedLinear.parts(quantize(source, owner.recipe, f"{name}.weight"))
                owner.filled.add(name)
                owner.pages.consumed(source.nbytes)
                if owner.quantization_config.on_tensor is not None:
                    owner.quantization_config.on_tensor(len(owner.filled), len(owner.layers))
                return {f"{name}.{part}": tensor for part, tensor in parts.items()}
        except QuantizationError as failure:
            owner.failure = failure
        return {}


def replace_linears(
    model: PreTrainedModel, recipe: Recipe, skipped: list[str]
) -> tuple[dict[str, QuantizedLinear], list[str]]:
    """Puts an empty QuantizedLinear in the place of each linear layer whose name `skipped` does not match.

    Returns the new layers by name, and "name: reason" of every matrix that stays.
    """
    layers: dict[str, QuantizedLinear] = {}
    for name, module in list(model.named_modules()):
        if _replaceable(module, model.config) and should_convert_module(name, skipped):
            bias = module.bias
            with torch.device("meta"):
                layer = QuantizedLinear(
                    module.in_features,
                    module.out_features,
                    bias is not None,
                    recipe,
                    None if bias is None else bias.dtype,
                )
            model.set_submodule(name, layer)
            layers[name] = layer
    return layers, _kept(model)


def report(layers: dict[str, QuantizedLinear], kept: list[str]) -> Report:
    """Counts of the filled `layers`."""
    formats = Counter(format_of(layer.packed().mantissa_bits).name for layer in layers.values())
    stored = sum(getattr(layer, part).nbytes for layer in layers.values() for part in PARTS)
    weights = sum(layer.weight.numel() for layer in layers.values())
    return Report(len(layers), kept, dict(formats), stored, 8 * stored / weights)


def _replaceable(module: nn.Module, config: Any) -> bool:
    """Whether `module` computes x Wᵀ + b and nothing reads its weight behind its back."""
    if not isinstance(module, nn.Linear):
        return False
    if type(module).__name__ == "FalconLinear":  # its own forward computes the same
        return True
    if getattr(config, "slow_but_exact", False) and getattr(config, "pretraining_tp", 1) > 1:
        return False  # BLOOM then slices the weights itself
    return type(module) is nn.Linear


def _kept(model: nn.Module) -> list[str]:
    kept = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            continue
        for parameter, tensor in module.named_parameters(recurse=False):
            if tensor.dim() >= 2:
                kept.append(f"{name}.{parameter}: {_reason(module, tensor)}".lstrip("."))
    return kept


def _reason(module: nn.Module, tensor: Tensor) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if type(module) is nn.Linear:
        return "excluded"
    return f"{type(module).__name__} is not a plain linear layer" + (", fused experts" if tensor.dim() > 2 else "")


def _check_shape(name: str, source: Tensor, layer: QuantizedLinear) -> None:
    expected = (layer.out_features, layer.in_features)
    if tuple(source.shape) != expected or not source.is_floating_point():
        raise IncompleteWeights(
            f"{name}.weight is {source.dtype} {tuple(source.shape)} in the checkpoint, not floats {expected}",
            "the checkpoint is of another model: check config.json, or download both again",
        )


def _refuse_offload(device_map: dict[str, Any]) -> None:
    places = {str(place) for place in device_map.values()}
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise OffloadRefused(
            f"quantization on load can't spread a model over {', '.join(sorted(places))}: the weights would be wrong",
            "give one device, or load it unquantized",
        )
