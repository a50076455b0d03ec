"""Options that several commands have: the sampling flags of `generate` and `chat`, a model's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def _bias(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> dict[int, float]:
    """ID=VALUE pairs as a dictionary. Raises click.BadParameter."""
    bias: dict[int, float] = {}
    for pair in given:
        token, _, value = pair.partition("=")
        try:
            bias[int(token)] = float(value)
        except ValueError:
            raise click.BadParameter(f"{pair!r} is not TOKEN_ID=VALUE") from None
    return bias


def model_name(ctx: click.Context, param: click.Parameter, given: str | None) -> str | None:
    """A model's name as the daemon, in its own directory, understands it: a directory here gets its whole path."""
    if given and given != "demo" and Path(given).expanduser().is_dir():
        return str(Path(given).expanduser().absolute())
    return given


_OPTIONS = [
    click.option("-n", "--max-tokens", type=click.IntRange(min=0), help="Most tokens to generate [256]."),
    click.option("--temperature", type=click.FloatRange(0, 100), help="0: always the likeliest token."),
    click.option("--top-k", type=click.IntRange(min=0), help="Draw from the k likeliest tokens; 0: all."),
    click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Draw from this share of probability."),
    click.option("--min-p", type=click.FloatRange(0, 1), help="Least probability relative to the likeliest token."),
    click.option("--repetition-penalty", type=click.FloatRange(min=0, min_open=True), help="1: none."),
    click.option("--presence-penalty", type=click.FloatRange(-10, 10), default=0.0, help="For tokens seen at all."),
    click.option("--frequency-penalty", type=click.FloatRange(-10, 10), default=0.0, help="For each time seen."),
    click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Same seed, same answer; drawn when not given."),
    click.option(
        "--stop", multiple=True, callback=lambda c, p, given: list(given), help="End before this text; may be repeated."
    ),
    click.option("--logit-bias", multiple=True, callback=_bias, metavar="ID=VALUE", help="Added to a token's logit."),
    click.option("--logprobs", type=click.IntRange(min=0), help="Report this many likeliest tokens each (--json)."),
    click.option("--ignore-eos", is_flag=True, help="Go on after the model's end-of-text token."),
]


def sampling(command: F) -> F:
    """Adds a flag for every field of protocol.Sampling, named as Client.generate names them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
