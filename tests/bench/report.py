"""Rows of benchmark results: one JSON file for each benchmark, one printed line for each row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent.parent / "build" / "bench"


def row(
    bench: str,
    name: str,
    value: float,
    unit: str,
    *,
    against: str = "",
    ratio: float | None = None,
    bar: float | None = None,
    higher_is_better: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Appends a row to build/bench/BENCH.json, prints it and returns it.

    `against` says what limit or peer the value is set against and what that was in the same run; `ratio` is value to
    peer. The bar is for the ratio where there is one, else for the value. `met` is None without a bar.
    """
    judged = value if ratio is None else ratio
    met = None if bar is None else judged >= bar if higher_is_better else judged <= bar
    entry = {
        "name": name, "value": value, "unit": unit, "against": against, "ratio": ratio, "bar": bar, "met": met,
        "command": command or f"make bench ONLY={bench}",
    }  # fmt: skip
    path = RESULTS / f"{bench}.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*rows, entry], indent=1) + "\n", encoding="utf-8")
    print(_line(entry), flush=True)
    return entry


def _line(entry: dict[str, Any]) -> str:
    parts = [f"{entry['name']}: {entry['value']:.4g} {entry['unit']}"]
    if entry["ratio"] is not None:
        parts.append(f"ratio {entry['ratio']:.3g}")
    if entry["against"]:
        parts.append(f"against {entry['against']}")
    if entry["bar"] is not None:
        parts.append(f"bar {entry['bar']:.3g} {'met' if entry['met'] else 'NOT MET'}")
    return ", ".join(parts)
