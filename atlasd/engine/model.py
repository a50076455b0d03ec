"""Loading: from a model directory to a model whose attention goes to pages, with all the engine must know of it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from atlas_client.errors import ErrorCode, ErrorReply
from atlas_client.protocol import ModelInfo
from atlas_tiers.base import KVGroup, PageLayout
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from atlasd.config import Config
from atlasd.quant.formats import QuantizationError
from atlasd.quant.hf import AtlasQuantConfig

from . import attention, hub, identity

log = logging.getLogger(__name__)

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
CACHE_FAMILIES = ("falcon", "mpt", "bloom", "gptj")  # ignore AttentionInterface
FALLBACK_CONTEXT = 2048  # an ALiBi model that names no length

Report = Callable[[str, int, int, str], None]  # phase, done, total, unit


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to serve. `layers`: attention layers; `attention`: "interface" or "cache"."""

    model: PreTrainedModel
    tokenizer: Any
    device: torch.device
    layout: PageLayout
    layers: int
    attention: str
    takes_positions: bool
    max_context: int
    vocab: int
    eos: frozenset[int]
    defaults: dict[str, Any]  # generation_config.json
    identity: str
    tokenizer_id: str
    info: ModelInfo


def load(name: str, directory: Path, config: Config, report: Report) -> LoadedModel:
    """Reads, quantizes and probes the model in `directory`. Raises ErrorReply."""
    raw = hub.check(directory)
    device = choose_device(config.device)
    family = _config(directory, raw)
    way = "cache" if family.model_type in CACHE_FAMILIES else "interface"
    dtype = choose_dtype(config.dtype, family, device)
    model = _read(directory, family, way, dtype, device, config, report)
    tokenizer = _tokenizer(directory)
    way, groups = _way_and_groups(model, way, device)
    computed = str(dtype).removeprefix("torch.")
    layout = PageLayout(groups, computed if config.kv_dtype == "auto" else config.kv_dtype)
    return _describe(name, directory, raw, model, tokenizer, device, computed, layout, way, config)


def choose_device(wanted: str) -> torch.device:
    """cuda when asked for, or when there and "auto". Raises INVALID_PARAMETER when it was asked for and is missing."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = "this torch build has no CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise ErrorReply(
            ErrorCode.INVALID_PARAMETER,
            f"--device cuda: {why}",
            "`atlasctl doctor` shows the driver; or use --device cpu",
        )
    return torch.device("cuda")


def choose_dtype(wanted: str, family: Any, device: torch.device) -> torch.dtype:
    """auto: float32 on a CPU (recomputed K/V then agrees with kept K/V closely), the model's 16-bit type on a GPU."""
    if wanted != "auto":
        return getattr(torch, wanted)  # type: ignore[no-any-return]
    if device.type == "cpu":
        return torch.float32
    own = getattr(family, "dtype", None)
    return own if own in (torch.float16, torch.bfloat16) else torch.float16


def _config(directory: Path, raw: dict[str, Any]) -> Any:
    """The model's configuration; remote code is never run. Refuses what the pages can't represent."""
    try:
        family = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a config it does not know
        hint = "it needs code from its own repository, which is never run" if "auto_map" in raw else str(error)
        raise ErrorReply(ErrorCode.NO_SUCH_MODEL, f"unknown architecture {raw.get('model_type')!r}: {hint}") from None
    text = family.get_text_config(decoder=True)
    if getattr(text, "is_encoder_decoder", False):
        raise ErrorReply(
            ErrorCode.NO_SUCH_MODEL, f"{family.model_type} is an encoder-decoder; only decoders are served"
        )
    return text if text.model_type.removesuffix("_text") == family.model_type else family


def _read(
    directory: Path, family: Any, way: str, dtype: torch.dtype, device: torch.device, config: Config, report: Report
) -> PreTrainedModel:
    attention.register()
    quantization = None
    if config.quant != "none" and getattr(family, "quantization_config", None) is None:
        quantization = AtlasQuantConfig(
            format=config.quant, block_size=config.quant_block_size, z_threshold=config.quant_z_threshold
        )
        quantization.on_tensor = lambda done, total: report("quantizing", done, total, "tensors")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            config=family,
            dtype=dtype,
            device_map={"": device},
            attn_implementation=attention.NAME if way == "interface" else "eager",
            quantization_config=quantization,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=False,
        )
    except QuantizationError as error:
        raise ErrorReply(ErrorCode.NO_SUCH_MODEL, str(error)) from None
    except torch.OutOfMemoryError as error:
        raise ErrorReply(ErrorCode.OUT_OF_VRAM, f"the weights do not fit: {error}") from None
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError) as error:
        raise ErrorReply(ErrorCode.NO_SUCH_MODEL, f"{directory}: {type(error).__name__}: {error}") from None
    return model.eval()  # type: ignore[no-any-return]


