"""Following a generation on the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import ErrorCode, ErrorReply
from .progress import Bars

if TYPE_CHECKING:
    from ..client import Generation
    from ..protocol import Done

CANCEL_S = 5.0


def follow(generation: Generation, write: Callable[[str], None]) -> Done:
    """Writes the text as it comes, bars before it. Ctrl-C or a closed pipe cancels the turn, waits for its end, and is
    raised again. Raises ErrorReply, DaemonUnavailable, KeyboardInterrupt, BrokenPipeError."""
    from ..protocol import Progress, Tokens

    bars = Bars()
    try:
        for event in generation:
            if isinstance(event, Progress):
                bars.show(event)
            elif isinstance(event, Tokens):
                bars.clear()
                write(event.text)
    except (KeyboardInterrupt, BrokenPipeError):
        bars.clear()
        cancelled(generation)
        raise
    finally:
        bars.clear()
    return generation.result


def cancelled(generation: Generation) -> None:
    """Cancels a turn and waits until the daemon has ended it."""
    end = time.monotonic() + CANCEL_S
    while not generation.finished and time.monotonic() < end:
        generation.close()
    try:
        for _ in generation:
            pass
    except ErrorReply as error:
        if error.code != ErrorCode.CANCELLED:
            print(f"atlasctl: {error}", file=sys.stderr)


def usage_line(done: Done) -> str:
    """Tokens and times of a turn in one line."""
    used, times = done.usage, done.timings
    parts = [(used.restored, "restored"), (used.reused, "in memory"), (used.prefilled, "computed")]
    how = " + ".join(f"{count:,} {name}" for count, name in parts if count)
    line = f"{used.generated:,} tokens ({done.finish_reason}), prompt {used.prompt:,}"
    line += f" = {how}" if how else ""
    line += f", first token {times.ttft_ms:,.0f} ms, {times.decode_tokens_per_s:,.1f} tokens/s"
    if done.reset_reason:
        line += f", reuse stopped: {done.reset_reason}"
    if done.session and not done.durable:
        line += ", NOT durable"
    return f"[{line}]"
