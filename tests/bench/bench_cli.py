"""How long `atlasctl --help` and `--version` take as processes, against a bare interpreter in the same run."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from report import row

ROUNDS = 20
BAR_MS = 150.0


def main() -> None:
    script = str(Path(sys.executable).with_name("atlasctl"))
    commands = {"bare": [sys.executable, "-c", "pass"], "help": [script, "--help"], "version": [script, "--version"]}
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(ROUNDS):
        for name, command in commands.items():
            taken[name].append(elapsed_ms(command))
    bare, helped, version = (statistics.median(taken[name]) for name in ("bare", "help", "version"))
    against = f"a bare interpreter: {bare:.0f} ms"
    row("cli", "atlasctl --help, median", helped, "ms", against=against, bar=BAR_MS)
    row("cli", "atlasctl --version, median", version, "ms", against=against)


def elapsed_ms(command: list[str]) -> float:
    """Milliseconds of one run. Raises CalledProcessError when it fails."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - start) * 1000


if __name__ == "__main__":
    main()
