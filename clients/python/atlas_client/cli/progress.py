"""Progress bars on standard error, on a terminal only and only for what takes long."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from ..protocol import Progress

DELAY_S = 0.3  # shorter work needs no bar
LABELS = {
    "queue": "waiting",
    "download": "downloading",
    "load": "loading",
    "quantize": "quantizing",
    "restore": "restoring",
    "prefill": "reading the prompt",
}


class Bars:
    """Shows Progress messages. `clear` removes the bar; anything may be printed then."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._since: float | None = None
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._phase = ""

    def show(self, progress: Progress) -> None:
        """Starts or moves the bar."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if not self._shown or now - self._since < DELAY_S:
            return
        if self._bar is None:
            self._bar = _bar(progress.unit)
            self._bar.start()
        if self._task is None or progress.phase != self._phase:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._phase = progress.phase
            self._task = self._bar.add_task(LABELS.get(progress.phase, progress.phase), total=progress.total or None)
        self._bar.update(self._task, completed=progress.done, total=progress.total or None)

    def clear(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = self._since = None


def _bar(unit: str) -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
