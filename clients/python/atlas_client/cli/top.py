"""`atlasctl top`: the loop, the keyboard and the terminal. What is drawn is `frame`'s."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from ..errors import AtlasError, DaemonUnavailable
from . import figures
from .context import app, common
from .output import emit, plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

    from ..client import Client
    from ..protocol import SessionInfo, StatusReply
    from .frame import View

ANSWER_S = 3.0  # for the daemon to answer, before it counts as gone
SESSIONS = 32  # asked for, with their places
LOOK_S = 0.2  # between looks at the terminal's size
BEAT_S = 1.5  # within which an engine reports its counts anew


@click.command()
@click.option(
    "--interval", type=click.FloatRange(min=0.1, max=3600), default=1.0, help="Seconds between two frames [1]."
)
@click.option("--once", is_flag=True, help="Print one frame and exit.")
@common
def top(interval: float, once: bool) -> None:
    """Watch the engine, the memory tiers and the sessions live; `q` or Ctrl-C leaves.

    A bar for each tier shows what is used of its limit, the share of prefix pages found there since the engine's start,
    and what is read (r) and written (w) now. Below come the sessions, those with a running turn (*) first, then the
    last used: their tokens, and in which tier these are.

    One frame is printed with --once, and when the output is no terminal; it covers one interval. With --json a frame is
    one JSON object: `status`, `derived`, `rates` per second, `sessions`; `error` instead while no daemon answers.
    """
    from ..client import Client

    once = once or not sys.stdout.isatty()
    with Client(app().path, timeout=ANSWER_S, reconnect=0.0) as client:
        sampler = Sampler(client)
        if once:
            _once(sampler, interval)
        elif app().json:
            _repeat(sampler, interval)
        else:
            _live(sampler, interval)


class Sampler:
    """Asks the daemon, and remembers what a rate or a place needs from before."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._status: StatusReply | None = None
        self._rates: dict[str, float | None] = figures.rates(None, None)
        self._where: dict[str, tuple[int, dict[str, int]]] = {}  # by session id: tokens, and where they were

    def sample(self) -> View:
        """What there is to see now. Raises AtlasError when the daemon does not answer."""
        from .frame import View

        now = self._client.status()
        before = self._status
        if before is None or figures.clock(now) != figures.clock(before) or now.boot != before.boot:
            self._rates, self._status = figures.rates(before, now), now
        return View(now, self._rates, self._placed(self._client.sessions(where=True, limit=SESSIONS)))

    @property
    def measured(self) -> bool:
        """Whether the engine's rates are known, or there is none to have them."""
        return self._status is None or not self._status.counters or any(r is not None for r in self._rates.values())

    def forget(self) -> None:
        """The daemon went away: what comes is another's."""
        self._status, self._rates = None, figures.rates(None, None)

    def _placed(self, sessions: list[SessionInfo]) -> list[SessionInfo]:
        """An engine in a long pass does not say where tokens are: then they are where they were."""
        for info in sessions:
            tokens, where = self._where.get(info.id, (-1, {}))
            info.where = info.where or (where if tokens == info.tokens else {})
        self._where = {info.id: (info.tokens, info.where) for info in sessions}
        return sessions


def _once(sampler: Sampler, interval: float) -> None:
    view = sampler.sample()
    end = time.monotonic() + interval + BEAT_S
    time.sleep(interval if not sampler.measured else 0.0)
    while not sampler.measured and time.monotonic() < end:
        view = sampler.sample()
        time.sleep(0.0 if sampler.measured else 0.1)
    _print(view, _console())


def _repeat(sampler: Sampler, interval: float) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            _print(_view(sampler), None)
            time.sleep(interval)


def _live(sampler: Sampler, interval: float) -> None:
    console = _console()
    with contextlib.suppress(KeyboardInterrupt), _keys() as keys:
        if console.is_dumb_terminal:
            while not _pause(keys, interval, console):
                _print(_view(sampler), console)
            return
        from rich.live import Live

        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                view = _view(sampler)
                end = time.monotonic() + interval
                while (left := end - time.monotonic()) > 0:
                    _draw(live, view)
                    if _pause(keys, left, console):
                        return


def _view(sampler: Sampler) -> View:
    """A sample, or why there is none. Raises DaemonUnavailable when access is denied: waiting would not help."""
    from .frame import View

    try:
        return sampler.sample()
    except DaemonUnavailable as error:
        if error.refused:
            raise
        sampler.forget()
        return View(None, {}, (), error.message)
    except AtlasError as error:
        return View(None, {}, (), str(error))


def _draw(live: Live, view: View) -> None:
    from rich.console import Group

    from .frame import lines

    width, height = live.console.size
    shown = lines(view, width, height, ascii_only=live.console.options.ascii_only, hint="q quits")
    live.update(Group(*shown), refresh=True)


def _print(view: View, console: Console | None) -> None:
    if app().json or console is None:
        emit(_plain(view))
        return
    from .frame import lines

    shown = lines(view, console.width, 10_000, ascii_only=console.options.ascii_only)
    console.print(*shown, sep="\n", highlight=False, soft_wrap=True)


def _plain(view: View) -> dict[str, Any]:
    if view.status is None:
        return {"error": {"code": "NO_DAEMON", "message": view.trouble, "retryable": True, "next_step": ""}}
    status = {"status": plain(view.status), "derived": figures.derived(view.status)}
    return {**status, "rates": dict(view.rates), "sessions": plain(list(view.sessions))}


def _console() -> Console:
    from rich.console import Console

    return Console(markup=False, emoji=False)


@contextlib.contextmanager
def _keys() -> Iterator[int | None]:
    """The terminal gives keys one by one, unseen, and is as before afterwards; also when the process is terminated.
    None: there is no keyboard."""
    if not sys.stdin.isatty():
        yield None
        return
    import termios
    import tty

    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    ended = signal.signal(signal.SIGTERM, _interrupt)
    try:
        tty.setcbreak(keyboard)
        mode = termios.tcgetattr(keyboard)
        mode[6][termios.VSUSP] = b"\0"  # Ctrl-Z would leave the shell on the other screen
        termios.tcsetattr(keyboard, termios.TCSANOW, mode)
        yield keyboard
    finally:
        termios.tcsetattr(keyboard, termios.TCSAFLUSH, before)
        signal.signal(signal.SIGTERM, ended)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _pause(keys: int | None, seconds: float, console: Console) -> bool:
    """Waits that long, less when the terminal's size changes. True: the user wants to leave."""
    end = time.monotonic() + seconds
    shape = console.size
    while (left := end - time.monotonic()) > 0 and console.size == shape:
        if keys is None:
            time.sleep(min(left, LOOK_S))
        elif select.select([keys], [], [], min(left, LOOK_S))[0]:
            typed = os.read(keys, 64)
            if not typed or typed in (b"q", b"Q", b"\x03", b"\x04"):  # nothing: the terminal is gone
                return True
    return False
