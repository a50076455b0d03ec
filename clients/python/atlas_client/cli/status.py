"""`atlasctl status`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from . import figures
from .context import app, common
from .model import describe
from .output import clean, emit, plain, size, table

if TYPE_CHECKING:
    from ..protocol import StatusReply


@click.command()
@common
def status() -> None:
    """Show the daemon, its engine and model, and the memory that conversations take.

    The first table has a line for each tier of KV pages: bytes used and their limit; pages in use, those that a running
    turn appends to, and how many there are room for; FOUND is the share of the prefix pages that requests came with and
    that were in that tier, MISSED the share that had to be computed. The second says what was moved to and from a tier
    since the engine started, and how fast while it moved. "-" is what this engine does not report.

    `--json` has every count (`counters`) and the figures made of them (`derived`).
    """
    with app().client() as client:
        found = client.status()
    if app().json:
        emit({**plain(found), "derived": figures.derived(found)})
    else:
        _show(found)


def _show(found: StatusReply) -> None:
    print(f"daemon   {found.version}, pid {found.pid}, up {span(found.uptime_s)}, {size(found.rss_bytes)} resident")
    print(clean(f"socket   {found.socket}"))
    print(clean(f"state    {found.state_dir}"))
    print(f"sessions {found.sessions:,}, running {found.running:,}, queued {found.queued:,}")
    print(f"engine   {engine(found)}")
    if found.model:
        print(f"model    {describe(found.model)}")
    if found.tiers:
        print(f"tokens   {_count(found, 'tokens_prefilled')} read, {_count(found, 'tokens_generated')} generated")
        _tiers(found)
        _moves(found)
    for fault in figures.faults(found.counters):
        print(f"fault: {fault}")
    for warning in found.warnings:
        print(clean(f"warning: {warning}"))


def _tiers(found: StatusReply) -> None:
    shares = figures.found_shares(found.counters)
    rows: list[tuple[object, ...]] = [
        (
            figures.LABELS.get(t.name, t.name), size(t.bytes_used), size(t.limit_bytes), t.sealed, t.open, t.total,
            figures.percent(shares.get(t.name)),
        )
        for t in found.tiers
    ]  # fmt: skip
    print()
    table(("TIER", "USED", "LIMIT", "PAGES", "OPEN", "ROOM", "FOUND"), rows)
    print(f"missed {figures.percent(shares['missed'])} of the prefix pages that requests came with")


def _moves(found: StatusReply) -> None:
    rows = []
    for tier in (tier.name for tier in found.tiers if tier.name != "device"):
        cells = [figures.LABELS.get(tier, tier)]
        for way in ("read", "written"):
            moved = found.counters.get(f"{tier}_bytes_{way}")
            cells += ["-" if moved is None else size(moved), speed(figures.bandwidth(found.counters, tier, way))]
        rows.append(cells)
    if rows:
        print()
        table(("MOVED", "READ", "AT", "WRITTEN", "AT"), rows)
    streamed = [
        f"{size(found.counters[name])} from {figures.LABELS[name.split('_')[1]]}"
        for name in figures.STREAMS if found.counters.get(name)
    ]  # fmt: skip
    if streamed:
        print(f"streamed into attention: {', '.join(streamed)}")
    today = found.counters.get("disk_bytes_written_today")
    if today is not None:
        print(f"written to disk today (UTC): {size(today)}")


def _count(found: StatusReply, name: str) -> str:
    return f"{found.counters[name]:,}" if name in found.counters else "-"


def speed(bytes_per_s: float | None) -> str:
    """Bytes per second for a person."""
    return "-" if bytes_per_s is None else f"{size(int(bytes_per_s))}/s"


def engine(found: StatusReply) -> str:
    """The engine's state in one line."""
    line = found.engine_state
    if found.engine_pid:
        line += f", pid {found.engine_pid}, {size(found.engine_rss_bytes)} resident"
    if found.engine_restarts:
        line += f", restarted {found.engine_restarts} times"
    return clean(line + (f": {found.engine_error}" if found.engine_error else ""))


def span(seconds: float) -> str:
    """A duration for a person."""
    minutes, hours = int(seconds // 60) % 60, int(seconds // 3600)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {int(seconds) % 60:02} s"
