"""Real file systems to hurt: small ones, ones whose disk fails, ones whose every write is recorded.

They need root, mount and loop devices, the last two nbdkit and nbdfuse (Debian: nbdkit nbdkit-plugin-python nbdfuse
fuse3); without, NotRun says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

MIB = 1 << 20
RECORDER = Path(__file__).with_name("recorder.py")


class NotRun(Exception):
    """This machine can't do it. The message says why."""


def run(*command: str | Path) -> str:
    """Raises NotRun when the command is missing or fails."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except OSError as error:
        raise NotRun(f"{words[0]}: {error.strerror}") from None
    if done.returncode:
        raise NotRun(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextlib.contextmanager
def mounted(where: Path, *arguments: str | Path) -> Iterator[Path]:
    """mount(8) with these arguments, until the block ends. Raises NotRun."""
    where.mkdir(exist_ok=True)
    run("mount", *arguments, where)
    try:
        yield where
    finally:
        _unmount(where)


def _unmount(where: Path) -> None:
    for _ in range(50):
        if subprocess.run(["umount", str(where)], capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    subprocess.run(["umount", "-l", str(where)], capture_output=True)


@contextlib.contextmanager
def tmpfs(root: Path, size: int) -> Iterator[Path]:
    """A file system in memory."""
    with mounted(root / "tmpfs", "-t", "tmpfs", "-o", f"size={size}", "tmpfs") as path:
        yield path


@contextlib.contextmanager
def ext4(root: Path, size: int) -> Iterator[Path]:
    """An ext4 in a file."""
    image = make_image(root / "ext4.img", size)
    with mounted(root / "ext4", "-o", "loop", image) as path:
        yield path
    image.unlink()


def make_image(path: Path, size: int) -> Path:
    """A file with an empty ext4."""
    with path.open("wb") as file:
        file.truncate(size)
    run("mkfs.ext4", "-q", "-m0", path)
    return path


@contextlib.contextmanager
def over_nbd(root: Path, *nbdkit: str | Path, environment: dict[str, str] | None = None) -> Iterator[Path]:
    """An ext4 on a disk that `nbdkit` with these arguments provides: loop device over FUSE over NBD."""
    for tool in ("nbdkit", "nbdfuse", "losetup"):
        if shutil.which(tool) is None:
            raise NotRun(f"{tool} is not installed")
    node = root / "nbd"
    node.touch()
    command = ["nbdfuse", str(node), "--command", "nbdkit", "-s", "--exit-with-parent", *map(str, nbdkit)]
    with (root / "nbdfuse.log").open("wb") as log:
        server = subprocess.Popen(command, stderr=log, env={**os.environ, **(environment or {})})
    try:
        _appears(node, server, root / "nbdfuse.log")
        device = run("losetup", "-f", "--show", node)
        try:
            with mounted(root / "mnt", device) as path:
                yield path
        finally:
            subprocess.run(["losetup", "-d", device], capture_output=True)
    finally:
        subprocess.run(["fusermount3", "-u", str(node)], capture_output=True)
        server.terminate()
        server.wait()


def _appears(node: Path, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 20
    while node.stat().st_size == 0:
        if server.poll() is not None or time.monotonic() > end:
            raise NotRun(f"nbdfuse: {log.read_text(errors='replace').strip() or 'no disk appears'}")
        time.sleep(0.05)


class Ballast:
    """A file that takes the room of a file system away, and gives it back."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "ballast"

    def leave(self, size: int) -> None:
        """Takes all but about `size` bytes."""
        with self._path.open("ab") as file:
            free = os.statvfs(self._path)
            room = free.f_bavail * free.f_frsize - size
            while room >= 4096:
                with contextlib.suppress(OSError):
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, room)
                    return
                room //= 2

    def go(self) -> None:
        """Gives everything back."""
        self._path.unlink(missing_ok=True)
