"""What number formats cost this model: the table in its card.

    python quantization_table.py packaging/demo-model

Every linear layer is quantized and expanded again in float32 (nothing else is), and compared with the original on 12
windows of 512 held-out tokens.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import click
import torch
from perplexity import HELD_OUT, read_tokens
from transformers import AutoModelForCausalLM, PreTrainedModel

# The levels of NF4: Dettmers et al. 2023, "QLoRA", appendix E.
NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scheme:
    """`levels` ascending; each `block` of weights shares a scale; weights over `z` deviations stay FP16 (0: none)."""

    name: str
    bits: int
    levels: torch.Tensor
    block: int
    z: float = 0.0
    small_scales: bool = False  # scales as E4M3 under one float32, not as FP16

    def bits_per_weight(self, kept: float) -> float:
        """With scales, and 32 bits (index and value) for each of the share `kept`."""
        return self.bits + (8 if self.small_scales else 16) / self.block + 32 * kept


def minifloat(exponent: int, mantissa: int) -> torch.Tensor:
    """Every value of a float with a sign, IEEE bias and subnormals, ascending; no infinities, in E4M3 one NaN."""
    bias = 2 ** (exponent - 1) - 1
    positive = [(k / 2**mantissa) * 2.0 ** (1 - bias) for k in range(2**mantissa)]
    for e in range(1, 2**exponent):
        positive += [(1 + k / 2**mantissa) * 2.0 ** (e - bias) for k in range(2**mantissa)]
    if (exponent, mantissa) == (4, 3):
        positive.pop()
    return torch.tensor(sorted({-v for v in positive} | set(positive)))


def schemes() -> list[Scheme]:
    """The table's rows."""
    int8, nf4 = torch.arange(-127.0, 128.0), torch.tensor(NF4)
    return [
        Scheme("E4M3 block 128", 8, minifloat(4, 3), 128),
        Scheme("E4M3 block 128, z>3 in FP16", 8, minifloat(4, 3), 128, z=3.0),
        Scheme("E3M4 block 128", 8, minifloat(3, 4), 128),
        Scheme("E2M5 block 128", 8, minifloat(2, 5), 128),
        Scheme("E2M5 block 128, z>3", 8, minifloat(2, 5), 128, z=3.0),
        Scheme("INT8 block 128", 8, int8, 128),
        Scheme("INT8 block 128, z>3", 8, int8, 128, z=3.0),
        Scheme("E2M3 (6 bits) block 128", 6, minifloat(2, 3), 128),
        Scheme("NF4 block 64", 4, nf4, 64),
        Scheme("NF4 block 64, z>3", 4, nf4, 64, z=3.0),
        Scheme("NF4 block 16, E4M3 scales", 4, nf4, 16, small_scales=True),
        Scheme("FP4 E2M1 block 32", 4, minifloat(2, 1), 32),
    ]


def round_trip(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, float]:
    """The weight [out, in] after quantizing and expanding it, and the share of weights kept in FP16."""
    blocks = weight.reshape(-1, scheme.block)
    deviation = (blocks - blocks.mean(1, keepdim=True)).abs()
    kept = (
        deviation > scheme.z * blocks.std(1, keepdim=True) if scheme.z else torch.zeros_like(blocks, dtype=torch.bool)
    )
    scale = blocks.masked_fill(kept, 0).abs().amax(1, keepdim=True).clamp_min(1e-12) / scheme.levels.abs().max()
    if scheme.small_scales:
        unit = scale.max() / 448  # the largest E4M3
        scale = (scale / unit).to(torch.float8_e4m3fn).float() * unit
    between = (scheme.levels[1:] + scheme.levels[:-1]) / 2
    nearest = scheme.levels[torch.bucketize(blocks / scale.clamp_min(1e-20), between)] * scale
    return torch.where(kept, blocks.half().float(), nearest).reshape(weight.shape), kept.float().mean().item()


@torch.inference_mode()
def log_probabilities(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """[windows, 512, vocabulary]."""
    return torch.log_softmax(model(input_ids=windows[:, :-1], use_cache=False).logits.float(), -1)


def loss(log_probs: torch.Tensor, windows: torch.Tensor) -> float:
    """Mean cross entropy in nats."""
    return -log_probs.gather(-1, windows[:, 1:, None]).mean().item()


def row(
    model: PreTrainedModel, weights: dict[str, torch.Tensor], windows: torch.Tensor, scheme: Scheme, base: torch.Tensor
) -> str:
    """One line of the table; the model's weights are left as they were."""
    error, kept, count = 0.0, 0.0, 0
    for name, weight in weights.items():
        expanded, share = round_trip(weight, scheme)
        error += ((expanded - weight) ** 2).sum().item() / weight.var().item()
        kept, count = kept + share * weight.numel(), count + weight.numel()
        model.get_parameter(name).data.copy_(expanded)
    found = log_probabilities(model, windows)
    for name, weight in weights.items():
        model.get_parameter(name).data.copy_(weight)
    divergence = (base.exp() * (base - found)).sum(-1).mean().item()
    same = (found.argmax(-1) == base.argmax(-1)).float().mean().item()
    change = 100 * (math.exp(loss(found, windows) - loss(base, windows)) - 1)
    bits = scheme.bits_per_weight(kept / count)
    return f"| {scheme.name} | {bits:.2f} | {error / count:.1e} | {divergence:.1e} | {change:+.2f} % | {same:.3f} |"


@click.command(help=__doc__)
@click.argument("directory", metavar="MODEL", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = read_tokens(HELD_OUT)
    windows = torch.stack([tokens[i * 512 : i * 512 + 513] for i in range(0, 48, 4)])
    linear = {n: p.data.clone() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n}
    base = log_probabilities(model, windows)
    click.echo(
        "| scheme | bits | error/variance | KL divergence | Δ perplexity | same top-1 |\n|---|---|---|---|---|---|"
    )
    for scheme in schemes():
        click.echo(row(model, linear, windows, scheme, base))


if __name__ == "__main__":
    main()
