"""What int8 pages do to a model's predictions: KL divergence and perplexity on held-out text, and their bytes.

The bundled model in float32, weights as they are. Every window is computed twice over pages, as a prefill that reads
its own K and V back: from float32 pages, and from int8 pages with a scale for each token's head.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from atlas_tiers.base import BLOCK_TOKENS, PageLayout, Table
from atlas_tiers.device import DeviceMemory
from families import DEMO
from report import row

from atlasd.config import Config
from atlasd.engine.attention import Step
from atlasd.engine.context import span
from atlasd.engine.model import LoadedModel, load

WINDOW, WINDOWS = 1024, 24
HELD_OUT = DEMO / "training" / "held_out_tokens.u16"


class Pages:
    """One window's pages, all in the device pool."""

    def __init__(self, layout: PageLayout) -> None:
        self.layout = layout
        self.pages = DeviceMemory(layout, WINDOW // BLOCK_TOKENS, "cpu").layers
        self.lanes = dict.fromkeys(self.pages, 0)
        self.host_pages: dict[int, object] = {}


@torch.inference_mode()
def logprobs(loaded: LoadedModel, layout: PageLayout, ids: torch.Tensor) -> torch.Tensor:
    """[len(ids), vocabulary]"""
    pages = Pages(layout)
    table = list(range(WINDOW // BLOCK_TOKENS))
    whole = span(0, len(ids), 0, [Table(table)], pages, torch.device("cpu"))  # type: ignore[arg-type]
    step = Step(pages, [whole])  # type: ignore[arg-type]
    positions = torch.arange(len(ids))[None]
    logits = loaded.model(input_ids=ids[None], position_ids=positions, use_cache=False, step=step).logits
    return torch.log_softmax(logits[0].float(), dim=-1)


def main() -> None:
    loaded = load("demo", DEMO, Config(quant="none", state_dir="/nonexistent", device="cpu"), lambda *_: None)
    tokens = torch.from_numpy(np.fromfile(HELD_OUT, dtype="<u2").astype(np.int64))
    eighth = dataclasses.replace(loaded.layout, dtype="int8")
    divergence, losses = [], {"float32": [], "int8": []}
    for start in range(0, WINDOWS * WINDOW, WINDOW):
        ids, following = tokens[start : start + WINDOW], tokens[start + 1 : start + WINDOW + 1]
        exact, rounded = (logprobs(loaded, layout, ids) for layout in (loaded.layout, eighth))
        divergence.append(float((exact.exp() * (exact - rounded)).sum(-1).mean()))
        for name, found in (("float32", exact), ("int8", rounded)):
            losses[name].append(float(-found.gather(1, following[:, None]).mean()))
    kld = sum(divergence) / len(divergence)
    plain, small = (math.exp(sum(losses[name]) / WINDOWS) for name in ("float32", "int8"))
    what = f"{WINDOWS} windows of {WINDOW} held-out tokens"
    row("kv_int8", "KL divergence of int8 pages from float32 pages, nats a token", kld, "nats", against=what)
    row("kv_int8", "perplexity, float32 pages", plain, "")
    row("kv_int8", "perplexity, int8 pages", small, "", against=f"float32 pages: {plain:.4f}", ratio=small / plain)
    half = dataclasses.replace(loaded.layout, dtype="float16").bytes_per_token
    row("kv_int8", "bytes a token, int8", eighth.bytes_per_token, "B", against=f"float16: {half} B",
        ratio=eighth.bytes_per_token / half)  # fmt: skip


if __name__ == "__main__":
    main()
