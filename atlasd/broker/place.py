"""Where the daemon lives: directories, locks against a second daemon, socket files."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import stat
import tempfile
from pathlib import Path

from atlas_client.paths import MAX_IPC_PATH, control_socket

_SUN_PATH = 107  # bytes of a socket path, without the NUL


class PlaceError(Exception):
    """The daemon can't live there. The message says why and what to do."""


class Place:
    """Locks and directories of one daemon, held until close(). Raises PlaceError.

    A plain ZeroMQ bind takes over the path of a daemon that lives; so the lock files come first.
    """

    def __init__(self, public: Path, state_dir: Path) -> None:
        self.socket = public
        self.control = control_socket(public)
        self.state_dir = state_dir
        if len(os.fsencode(public)) > MAX_IPC_PATH:
            raise PlaceError(f"socket path is longer than {MAX_IPC_PATH} bytes: {public}; choose another with --socket")
        _directory(public.parent, "--socket")
        _directory(state_dir, "--state-dir")
        self._locks = [_lock(public.with_name(public.name + ".lock"), f"socket {public}", "--socket")]
        try:
            self._locks.append(_lock(state_dir / "lock", f"state directory {state_dir}", "--state-dir"))
            for path in (self.socket, self.control):
                _clear(path)
            self.run_dir = _run_dir(public, state_dir)
        except PlaceError:
            self._unlock()
            raise

    def close(self) -> None:
        """Removes the socket files and lets go of the locks. The lock files stay: removing one would race."""
        for path in (self.socket, self.control):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.run_dir, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        for fd in self._locks:
            os.close(fd)


def _directory(path: Path, flag: str) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        raise PlaceError(f"{path} is no directory; give another with {flag}") from None
    except OSError as error:
        raise PlaceError(f"{path}: {error.strerror}; give another with {flag}") from None


def _lock(path: Path, what: str, flag: str) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise PlaceError(f"{path}: {error.strerror}; give another with {flag}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise PlaceError(
            f"{what} is held by another atlasd (pid {holder}); use that one, stop it, or give {flag}"
        ) from None
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    return fd


def _clear(path: Path) -> None:
    """Removes the socket file of a daemon that was killed; refuses to remove anything that is used or no socket."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise PlaceError(f"{path}: {error.strerror}") from None
    if not stat.S_ISSOCK(mode):
        raise PlaceError(f"{path} exists and is no socket; remove it or choose another path with --socket")
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(str(path)) not in (errno.ECONNREFUSED, errno.ENOENT):
            raise PlaceError(f"another program listens on {path}; choose another path with --socket")
    path.unlink(missing_ok=True)


def _run_dir(public: Path, state_dir: Path) -> Path:
    """An empty private directory for the sockets to the engine, short enough for a socket path."""
    for path in (public.with_name(public.name + ".d"), state_dir / "run"):
        if len(os.fsencode(path)) + 10 <= _SUN_PATH:
            shutil.rmtree(path, ignore_errors=True)
            _directory(path, "--socket")
            return path
    return Path(tempfile.mkdtemp(prefix="atlasd-"))
