"""What `top` draws: one frame as lines of rich text that fit a terminal of any size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.cells import set_cell_size
from rich.text import Text

from . import figures
from .output import clean, size
from .status import span, speed

if TYPE_CHECKING:
    from ..protocol import SessionInfo, StatusReply, TierUsage

PLACES = (*figures.TIERS, "nowhere")
BAR = 20  # cells, fewer on a narrow terminal
NUMBER = 9  # cells of a column of token counts


@dataclasses.dataclass(frozen=True)
class View:
    """What one frame is made of. `status` is None while no daemon answers; `trouble` says why."""

    status: StatusReply | None
    rates: Mapping[str, float | None]
    sessions: Sequence[SessionInfo]
    trouble: str = ""


def lines(view: View, width: int, height: int, *, ascii_only: bool = False, hint: str = "") -> list[Text]:
    """The frame, at most `height` lines of `width` cells. What has no room is left out: sessions first.
    `hint`: how to leave."""
    found = view.status
    if found is None:
        return _fitted([Text("no daemon", "bold red"), Text(clean(view.trouble)), Text("waiting for one", "dim")],
                       width, height)  # fmt: skip
    shown = [*_head(found, view.rates, width, hint), Text()]
    shown += [_tier(tier, found, view.rates, width, ascii_only) for tier in found.tiers]
    shown += _accounts(found, view.rates)
    troubles = [*figures.faults(found.counters), *(clean(warning) for warning in found.warnings[-2:])]
    room = height - len(shown) - 3  # a session at least before the troubles
    below = [Text(trouble, "yellow") for trouble in troubles[: max(0, min(3, room - 1))]]
    table = _sessions(view.sessions, width, room + 2 - len(below))
    return _fitted([*shown, Text(), *table, *below] if table else [*shown, *below], width, height)


def _fitted(shown: list[Text], width: int, height: int) -> list[Text]:
    for line in shown:
        line.no_wrap = True
        line.truncate(width)
    return shown[: max(1, height)]


def _head(found: StatusReply, rates: Mapping[str, float | None], width: int, hint: str) -> list[Text]:
    style = {"ready": "bold green", "failed": "bold red"}.get(found.engine_state, "bold yellow")
    model = f"  {clean(found.model.name)} on {found.model.device or '-'}" if found.model else "  no model"
    first = Text.assemble(f"atlasd {clean(found.version)}  ", (found.engine_state, style), model)
    first.append(f", up {span(found.uptime_s)}")
    if found.engine_restarts:
        first.append(f", engine restarted {found.engine_restarts} times", "yellow")
    if first.cell_len + 2 + len(hint) <= width:
        first.append(hint.rjust(width - first.cell_len) if hint else "", "dim")
    second = Text(f"running {found.running:,}  queued {found.queued:,}  sessions {found.sessions:,}")
    speeds = f"prefill {_per_s(rates.get('tokens_prefilled'))}  decode {_per_s(rates.get('tokens_generated'))} tokens/s"
    second = second.append(f"  {speeds}", "bold") if second.cell_len + 2 + len(speeds) <= width else second
    more = [] if speeds in second.plain else [Text(speeds, "bold")]
    error = [Text(clean(found.engine_error), "red")] if found.engine_error else []
    return [first, second, *more, *error]


def _per_s(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def _tier(tier: TierUsage, found: StatusReply, rates: Mapping[str, float | None], width: int, ascii_only: bool) -> Text:
    """Name, bar, use and limit; then the share found there and the speeds, as far as there is room."""
    cells = max(4, min(BAR, width - 72))
    share = figures.usage(tier)
    full = round(share * cells) or (1 if tier.bytes_used else 0)
    done, rest = ("#", ".") if ascii_only else ("█", "░")
    style = "red" if share > 0.95 else "green"
    line = Text.assemble(
        f"{figures.LABELS.get(tier.name, clean(tier.name)):<7}", (done * full, style), (rest * (cells - full), "dim"),
        f" {size(tier.bytes_used):>9}/{size(tier.limit_bytes):<9}",
    )  # fmt: skip
    shares = figures.found_shares(found.counters)
    parts = [f"  found {figures.percent(shares.get(tier.name)):>5}"]
    if tier.name != "device":
        read, written = (rates.get(f"{tier.name}_bytes_{way}") for way in ("read", "written"))
        parts.append(f"  r {speed(read)} w {speed(written)}")
    for part in parts:
        if line.cell_len + len(part) <= width:
            line.append(part)
    return line


def _accounts(found: StatusReply, rates: Mapping[str, float | None]) -> list[Text]:
    parts = []
    missed = figures.found_shares(found.counters)["missed"]
    if missed is not None:
        parts.append(f"missed {figures.percent(missed)} of prefix pages")
    if (today := found.counters.get("disk_bytes_written_today")) is not None:
        parts.append(f"written to disk today {size(today)}")
    for name in figures.STREAMS:
        if rates.get(name):
            parts.append(f"streamed from {figures.LABELS[name.split('_')[1]]} {speed(rates[name])}")
    return [Text(", ".join(parts))] if parts else []


def _sessions(sessions: Sequence[SessionInfo], width: int, height: int) -> list[Text]:
    """A header and a line for each session that has room; the columns that have none are left out."""
    if height < 2 or not sessions:
        return []
    columns = min(len(PLACES) + 1, max(1, (width - 10) // NUMBER))  # of numbers; 10 cells of name at least
    name = max(4, width - columns * NUMBER)
    heads = ["TOKENS", *(figures.LABELS[place].upper() for place in PLACES)][:columns]
    table = [Text("SESSION".ljust(name) + "".join(head.rjust(NUMBER) for head in heads), "bold")]
    for info in sessions[: height - 1]:
        counts = [f"{info.tokens:,}", *(_place(info, place) for place in PLACES)][:columns]
        label = set_cell_size(("* " if info.busy else "  ") + clean(info.name), name)
        row = label + "".join(count.rjust(NUMBER) for count in counts)
        table.append(Text(row, "green" if info.busy else ""))
    return table


def _place(info: SessionInfo, place: str) -> str:
    if figures.missing_places(info):
        return "?"
    return f"{info.where[place]:,}" if info.where.get(place) else ""
