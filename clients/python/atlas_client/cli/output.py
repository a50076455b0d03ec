"""Printing: JSON objects, tables, and text that can't drive the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import IO, Any

# Control characters but newline and tab: ESC and the C1 range start terminal commands, CR and BS rewrite what was said.
_CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


def clean(text: str) -> str:
    """Without control characters other than newline and tab; halves of surrogate pairs are written as escapes."""
    return text.translate(_CONTROL).encode("utf-8", "backslashreplace").decode("utf-8")


def emit(value: Any) -> None:
    """Prints one JSON object (protocol structs too, with all their fields) on standard output."""
    text = json.dumps(plain(value), ensure_ascii=not (sys.stdout.encoding or "").lower().startswith("utf"))
    print(clean_json(text), flush=True)


def clean_json(text: str) -> str:
    """JSON with what UTF-8 can't carry (half surrogate pairs) escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def plain(value: Any) -> Any:
    """Structs as dictionaries, recursively, with every field."""
    if hasattr(value, "__struct_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


class Writer:
    """Text to standard output as it comes: cleaned on a terminal, untouched in a pipe."""

    def __init__(self, out: IO[str] | None = None) -> None:
        self._out = out or sys.stdout
        self.terminal = self._out.isatty()
        self._last = "\n"

    def write(self, text: str) -> None:
        shown = clean(text) if self.terminal else text
        if shown:
            self._last = shown[-1]
            self._out.write(shown)
            self._out.flush()

    def end_line(self) -> None:
        """On a terminal: starts a new line unless at one."""
        if self.terminal and self._last != "\n":
            self.write("\n")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Left-aligned columns, numbers right-aligned."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    print("  ".join(name.ljust(width) for name, width in zip(header, widths, strict=True)).rstrip())
    for row, shown in zip(rows, cells, strict=True):
        aligned = [
            text.rjust(width) if isinstance(value, int | float) else text.ljust(width)
            for value, text, width in zip(row, shown, widths, strict=True)
        ]
        print("  ".join(aligned).rstrip())


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else clean(str(value)).replace("\n", " ")


def size(count: int) -> str:
    """Bytes for a person: 1.5 GiB."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << power:
            return f"{count / (1 << power):.1f} {unit}"
    return f"{count} B"


def moment(seconds: float) -> str:
    """Unix seconds as local time."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
