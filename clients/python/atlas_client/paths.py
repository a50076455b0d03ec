"""Where the daemon's socket and state lie, for daemon and clients alike."""

from __future__ import annotations

import os
from pathlib import Path

SOCKET_ENV = "ATLAS_SOCKET"
HOME_ENV = "ATLAS_HOME"
MAX_IPC_PATH = 103  # sun_path holds 108 bytes; ".ctl" is appended and a NUL ends it


def default_socket() -> Path:
    """$ATLAS_SOCKET, else the user's runtime directory, else the system's, else a private one in /tmp."""
    if given := os.environ.get(SOCKET_ENV):
        return Path(given)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "atlasd" / "atlasd.sock"
    system = Path("/run/atlasd")
    if os.access(system, os.W_OK | os.X_OK) or (system / "atlasd.sock").exists():
        return system / "atlasd.sock"
    return Path(f"/tmp/atlasd-{os.getuid()}") / "atlasd.sock"


def default_state_dir() -> Path:
    """$ATLAS_HOME, else $XDG_STATE_HOME/atlasd, else ~/.local/state/atlasd."""
    if given := os.environ.get(HOME_ENV):
        return Path(given)
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "atlasd"


def control_socket(socket: Path) -> Path:
    """The control socket that belongs to a work socket (cancel, ping)."""
    return socket.with_name(socket.name + ".ctl")


def endpoint(socket: Path) -> str:
    """The ZeroMQ endpoint of a socket path."""
    return f"ipc://{socket}"