def _tokenizer(directory: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # as for configurations
        raise ErrorReply(ErrorCode.NO_SUCH_MODEL, f"{directory}: tokenizer: {error}", "fetch the model again") from None


def _way_and_groups(model: PreTrainedModel, way: str, device: torch.device) -> tuple[str, tuple[KVGroup, ...]]:
    """A model that does not pass the step on to its attention is tried with a Cache instead."""
    try:
        return way, _probe(model, way, device)
    except ErrorReply:
        if way == "cache":
            raise
        model.set_attn_implementation("eager")
        return "cache", _probe(model, "cache", device)


@torch.inference_mode()
def _probe(model: PreTrainedModel, way: str, device: torch.device) -> tuple[KVGroup, ...]:
    """Runs two tokens through the model and records what each layer's attention is given."""
    probe = attention.Probe()
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    layers = int(model.config.num_hidden_layers)
    try:
        if way == "interface":
            positions = torch.arange(2, device=device)[None]
            model(input_ids=ids, position_ids=positions, use_cache=False, step=probe)
        else:
            model(input_ids=ids, past_key_values=attention.paged_cache(layers, probe, 0), use_cache=True)
    except Exception as error:  # whatever an unknown architecture does with the step
        raise _unserved(model, f"{type(error).__name__}: {error}") from error
    if probe.problems or sorted(probe.shapes) != list(range(layers)):
        raise _unserved(
            model, "; ".join(probe.problems) or f"{len(probe.shapes)} of {layers} layers use paged attention"
        )
    return probe.groups()


def _unserved(model: PreTrainedModel, why: str) -> ErrorReply:
    return ErrorReply(ErrorCode.NO_SUCH_MODEL, f"{model.config.model_type} can't be served over pages: {why}")


def _max_context(config: Any, wanted: int) -> int:
    own = next((int(getattr(config, key)) for key in CONTEXT_KEYS if getattr(config, key, None)), FALLBACK_CONTEXT)
    rope = getattr(config, "rope_parameters", None) or {}
    if isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope"):
        # Frequencies change with the longest sequence of a batch: past this length kept K/V would be wrong.
        own = min(own, int(rope.get("original_max_position_embeddings") or own))
    if wanted > own:
        raise ErrorReply(
            ErrorCode.INVALID_PARAMETER, f"--max-context {wanted}: the model has {own}", "lower --max-context"
        )
    return wanted or own


def _describe(
    name: str,
    directory: Path,
    raw: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: Any,
    device: torch.device,
    computed: str,
    layout: PageLayout,
    way: str,
    config: Config,
) -> LoadedModel:
    info = _info(name, directory, raw, model, device, computed, layout, config)
    tokenizer_id = identity.tokenizer(directory)
    defaults = _defaults(directory)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        device=device,
        layout=layout,
        layers=int(model.config.num_hidden_layers),
        attention=way,
        takes_positions="position_ids" in inspect.signature(model.forward).parameters,
        max_context=info.max_context,
        vocab=info.vocab_size,
        eos=_eos(defaults, model.config),
        defaults=defaults,
        identity=identity.digest(
            info.fingerprint, info.quantization, tokenizer_id, computed, layout.describe(), device.type
        ),
        tokenizer_id=tokenizer_id,
        info=info,
    )


def _info(
    name: str,
    directory: Path,
    raw: dict[str, Any],
    model: PreTrainedModel,
    device: torch.device,
    computed: str,
    layout: PageLayout,
    config: Config,
) -> ModelInfo:
    memory = Path(config.state_dir) / "fingerprints.json"
    content = identity.weights(hub.weight_files(directory), memory)
    quantized = getattr(model, "atlas_quantization", None)
    parameters = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    return ModelInfo(
        name=name,
        state="ready",
        path=str(directory),
        architecture=type(model).__name__,
        fingerprint=identity.digest(content, json.dumps(raw, sort_keys=True)),
        quantization=f"{config.quant}/{config.quant_block_size}/{config.quant_z_threshold}" if quantized else "none",
        layers_quantized=quantized.replaced if quantized else 0,
        layers_kept=len(quantized.kept) if quantized else 0,
        weight_bytes=sum(parameters.values()),
        kv_bytes_per_token=layout.bytes_per_token,
        max_context=_max_context(model.config, config.max_context),
        vocab_size=int(model.config.vocab_size),
        device=str(device),
        dtype=computed,
    )


def _defaults(directory: Path) -> dict[str, Any]:
    try:
        value = json.loads((directory / "generation_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ErrorReply(ErrorCode.NO_SUCH_MODEL, f"generation_config.json: {error}", "fetch the model again") from None
    return value if isinstance(value, dict) else {}


def _eos(defaults: dict[str, Any], config: Any) -> frozenset[int]:
    value = defaults.get("eos_token_id", getattr(config, "eos_token_id", None))
    if value is None:
        return frozenset()
    return frozenset(value if isinstance(value, list) else [value])
