"""Held-out perplexity of a model directory.

python perplexity.py packaging/demo-model
"""

from __future__ import annotations

import math
from pathlib import Path

import click
import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

HELD_OUT = Path(__file__).with_name("held_out_tokens.u16")
CONTEXTS = {512: 240, 2048: 40, 8192: 4}  # context in tokens: windows of it that are measured


def read_tokens(path: Path) -> torch.Tensor:
    """[N] int64 ids of a token file."""
    return torch.from_numpy(np.fromfile(path, dtype="<u2").astype(np.int64))


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, tokens: torch.Tensor, context: int, windows: int, every: int = 1) -> float:
    """Mean cross entropy in nats per token over the first `windows` windows of `context` tokens, or every n-th.

    Windows do not overlap: each token is predicted from what precedes it within its own window. float32.
    Raises ValueError when the tokens do not fill one window.
    """
    whole = min((len(tokens) - 1) // context, windows)
    if whole < 1:
        raise ValueError(f"{len(tokens)} held-out tokens do not fill a window of {context}")
    losses = []
    for index in range(0, whole, every):
        ids = tokens[index * context : (index + 1) * context + 1]
        logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:]).item())
    return sum(losses) / len(losses)


def figures(model: PreTrainedModel, tokens: torch.Tensor) -> dict[str, float]:
    """Perplexity by context length, and on a sample that a test repeats in seconds. Contexts too long are left out."""
    fitting = {c: n for c, n in CONTEXTS.items() if c < len(tokens) and c <= model.config.max_position_embeddings}
    found = {f"ppl_{c}": round(math.exp(mean_loss(model, tokens, c, n)), 3) for c, n in fitting.items()}
    if 512 in fitting:
        found["ppl_512_every_8th"] = round(math.exp(mean_loss(model, tokens, 512, CONTEXTS[512], every=8)), 3)
    return found


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--tokens", default=HELD_OUT, type=click.Path(exists=True, path_type=Path), help="token file")
def main(model: Path, tokens: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, value in figures(loaded, read_tokens(tokens)).items():
        click.echo(f"{name} {value}")


if __name__ == "__main__":
    main()
