"""One forward pass over a batch of sessions: from token ids and block tables to the sampled rows' logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from atlas_tiers.base import Table

from atlasd.quant.linear import QuantizedLinear

from .attention import Step, paged_cache
from .context import Pages, span
from .model import LoadedModel

# A pass whose operations are small runs on one CPU thread: waking a second one for each costs more than it saves.
# Measured with the bundled model (225,000 weights a layer) on two cores: 4 to 64 rows took half the time on one.
SMALL_LAYER = 1 << 20  # weights
SMALL_WORK = 1 << 24  # weights times rows


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens of one session at positions [first, first + len(tokens)); `sample`: the last row's logits are wanted.
    `tables` as in KVSequence."""

    tokens: Sequence[int]
    first: int
    tables: Sequence[Table]
    sample: bool


class Forward:
    """Runs the model on pieces. Blocks for all tokens must have been reserved. A pass raises PageDamaged when a page
    that is away can't be read; its tokens may then be computed again."""

    def __init__(self, loaded: LoadedModel, store: Pages) -> None:
        self._loaded = loaded
        self._store = store
        kinds = (torch.nn.Linear, QuantizedLinear)
        sizes = [m.in_features * m.out_features for m in loaded.model.modules() if isinstance(m, kinds)]
        self._layer_weights = sum(sizes) // max(1, len(sizes))
        self._threads = torch.get_num_threads()
        self.layers = 0  # attention layers computed so far: a long pass is told from a hung one by it

    @torch.inference_mode()
    def __call__(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Logits [number of pieces with `sample`, vocabulary] in float32, in the pieces' order."""
        torch.set_num_threads(self._threads_for(sum(len(piece.tokens) for piece in pieces)))
        if self._loaded.attention == "interface":
            return self._run(pieces)
        return torch.cat([self._run([piece]) for piece in pieces])

    def _run(self, pieces: Sequence[Piece]) -> torch.Tensor:
        device = self._loaded.device
        spans, rows, start = [], [], 0
        for piece in pieces:
            stop = start + len(piece.tokens)
            spans.append(span(start, stop, piece.first, piece.tables, self._store, device))
            if piece.sample:
                rows.append(stop - 1)
            start = stop
        ids = torch.tensor([[t for piece in pieces for t in piece.tokens]], dtype=torch.int64, device=device)
        positions = torch.cat([torch.arange(s.first, s.length, device=device) for s in spans])[None]
        # One row at least: some heads reject an empty selection. The surplus is cut off below.
        keep = torch.tensor(rows or [start - 1], dtype=torch.int64, device=device)
        step = Step(self._store, spans, self._count_layer, self._threads)
        try:
            logits = self._model(ids, positions, step, keep)
        finally:
            step.close()
        return logits[0, : len(rows)].float()

    def _threads_for(self, rows: int) -> int:
        small = self._layer_weights < SMALL_LAYER and rows * self._layer_weights < SMALL_WORK
        return 1 if small and self._loaded.device.type == "cpu" else self._threads

    def _count_layer(self) -> None:
        self.layers += 1

    def _model(self, ids: torch.Tensor, positions: torch.Tensor, step: Step, keep: torch.Tensor) -> torch.Tensor:
        model = self._loaded.model
        if self._loaded.attention == "interface":
            out = model(input_ids=ids, position_ids=positions, use_cache=False, step=step, logits_to_keep=keep)
            return out.logits  # type: ignore[no-any-return]
        span = step.spans[0]
        cache = paged_cache(self._loaded.layers, step, span.first)
        mask = torch.ones(1, span.length, dtype=torch.int64, device=ids.device)
        extra = {"position_ids": positions} if self._loaded.takes_positions else {}
        out = model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=keep, **extra
        )
        return out.logits  # type: ignore[no-any-return]
