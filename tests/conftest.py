"""Fixtures over real daemons: each test gets processes, sockets and directories of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

START_LIMIT_S = 90.0
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # for torch in the tests' own process, as the engine does


class Daemon:
    """A real `atlasd` with a socket and a state directory of its own; can be killed and started again on them."""

    def __init__(self, root: Path, *flags: str, model: str = "demo") -> None:
        self.root = root
        self.socket = root / "s"
        self.state = root / "state"
        self.log = root / "log"
        self.flags = ["--model", model, "--kv-ram-gb", "0.5", *flags]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, ready: bool = True, extra: tuple[str, ...] = ()) -> Daemon:
        """Starts it; with `ready`, returns when the model is loaded. Fails with the log's end when it dies."""
        command = [sys.executable, "-m", "atlasd", "--socket", str(self.socket), "--state-dir", str(self.state)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*command, *self.flags, *extra], stderr=log, stdout=log)
        if ready:
            self.wait_state("ready")
        return self

    def wait_state(self, *states: str, limit: float = START_LIMIT_S) -> str:
        """Waits until the engine is in one of `states`; returns it."""
        from atlas_client import Client, DaemonUnavailable

        deadline = time.monotonic() + limit
        state = "no answer"
        while time.monotonic() < deadline:
            if self.process is not None and self.process.poll() is not None:
                break
            try:
                with Client(self.socket) as client:
                    state = client.status().engine_state
                    if state in states or state == "failed":
                        break
            except DaemonUnavailable:
                pass
            time.sleep(0.05)
        if state not in states:
            pytest.fail(f"engine is {state!r}, not {states}:\n{self.log.read_text()[-3000:]}")
        return state

    @property
    def engine_pid(self) -> int:
        from atlas_client import Client

        with Client(self.socket) as client:
            return client.status().engine_pid

    def kill(self) -> None:
        """SIGKILL to the engine and the broker at once, as a power switch would."""
        assert self.process is not None
        engine = _children(self.process.pid)
        for pid in [*engine, self.process.pid]:
            _kill(pid)
        self.process.wait(10)
        _gone(engine)

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self.process is not None
        self.process.terminate()
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"atlasd did not stop:\n{self.log.read_text()[-3000:]}")


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in task.read_text().split()]
    return found


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _gone(pids: list[int], limit: float = 10.0) -> None:
    deadline = time.monotonic() + limit
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.fixture
def root() -> Iterator[Path]:
    """A short temporary directory: socket paths are limited to 103 bytes."""
    path = Path(tempfile.mkdtemp(prefix="atlas-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def daemon(root: Path) -> Iterator[Daemon]:
    """A daemon on the bundled model, not started."""
    daemon = Daemon(root)
    yield daemon
    if daemon.process is not None and daemon.process.poll() is None:
        daemon.kill()


@pytest.fixture(scope="session")
def shared_daemon() -> Iterator[Daemon]:
    """One running daemon on the bundled model for tests that leave it as they found it."""
    path = Path(tempfile.mkdtemp(prefix="atlas-"))
    daemon = Daemon(path, "--max-context", "3000", "--prefill-chunk", "256")
    daemon.start()
    yield daemon
    daemon.kill()
    shutil.rmtree(path, ignore_errors=True)
