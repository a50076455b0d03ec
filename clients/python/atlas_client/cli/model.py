"""`atlasctl model`: which model the daemon holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .context import Group, app, common
from .options import model_name
from .output import clean, emit, size, table

if TYPE_CHECKING:
    from ..protocol import ModelInfo


@click.group(cls=Group)
@common
def model() -> None:
    """List, load and unload models."""


@model.command("list")
@common
def list_() -> None:
    """List the models the daemon knows."""
    with app().client() as client:
        found = client.models()
    if app().json:
        emit({"models": found})
        return
    rows = [(i.name, i.state, i.architecture, i.quantization, size(i.weight_bytes), i.max_context) for i in found]
    table(("NAME", "STATE", "ARCHITECTURE", "WEIGHTS", "SIZE", "CONTEXT"), rows)


@model.command()
@click.argument("name", callback=model_name)
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@common
def load(name: str, revision: str | None) -> None:
    """Load NAME (a directory, a hub id or `demo`) in place of the present model."""
    from .progress import Bars

    bars = Bars()
    with app().client() as client:
        try:
            loaded = client.load_model(name, revision, on_progress=bars.show)
        finally:
            bars.clear()
    if app().json:
        emit(loaded)
    else:
        print(describe(loaded))


@model.command()
@common
def unload() -> None:
    """Stop the engine and free its memory; sessions stay."""
    with app().client() as client:
        client.unload_model()
    if app().json:
        emit({"unloaded": True})
    else:
        print("unloaded")


def describe(info: ModelInfo) -> str:
    """One model in one line."""
    line = f"{info.name}: {info.state}"
    if info.architecture:
        line += f", {info.architecture} on {info.device} in {info.dtype}"
        line += f", {info.layers_quantized} layers as {info.quantization or 'none'}, {info.layers_kept} kept"
        line += f", {size(info.weight_bytes)}, context {info.max_context:,}"
    return clean(line + (f": {info.error}" if info.error else ""))
