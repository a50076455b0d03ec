"""`atlasctl doctor`: each check with what it found and, when it is bad, the command that mends it.

Versions are read from the installed packages' metadata: torch is never imported here.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import AtlasError, DaemonUnavailable
from ..paths import default_state_dir
from .context import app, common
from .output import clean, emit, size

if TYPE_CHECKING:
    from ..protocol import StatusReply

GOOD, WARN, BAD = "ok", "warning", "broken"
FEATURES = ("avx2", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
WRITE_BYTES = 16 * 2**20
LOW_BYTES, LEAST_BYTES = 4 * 2**30, 256 * 2**20


@dataclasses.dataclass
class Check:
    name: str
    state: str  # GOOD, WARN or BAD
    found: str
    mend: str = ""


@click.command()
@common
def doctor() -> None:
    """Check this machine and say how to mend what is broken. Exits with 1 when something is."""
    checks = list(examine(app().path))
    broken = [check for check in checks if check.state == BAD]
    if app().json:
        emit({"ok": not broken, "checks": [dataclasses.asdict(check) for check in checks]})
    else:
        for check in checks:
            print(clean(f"{check.state:<8} {check.name:<10} {check.found}"))
            if check.mend:
                print(clean(f"{'':<8} {'':<10} mend: {check.mend}"))
    if broken:
        click.get_current_context().exit(1)


def examine(socket: Path) -> Iterator[Check]:
    """Every check in order."""
    yield python()
    yield from packages()
    status, reached = daemon(socket)
    yield from reached
    state = Path(status.state_dir) if status else default_state_dir()
    yield from disk(state, served=status is not None)
    yield memory()
    yield cpu()
    yield gpu()
    yield kernels()


def python() -> Check:
    return Check("python", GOOD, f"{platform.python_version()} at {sys.executable}")


def packages() -> Iterator[Check]:
    """The daemon's packages; without the daemon, the client alone is in order."""
    daemon_here = _version("atlasd")
    found = f"atlas-client {_version('atlas-client')}, atlasd {daemon_here or 'not installed (client only)'}"
    yield Check("atlas", GOOD, found)
    if not daemon_here:
        return
    needed = ("torch", "transformers", "safetensors", "tokenizers", "lmdb", "pyzmq", "msgspec")
    missing = [name for name in needed if not _version(name)]
    listed = ", ".join(f"{name} {_version(name)}" for name in needed if name not in missing)
    if missing:
        mend = f"`{sys.executable} -m pip install {' '.join(missing)}`"
        yield Check("packages", BAD, f"missing: {', '.join(missing)}; present: {listed}", mend)
    else:
        yield Check("packages", GOOD, listed)


def daemon(socket: Path) -> tuple[StatusReply | None, list[Check]]:
    """Whether the socket can be reached, and what the daemon says of itself."""
    from ..client import Client
    from .status import engine

    try:
        with Client(socket, timeout=3.0, reconnect=0.0) as client:
            status = client.status()
    except DaemonUnavailable as error:
        return None, [Check("daemon", BAD, error.message, error.next_step)]
    except AtlasError as error:
        return None, [Check("daemon", BAD, str(error), getattr(error, "next_step", ""))]
    checks = [Check("daemon", GOOD, f"{status.version}, pid {status.pid}, {status.socket}")]
    failed = status.engine_state == "failed"
    mend = f"see {status.state_dir}/atlasd.log or `journalctl -u atlasd`, then `atlasctl model load NAME`"
    checks.append(Check("engine", BAD if failed else GOOD, engine(status), mend if failed else ""))
    checks += [Check("daemon", WARN, warning) for warning in status.warnings]
    return status, checks


def disk(state: Path, *, served: bool) -> Iterator[Check]:
    """Space on the state directory's disk, and whether this user can write there."""
    present = next(path for path in (state, *state.parents) if path.exists())
    free = shutil.disk_usage(present).free
    found = f"{size(free)} free for {state}"
    if free < LOW_BYTES:
        yield Check("disk", BAD if free < LEAST_BYTES else WARN, found, "free space, or give another --state-dir")
    else:
        yield Check("disk", GOOD, found)
    if not os.access(present, os.W_OK | os.X_OK):
        if served:
            yield Check("state", GOOD, f"{state} belongs to the daemon's user")
        else:
            yield Check("state", BAD, f"{present} is not writable", f"`sudo chown -R $USER {present}`")
        return
    yield _write_test(present, state)


def _write_test(directory: Path, state: Path) -> Check:
    block = os.urandom(2**20)
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            start = time.perf_counter()
            for _ in range(WRITE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            rate = WRITE_BYTES / (time.perf_counter() - start)
    except OSError as error:
        return Check("state", BAD, f"writing to {directory}: {error.strerror}", "see `df` and `mount` for that disk")
    return Check("state", GOOD, f"{state}: {size(WRITE_BYTES)} written and synced at {rate / 1e6:,.0f} MB/s")


def memory() -> Check:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    found = f"{size(free)} of {size(total)} available"
    if free < 2**30:
        return Check("memory", WARN, found, "close programs, or lower --kv-ram-gb")
    return Check("memory", GOOD, found)


def cpu() -> Check:
    """The vector instructions that the CPU kernels can use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())
    have = [name for name in FEATURES if name in flags]
    found = f"{os.cpu_count()} cores, {platform.machine()}, {' '.join(have) or 'no vector extension known here'}"
    if platform.machine() == "x86_64" and "avx2" not in have:
        return Check(
            "cpu", WARN, found, "a CPU without AVX2 works, slowly; in a virtual machine pass the host's CPU on"
        )
    return Check("cpu", GOOD, found)


def gpu() -> Check:
    """Device nodes and what nvidia-smi says; the driver is not loaded into this process."""
    nodes = [node for node in glob.glob("/dev/nvidia*") if node[len("/dev/nvidia") :].isdigit()]
    tool = shutil.which("nvidia-smi")
    if not nodes and not tool:
        return Check("gpu", GOOD, "no NVIDIA GPU; the model runs on the CPU")
    if not tool:
        return Check("gpu", WARN, f"{', '.join(nodes)} but no nvidia-smi", "install the NVIDIA driver's tools")
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(query, check=False, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("gpu", BAD, f"nvidia-smi: {error}", "reload the driver: `sudo modprobe nvidia`, or restart")
    if asked.returncode:
        said = (asked.stdout + asked.stderr).strip().splitlines()[:1]
        return Check("gpu", BAD, f"nvidia-smi: {' '.join(said)}", "`sudo modprobe nvidia`, or install the driver")
    closed = [node for node in nodes if not os.access(node, os.R_OK | os.W_OK)]
    if closed:
        return Check("gpu", BAD, f"no access to {', '.join(closed)}", "`sudo usermod -aG video,render $USER`")
    return Check("gpu", GOOD, "; ".join(asked.stdout.strip().splitlines()))


def kernels() -> Check:
    """Which kernels are installed; none is needed, torch computes everything."""
    spec = importlib.util.find_spec("atlas_kernels")
    if spec is None or not spec.submodule_search_locations:
        return Check("kernels", GOOD, "not installed here (client only)")
    found, mend = importlib.import_module("atlas_kernels.cpu.library").describe()
    triton = _version("triton")
    said = f"CPU: {found}; GPU: {f'triton {triton}' if triton else 'torch'}"
    return Check("kernels", WARN if mend else GOOD, said, mend)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
