"""Runs the benchmarks one after the other and ends with one table; exit status 1 when a bar is not met.

python tests/bench/run.py [NAME]
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE.parent.parent / "build" / "bench"


def names() -> list[str]:
    """The benchmarks there are."""
    return sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def main() -> int:
    wanted = sys.argv[1:] or names()
    if unknown := [name for name in wanted if name not in names()]:
        print(f"no benchmark {unknown[0]!r}; there are {', '.join(names())}", file=sys.stderr)
        return 2
    failed = []
    for name in wanted:
        (RESULTS / f"{name}.json").unlink(missing_ok=True)
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, str(HERE / f"bench_{name}.py")]).returncode:
            failed.append(name)
    rows = [entry for name in wanted for entry in _rows(name)]
    _table(rows)
    missed = [entry["name"] for entry in rows if entry["met"] is False]
    for name in failed:
        print(f"benchmark {name} did not finish")
    print(f"bars not met: {', '.join(missed)}" if missed else "every bar is met")
    return 1 if missed or failed else 0


def _rows(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _table(rows: list[dict[str, Any]]) -> None:
    width = max((len(entry["name"]) for entry in rows), default=4)
    for entry in rows:
        bar = "" if entry["bar"] is None else f"bar {entry['bar']:.3g} {'met' if entry['met'] else 'NOT MET'}"
        ratio = "" if entry["ratio"] is None else f"ratio {entry['ratio']:.3g}"
        print(
            f"{entry['name']:{width}}  {entry['value']:10.4g} {entry['unit']:9} {ratio:14} {bar:18} {entry['against']}"
        )


if __name__ == "__main__":
    sys.exit(main())
