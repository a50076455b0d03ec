"""What every scenario works in: a daemon that is hurt, one that never is, and the row that says how it went."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from atlas_client import Client, DaemonUnavailable
from atlas_client.protocol import Done, StatusReply
from conftest import Daemon
from families import DEMO

HEARTBEAT_S = 5.0
CLOSE_CALL = 1e-4  # two greedy candidates whose log-probabilities differ by less are the same choice in float32
# Few pages and small chunks: pages move between memory and disk all the time, prompts take several passes.
HURT = (
    "--threads", "1", "--max-context", "2048", "--prefill-chunk", "64", "--kv-vram-gb", "0.03", "--kv-disk-gb", "0.5",
    "--heartbeat-s", str(HEARTBEAT_S),
)  # fmt: skip
UNHURT = ("--threads", "1", "--max-context", "2048", "--kv-disk-path", "none")


@dataclasses.dataclass
class Row:
    """One scenario's result. `runs`: faults that happened. `wrong_tokens`: tokens that an undisturbed daemon would not
    have given. `lost_turns`: acknowledged turns that the log does not hold exactly. `undetected`: faults that nobody
    was told of (no answer, a turn run twice, pages unaccounted for). `crashes`: ends of a process by its own fault.
    Where no daemon is at work: pages with other bytes, pages lost that were durable and not touched."""

    scenario: str
    runs: int = 0
    wrong_tokens: int = 0
    lost_turns: int = 0
    undetected: int = 0
    crashes: int = 0

    @property
    def good(self) -> bool:
        return not (self.wrong_tokens or self.lost_turns or self.undetected or self.crashes)


@dataclasses.dataclass
class Turn:
    """One request of a session and what came of it."""

    session: str
    rid: str
    prompt: list[int]
    max_tokens: int
    temperature: float = 0.0
    tokens: list[int] | None = None  # as acknowledged by DONE(durable)
    begun: list[list[int]] = dataclasses.field(default_factory=list)  # what attempts streamed before they broke off

    def options(self) -> dict[str, Any]:
        """The same request each time it is sent."""
        return {
            "tokens": self.prompt, "max_tokens": self.max_tokens, "temperature": self.temperature,
            "seed": len(self.prompt), "ignore_eos": True,
        }  # fmt: skip


class World:
    """Made with `with`. `problems` and `notes` are for a person."""

    def __init__(self, root: Path) -> None:
        self.daemon = Daemon(root / "hurt", *HURT)
        self.reference = Daemon(root / "unhurt", *UNHURT)
        for daemon in (self.daemon, self.reference):
            daemon.root.mkdir()
        self.text = source()
        self.close_calls = 0
        self.problems: list[str] = []
        self.notes: list[str] = []

    def start(self) -> None:
        """Starts both daemons, if they have not been."""
        if self.daemon.process is not None:
            return
        self.daemon.start(ready=False)
        self.reference.start()
        self.daemon.wait_state("ready")

    def note(self, row: Row, kind: str, text: str) -> None:
        """Counts one violation and keeps its description."""
        setattr(row, kind, getattr(row, kind) + 1)
        self.problems.append(f"{row.scenario}: {kind}: {text}")

    # --- the daemon that is hurt ----------------------------------------------------------------------------

    @property
    def broker_pid(self) -> int:
        assert self.daemon.process is not None
        return self.daemon.process.pid

    @property
    def engine_pids(self) -> list[int]:
        """The broker's children, read without asking the broker: there is no time to lose."""
        found: list[int] = []
        for task in Path(f"/proc/{self.broker_pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, task.read_text().split())
        return found

    def kill(self, victim: str) -> None:
        """SIGKILL to "broker", "engine" or "both"."""
        engines = self.engine_pids if victim != "broker" else []
        for pid in [*engines, *([self.broker_pid] if victim != "engine" else [])]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def revive(self, *, ready: bool) -> None:
        """Starts the broker if it is dead; at once, whether or not its engine has gone yet."""

        def answers() -> StatusReply | None:
            assert self.daemon.process is not None
            if self.daemon.process.poll() is not None:
                self.daemon.start(ready=False)
            return self.status()

        until(answers, 30, "the broker answers")
        if ready:
            self.daemon.wait_state("ready")

    def status(self) -> StatusReply | None:
        """None: no broker answers."""
        with contextlib.suppress(DaemonUnavailable), Client(self.daemon.socket, reconnect=0.1) as client:
            return client.status()
        return None

    # --- judging ----------------------------------------------------------------------------------------------

    def judge(self, row: Row, client: Client, history: list[int], turn: Turn) -> None:
        """Compares an acknowledged turn with what the undisturbed daemon makes of the same tokens."""
        assert turn.tokens is not None
        for begun in turn.begun:
            if begun != turn.tokens[: len(begun)]:
                self.note(row, "wrong_tokens", f"{turn.rid} streamed {begun}, then answered {turn.tokens}")
        options = {**turn.options(), "tokens": history + turn.prompt}
        right: Done = client.generate(**options).result
        if right.tokens == turn.tokens:
            return
        shared = next(
            (n for n, (a, b) in enumerate(zip(right.tokens, turn.tokens, strict=False)) if a != b),
            min(len(right.tokens), len(turn.tokens)),
        )
        if turn.temperature == 0 and self._close_call(client, history + turn.prompt, right.tokens, turn.tokens, shared):
            self.close_calls += 1
            return
        wrong = max(len(right.tokens), len(turn.tokens)) - shared
        row.wrong_tokens += wrong - 1
        self.note(row, "wrong_tokens", f"{turn.rid} at {len(history)}: {turn.tokens}, undisturbed {right.tokens}")

    def _close_call(self, client: Client, prompt: list[int], right: list[int], found: list[int], at: int) -> bool:
        """Whether the first difference is between two candidates of equal likelihood."""
        if at >= min(len(right), len(found)):
            return False
        first = client.generate(tokens=prompt + right[:at], max_tokens=1, temperature=0, logprobs=5, ignore_eos=True)
        list(first)
        top = dict(first.logprobs[0].top)
        return abs(top.get(right[at], 0.0) - top.get(found[at], -1e9)) < CLOSE_CALL

    def check_accounts(self, row: Row) -> None:
        """After quiet, every page of every tier is free or sealed."""

        def settled() -> bool:
            status = self.status()
            tiers = status.tiers if status else []
            return bool(tiers) and all(tier.open == 0 and tier.free + tier.sealed == tier.total for tier in tiers)

        try:
            until(settled, 10, "quiet")
        except TimeoutError:
            status = self.status()
            self.note(row, "undetected", f"pages unaccounted for: {status.tiers if status else 'no daemon'}")

    @contextlib.contextmanager
    def watched(self, row: Row, *, hangs: bool = False) -> Iterator[None]:
        """Counts what the daemon's log says of crashes meanwhile. `hangs`: a hanging engine is part of the scenario."""
        start = self.daemon.log.stat().st_size if self.daemon.log.exists() else 0
        yield
        for line in self.daemon.log.read_text(errors="replace")[start:].splitlines():
            died = "engine died: " in line and "SIGKILL" not in line and not (hangs and "hung" in line)
            if died or "Traceback" in line or ("engine hangs" in line and not hangs):
                self.note(row, "crashes", line)


@contextlib.contextmanager
def world() -> Iterator[World]:
    """Both daemons, to be started; killed and removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="atlas-", ignore_cleanup_errors=True) as path:
        made = World(Path(path))
        try:
            yield made
        finally:
            for daemon in (made.daemon, made.reference):
                if daemon.process is not None and daemon.process.poll() is None:
                    daemon.kill()


def source(count: int = 60_000) -> list[int]:
    """Token ids of Python source text, from this machine's standard library."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids: list[int] = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if len(ids) >= count:
            break
        ids += tokenizer.encode(file.read_text(encoding="utf-8")).ids
    return ids[:count]


def until(condition: Callable[[], Any], limit: float, what: str) -> Any:
    """Polls until the condition holds and returns what it gave. Raises TimeoutError."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise TimeoutError(f"not within {limit:g} s: {what}")
