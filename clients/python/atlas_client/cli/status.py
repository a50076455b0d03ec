"""`atlasctl status`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .context import app, common
from .model import describe
from .output import clean, emit, size, table

if TYPE_CHECKING:
    from ..protocol import StatusReply


@click.command()
@common
def status() -> None:
    """Show the daemon, its engine, model and memory."""
    with app().client() as client:
        found = client.status()
    if app().json:
        emit(found)
    else:
        _show(found)


def _show(found: StatusReply) -> None:
    print(f"daemon   {found.version}, pid {found.pid}, up {_span(found.uptime_s)}, {size(found.rss_bytes)} resident")
    print(clean(f"socket   {found.socket}"))
    print(clean(f"state    {found.state_dir}"))
    print(f"sessions {found.sessions:,}, running {found.running:,}, queued {found.queued:,}")
    print(f"engine   {engine(found)}")
    if found.model:
        print(f"model    {describe(found.model)}")
    if found.tiers:
        rows = [
            (t.name, size(t.bytes_used), size(t.limit_bytes), t.sealed, t.open, t.free, t.total) for t in found.tiers
        ]
        table(("TIER", "USED", "LIMIT", "SEALED", "OPEN", "FREE", "PAGES"), rows)
    for warning in found.warnings:
        print(clean(f"warning: {warning}"))


def engine(found: StatusReply) -> str:
    """The engine's state in one line."""
    line = found.engine_state
    if found.engine_pid:
        line += f", pid {found.engine_pid}, {size(found.engine_rss_bytes)} resident"
    if found.engine_restarts:
        line += f", restarted {found.engine_restarts} times"
    return clean(line + (f": {found.engine_error}" if found.engine_error else ""))


def _span(seconds: float) -> str:
    minutes, hours = int(seconds // 60) % 60, int(seconds // 3600)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {int(seconds) % 60:02} s"
