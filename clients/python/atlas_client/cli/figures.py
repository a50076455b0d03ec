"""What the daemon's counts mean: shares, bandwidths and faults, for `status` and `top`. Pure.

A count that the daemon does not report gives None, and is shown as "-": an older engine, or a tier that is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..protocol import SessionInfo, StatusReply, TierUsage

Counters = Mapping[str, int]
TIERS = ("device", "host", "disk")
LABELS = {"device": "device", "host": "RAM", "disk": "disk", "nowhere": "nowhere"}
FOUND = {"device": "device_hit_pages", "host": "host_hit_pages", "disk": "disk_hit_pages", "missed": "miss_pages"}
RATES = ("tokens_prefilled", "tokens_generated")
MOVES = tuple(f"{tier}_bytes_{way}" for tier in ("host", "disk") for way in ("read", "written"))
STREAMS = ("streamed_host_bytes", "streamed_disk_bytes")

_FAULTS = (  # counter, one, many; {} is the count
    ("disk_pages_damaged", "a page on disk was damaged", "{} pages on disk were damaged", "dropped, computed again"),
    ("host_pages_damaged", "a page in RAM was damaged", "{} pages in RAM were damaged", "dropped, computed again"),
    ("disk_write_errors", "a write to disk failed", "{} writes to disk failed", "tried again later"),
    (
        "disk_writes_dropped", "a page was not stored on disk", "{} pages were not stored on disk",
        "no room, or the disk refused",
    ),
)  # fmt: skip


def found_shares(counters: Counters) -> dict[str, float | None]:
    """Of the prefix pages that requests came with, the share found in each tier, and "missed". None: none came yet."""
    known = {place: counters.get(name) for place, name in FOUND.items()}
    total = sum(count for count in known.values() if count is not None)
    return {place: None if count is None or not total else count / total for place, count in known.items()}


def bandwidth(counters: Counters, tier: str, way: str) -> float | None:
    """Mean bytes per second of a tier while it was reading ("read") or writing ("written"); None: it never did."""
    moved = counters.get(f"{tier}_bytes_{way}")
    spent = counters.get(f"{tier}_{'read' if way == 'read' else 'write'}_us")
    return 1e6 * moved / spent if moved is not None and spent else None


def faults(counters: Counters) -> list[str]:
    """What went wrong with pages since the engine's start, as sentences for a person."""
    lines = []
    for name, one, many, then in _FAULTS:
        if count := counters.get(name, 0):
            lines.append(f"{one if count == 1 else many.format(f'{count:,}')} ({then})")
    return lines


def of_tier(counters: Counters, tier: str) -> dict[str, float | None]:
    """A tier's derived figures, as `--json` has them."""
    return {
        "found": found_shares(counters)[tier],
        "read_bytes_per_s": bandwidth(counters, tier, "read"),
        "write_bytes_per_s": bandwidth(counters, tier, "written"),
    }


def derived(found: StatusReply) -> dict[str, Any]:
    """All derived figures of a status: by tier, the share that was missed, and the faults."""
    counters = found.counters
    return {
        "tiers": {tier.name: of_tier(counters, tier.name) for tier in found.tiers if tier.name in TIERS},
        "missed": found_shares(counters)["missed"],
        "disk_bytes_written_today": counters.get("disk_bytes_written_today"),
        "faults": faults(counters),
    }


def rates(before: StatusReply | None, now: StatusReply | None) -> dict[str, float | None]:
    """Counts per second between two statuses of one engine; None when they can't be compared."""
    names = (*RATES, *MOVES, *STREAMS)
    if before is None or now is None or (before.boot, before.engine_pid) != (now.boot, now.engine_pid):
        return dict.fromkeys(names)
    span = clock(now) - clock(before)
    return {name: _rate(before.counters, now.counters, name, span) for name in names}


def clock(found: StatusReply) -> float:
    """Seconds at which a status' counts were read."""
    return found.counters_at or found.uptime_s


def _rate(before: Counters, now: Counters, name: str, span: float) -> float | None:
    if name not in now or span <= 0:
        return None
    change = now[name] - before.get(name, 0)  # a name appears with its first count
    return change / span if change >= 0 else None


def usage(tier: TierUsage) -> float:
    """Share of a tier that is used, 0 to 1."""
    return min(1.0, tier.bytes_used / tier.limit_bytes) if tier.limit_bytes else 0.0


def missing_places(info: SessionInfo) -> bool:
    """Whether the daemon does not say where the session's tokens are."""
    return bool(info.tokens) and not info.where


def percent(share: float | None) -> str:
    """A share for a person; no small one is shown as none, nor a large one as all."""
    if share is None:
        return "-"
    if 0 < share < 0.01:
        return "<1 %"
    return ">99 %" if 0.99 < share < 1 else f"{100 * share:.0f} %"
