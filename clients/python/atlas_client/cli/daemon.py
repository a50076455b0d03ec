"""`atlasctl up` and `down`: a daemon of one's own, without systemd."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import DaemonUnavailable, ErrorCode, ErrorReply
from ..paths import default_state_dir
from .context import app, common
from .options import model_name
from .output import clean, emit
from .status import engine

if TYPE_CHECKING:
    from ..client import Client
    from ..protocol import StatusReply

POLL_S = 0.1
LOG_LINES = 15


@click.command(context_settings={"ignore_unknown_options": False})
@click.option("--model", callback=model_name, help="Model directory, hub id, or `demo`.")
@click.option("--state-dir", type=click.Path(path_type=Path), help="Directory of sessions and pages [ATLAS_HOME].")
@click.option("--wait/--no-wait", default=True, help="Wait for the model, or only for the daemon's answer.")
@click.option("--timeout", type=click.FloatRange(min=0), default=600.0, help="Seconds to wait [600].")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
@common
def up(model: str | None, state_dir: Path | None, wait: bool, timeout: float, flags: tuple[str, ...]) -> None:
    """Start a daemon in the background; FLAGS after `--` are given to atlasd. Its log lies in the state directory."""
    running = _status()
    if running:
        _fits(running, model, state_dir, flags)
        return _tell(running, started=False)
    state = (state_dir or default_state_dir()).absolute()
    log = state / "atlasd.log"
    extra = (("--model", model) if model else ()) + flags
    process = _spawn(state, log, extra)
    found = _await(process, log, time.monotonic() + timeout, wait)
    _tell(found, started=True)


@click.command()
@click.option("--timeout", type=click.FloatRange(min=0), default=60.0, help="Seconds to wait for its end [60].")
@common
def down(timeout: float) -> None:
    """Stop the daemon; running turns are cancelled, sessions stay."""
    found = _status()
    if found is None:
        _say({"stopped": False, "running": False}, f"no daemon is running on {app().path}")
        return
    try:
        os.kill(found.pid, signal.SIGTERM)
    except PermissionError:
        raise DaemonUnavailable(
            f"the daemon (pid {found.pid}) belongs to another user", "`sudo systemctl stop atlasd`", refused=True
        ) from None
    except ProcessLookupError:
        pass
    _gone(found.pid, time.monotonic() + timeout)
    _say({"stopped": True, "pid": found.pid}, f"stopped (pid {found.pid})")


def _fits(found: StatusReply, model: str | None, state_dir: Path | None, flags: tuple[str, ...]) -> None:
    """Raises ErrorReply when the running daemon is not the one that is asked for, or can't serve."""
    again = "`atlasctl down`, then `atlasctl up` again"
    running = f"a daemon (pid {found.pid}) is running already"
    serves = found.model.name if found.model else "no model"
    if model and model != serves:
        raise ErrorReply(ErrorCode.INVALID_PARAMETER, f"{running} with {serves}", f"`atlasctl model load {model}`")
    if state_dir and state_dir.absolute() != Path(found.state_dir).absolute():
        raise ErrorReply(ErrorCode.INVALID_PARAMETER, f"{running} on {found.state_dir}", again)
    if flags and _arguments(found.pid)[-len(flags) :] != flags:
        raise ErrorReply(ErrorCode.INVALID_PARAMETER, f"{running} with other flags than {' '.join(flags)}", again)
    if found.engine_state == "failed":
        raise ErrorReply(
            ErrorCode.ENGINE_DIED, f"{running}, its engine failed: {found.engine_error}",
            f"mend that, then `atlasctl model load NAME`; or {again}",
        )  # fmt: skip


def _arguments(pid: int) -> tuple[str, ...]:
    """The command line of a process; empty when it can't be read."""
    try:
        return tuple(Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0").split("\0"))
    except OSError:
        return ()


def _status() -> StatusReply | None:
    """The daemon's status; None when none is running. Raises DaemonUnavailable when access is refused."""
    try:
        with _client() as client:
            return client.status()
    except DaemonUnavailable as error:
        if error.refused:
            raise
        return None


def _client() -> Client:
    from ..client import Client

    return Client(app().path, timeout=5.0, reconnect=0.0)


def _spawn(state: Path, log: Path, extra: tuple[str, ...]) -> subprocess.Popen[bytes]:
    if importlib.util.find_spec("atlasd") is None:
        raise DaemonUnavailable(
            "the daemon is not installed for this Python", f"`{sys.executable} -m pip install atlasd`"
        )
    command = [
        sys.executable,
        "-P",  # a torch.py or lmdb.py in the directory this is called from is not the daemon's
        "-m",
        "atlasd",
        "--socket",
        str(app().path.absolute()),
        "--state-dir",
        str(state),
        *extra,
    ]
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as out:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    except OSError as error:
        raise DaemonUnavailable(f"{error.filename or state}: {error.strerror}", "give another --state-dir") from None


def _await(process: subprocess.Popen[bytes], log: Path, end: float, wait: bool) -> StatusReply:
    """Polls until the daemon answers and, with `wait`, its engine is ready. Says each new state of the engine."""
    said = ""
    while time.monotonic() < end:
        if process.poll() is not None:
            raise _died(process.returncode, log)
        found = _status()
        if found and found.pid == process.pid:
            if found.engine_state != said:
                said = found.engine_state
                _progress(f"engine {engine(found)}")
            if found.engine_state == "failed":
                raise _failed(found, log)
            if found.engine_state == "ready" or not wait:
                return found
        time.sleep(POLL_S)
    raise DaemonUnavailable("the daemon is not ready yet", f"see {log}; `atlasctl status` says how far it is")


def _failed(found: StatusReply, log: Path) -> ErrorReply:
    step = f"mend that, then `atlasctl model load NAME`; or `atlasctl down` and `up` again; the log is {log}"
    return ErrorReply(ErrorCode.ENGINE_DIED, found.engine_error or "the engine failed", step)


def _died(code: int, log: Path) -> DaemonUnavailable:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    tail = "".join(f"\n    {line}" for line in lines)
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return DaemonUnavailable(f"the daemon ended at once ({how}). Its log ends with:{tail}", f"the whole log is {log}")


def _gone(pid: int, end: float) -> None:
    """Returns when the process has ended. Raises DaemonUnavailable when it has not at `end`."""
    while time.monotonic() < end:
        if not _alive(pid):
            return
        time.sleep(POLL_S / 2)
    raise ErrorReply(ErrorCode.DEADLINE, f"the daemon (pid {pid}) still runs", f"`kill -9 {pid}` loses no turn")


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[0] != b"Z"  # a zombie's parent has not looked yet
    except OSError:
        return False


def _tell(found: StatusReply, *, started: bool) -> None:
    verb = "started" if started else "already running"
    _say({"started": started, "status": found}, f"{verb}: pid {found.pid}, {found.socket}, engine {engine(found)}")


def _say(value: object, line: str) -> None:
    if app().json:
        emit(value)
    else:
        print(clean(line))


def _progress(line: str) -> None:
    if not app().json and sys.stderr.isatty():
        print(clean(line), file=sys.stderr)
