"""Before an architecture that no test covers is served: does the paged way compute what the stock model computes?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from atlas_client.errors import ErrorCode, ErrorReply
from atlas_tiers.base import BLOCK_TOKENS, PageLayout, Table
from atlas_tiers.device import DeviceMemory
from atlas_tiers.stream import Slices, Want
from atlas_tiers.tensors import LayerPages

from . import attention
from .forward import Forward, Piece
from .model import LoadedModel

# Compared with stock transformers by the tests, token by token.
COVERED = frozenset((
    "opt", "llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "phi", "gpt_neox",
    "falcon", "mpt", "bloom", "gptj",
))  # fmt: skip
TOKENS = BLOCK_TOKENS + 8  # two pages
CHUNKS = (5, BLOCK_TOKENS, 3)
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}  # of the largest logit


class _Pages:
    """Two pages and one between them that is not used; none is ever away."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.layout: PageLayout = dataclasses.replace(loaded.layout, dtype=loaded.info.dtype)  # not int8
        self.pages = DeviceMemory(self.layout, 3, str(loaded.device)).layers
        self.lanes = dict.fromkeys(self.pages, 0)
        self.host_pages: dict[int, LayerPages] = {}

    def read_ahead(self, wants: Sequence[Want]) -> Slices:
        raise ValueError(f"{len(wants)} slices of pages that are all in the pool")


@torch.inference_mode()
def check(loaded: LoadedModel) -> None:
    """Computes TOKENS tokens in chunks over two pages, and at once by the stock model without a cache.

    Raises ErrorReply NO_SUCH_MODEL when the last logits differ by more than TOLERANCE, or the model fails.
    """
    if loaded.model.config.model_type in COVERED or loaded.max_context < TOKENS:
        return
    tokens = [(7 * n + 11) % loaded.vocab for n in range(TOKENS)]
    try:
        paged, stock = _paged(loaded, tokens), _stock(loaded, tokens)
    except Exception as error:  # whatever an unknown architecture does with a cache
        raise _refusal(loaded, f"{type(error).__name__}: {error}") from error
    difference = float((paged - stock).abs().max() / stock.abs().max())
    if not difference <= TOLERANCE[loaded.info.dtype]:
        raise _refusal(loaded, f"its logits over pages differ from the stock model's by {difference:.1e}")


def _paged(loaded: LoadedModel, tokens: list[int]) -> torch.Tensor:
    forward = Forward(loaded, _Pages(loaded))
    first, logits = 0, torch.empty(0)
    for count in CHUNKS:
        logits = forward([Piece(tokens[first : first + count], first, [Table([2, 0])], sample=True)])[0]
        first += count
    return logits


def _stock(loaded: LoadedModel, tokens: list[int]) -> torch.Tensor:
    model = loaded.model
    model.set_attn_implementation("eager")
    try:
        ids = torch.tensor([tokens], device=loaded.device)
        return model(input_ids=ids, use_cache=False).logits[0, -1].float()  # type: ignore[no-any-return]
    finally:
        if loaded.attention == "interface":
            model.set_attn_implementation(attention.NAME)


def _refusal(loaded: LoadedModel, why: str) -> ErrorReply:
    return ErrorReply(
        ErrorCode.NO_SUCH_MODEL,
        f"{loaded.model.config.model_type} can't be served over pages: {why}",
        "this architecture is not supported; `atlasctl model load` another model",
    )
