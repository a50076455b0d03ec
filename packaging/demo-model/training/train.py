"""Step 2 of 3: trains a small Llama on the token files that prepare.py wrote.

    python train.py OUT --minutes 62

The bundled model took 62 minutes on two CPU cores. Writes OUT/trained (float32) and OUT/training.json.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from perplexity import mean_loss, read_tokens
from prepare import END_OF_TEXT, PAD
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from windows import Ids, Shape, batch

SHORT, LONG = Shape(512, 16), Shape(4096, 2)
LONG_FROM = 0.85  # the last part trains on long windows
PEAK_RATE, WARM_UP, LAST_SHARE, COOL_FROM = 3e-3, 60, 0.03, 0.5
LONGEST_STEP = 30.0  # seconds; a step that took longer was a suspended machine, and counts as this much
POSITIONS = 8192

Loss = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Limit:
    """When training ends: after `steps`, or when `minutes` of it have been used."""

    steps: int | None
    minutes: float

    def fraction(self, steps: int, seconds: float) -> float:
        """How much of the training is done, from 0; at 1 it ends."""
        return steps / self.steps if self.steps else seconds / (self.minutes * 60)


def build(vocabulary: int, hidden: int, layers: int) -> LlamaForCausalLM:
    """A Llama with heads of 64, three query heads to one KV head, tied embeddings. `hidden` is a multiple of 192."""
    heads = hidden // 64
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3,
        head_dim=64,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_OF_TEXT,
        pad_token_id=PAD,
        rms_norm_eps=1e-5,
    )
    return LlamaForCausalLM(config)


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    inner = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    chosen = {id(p) for p in inner}
    outer = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(inner, lr=PEAK_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def learning_rate(step: int, fraction: float) -> float:
    """Linear warm-up by steps, flat to COOL_FROM, then linear down to LAST_SHARE of the peak."""
    cooled = LAST_SHARE + (1 - LAST_SHARE) * min(1.0, (1 - fraction) / (1 - COOL_FROM))
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP) * cooled


def loss_of(model: LlamaForCausalLM) -> Loss:
    """Mean cross entropy of [rows, length + 1] ids, the layers in bfloat16 where the processor has it."""

    def loss(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
            logits = model.lm_head(hidden)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    return loss


def take_step(loss: Loss, ids: Ids, optims: list[torch.optim.Optimizer], rate: float) -> float:
    """One step down the gradient, clipped to norm 1. Returns the loss before it."""
    for optim in optims:
        for group in optim.param_groups:
            group["lr"] = rate
    value = loss(torch.from_numpy(ids))
    value.backward()
    parameters = [p for optim in optims for group in optim.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optim in optims:
        optim.step()
        optim.zero_grad(set_to_none=True)
    return value.item()


def train(
    model: LlamaForCausalLM, stream: Ids, limit: Limit, shapes: tuple[Shape, Shape], loss: Loss
) -> dict[str, int]:
    """Trains in place until the limit; prints a line every 25 steps. Returns {steps, tokens}."""
    rng = np.random.default_rng(0)
    optims = optimizers(model.train())
    steps, tokens, seconds = 0, 0, 0.0
    while (fraction := limit.fraction(steps, seconds)) < 1:
        began = time.monotonic()
        shape = shapes[1] if fraction >= LONG_FROM else shapes[0]
        value = take_step(loss, batch(stream, shape, rng), optims, learning_rate(steps, fraction))
        steps, tokens = steps + 1, tokens + shape.rows * shape.length
        seconds += min(time.monotonic() - began, LONGEST_STEP)
        if steps % 25 == 0 or steps < 4:
            click.echo(f"step {steps}  {seconds:.0f} s  loss {value:.3f}  {tokens / seconds:.0f} tokens/s")
    return {"steps": steps, "tokens": tokens}


@click.command(help=__doc__)
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--minutes", default=62.0, show_default=True, help="how long to train")
@click.option("--steps", type=click.IntRange(min=1), help="train this many steps instead")
@click.option("--hidden", default=384, show_default=True, help="hidden size, a multiple of 192")
@click.option("--layers", default=6, show_default=True)
@click.option(
    "--window", default=SHORT.length, show_default=True, help="tokens of a short window; long ones are 8 times"
)
@click.option("--rows", default=SHORT.rows, show_default=True, help="windows a step; long: an eighth, 8 times as long")
@click.option("--compile", "compiled", is_flag=True, help="with torch.compile (needs a C++ compiler)")
def main(
    out: Path, minutes: float, steps: int | None, hidden: int, layers: int, window: int, rows: int, compiled: bool
) -> None:
    if hidden % 192:
        raise click.BadParameter(f"{hidden} is not a multiple of 192", param_hint="--hidden")
    torch.manual_seed(0)
    model = build(Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab_size(), hidden, layers)
    stream = read_tokens(out / "train.u16").numpy()
    shapes = Shape(window, rows), Shape(window * 8, max(1, rows // 8))
    if len(stream) <= shapes[1].length + 1:
        raise click.ClickException(f"{len(stream)} tokens do not fill a window of {shapes[1].length}")
    loss = torch.compile(loss_of(model)) if compiled else loss_of(model)
    record: dict[str, float] = {**train(model, stream, Limit(steps, minutes), shapes, loss)}
    model.train(False)
    record["held_out_loss"] = mean_loss(model, read_tokens(out / "held_out.u16"), window, 10**6)
    model.save_pretrained(out / "trained")
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    click.echo(f"held-out loss {record['held_out_loss']:.4f}, perplexity {math.exp(record['held_out_loss']):.2f}")


if __name__ == "__main__":
    main()
