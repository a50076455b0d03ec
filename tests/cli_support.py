"""Running `atlasctl`: as a process, and at a terminal of its own."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ATLASCTL = [sys.executable, "-P", "-c", "from atlas_client.cli.main import main; main()"]
LIMIT_S = 60.0


def atlasctl(
    *arguments: str, socket: Path, stdin: bytes | None = None, home: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Runs a command to its end; standard input is empty unless given."""
    given = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    environment = _environment(socket, home)
    return subprocess.run([*ATLASCTL, *arguments], capture_output=True, env=environment, timeout=LIMIT_S, **given)  # type: ignore[call-overload, no-any-return]


def answer(*arguments: str, socket: Path, stdin: bytes | None = None) -> Any:
    """The JSON object a command prints; fails unless it exits with 0."""
    ended = atlasctl("--json", *arguments, socket=socket, stdin=stdin)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(ended.stdout)


def _environment(socket: Path, home: Path | None) -> dict[str, str]:
    return {
        **os.environ,
        "ATLAS_SOCKET": str(socket),
        "ATLAS_HOME": str(home or socket.parent / "home"),
        "TERM": "xterm",
    }


class Terminal:
    """`atlasctl` at a terminal: type keys, wait for what appears."""

    def __init__(self, *arguments: str, socket: Path, environment: dict[str, str] | None = None) -> None:
        self.seen = b""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execvpe(ATLASCTL[0], [*ATLASCTL, *arguments], _environment(socket, None) | (environment or {}))

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def interrupt(self, pattern: str) -> None:
        """Ctrl-C at the prompt, then waits. Between its check for signals and its wait for a key, Python's readline
        would leave a signal for the next key: a space is that key."""
        self.type("\x03")
        try:
            self.wait(pattern, 3.0)
        except AssertionError:
            self.type(" ")
            self.wait(pattern)

    def wait(self, pattern: str, limit: float = LIMIT_S) -> str:
        """Returns everything up to the pattern's end, and forgets it. Fails with what was seen."""
        end = time.monotonic() + limit
        while not (found := re.search(pattern.encode(), self.seen)):
            if time.monotonic() > end or not self._read(end - time.monotonic()):
                raise AssertionError(f"{pattern!r} did not appear in {self.seen!r}")
        shown, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return shown.decode("utf-8", "replace")

    def end(self, limit: float = LIMIT_S) -> int:
        """The exit code, when it ends by itself."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            if not self._read(0.05):
                return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"it did not end: {self.seen!r}")

    def _read(self, wait: float) -> bool:
        """Takes what is there; False at the end."""
        if not select.select([self._fd], [], [], max(0.0, min(wait, 0.5)))[0]:
            return True
        try:
            got = os.read(self._fd, 65536)
        except OSError:  # EIO: the other side has closed
            return False
        self.seen += got
        return bool(got)


def started(arguments: Sequence[str], socket: Path) -> subprocess.Popen[bytes]:
    """A command that runs, its output in pipes."""
    return subprocess.Popen(
        [*ATLASCTL, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=_environment(socket, None),
    )  # fmt: skip
