"""The CPU kernels as a shared library: compiled at first use, kept in the user's cache, loaded with ctypes.

A library's name holds the digest of the source, the flags and the compiler's version. Behind the ELF file stand MARK
and the SHA-256 of all bytes before it; a file that does not match is compiled again, never loaded. The directory
belongs to the user alone. `python -m atlas_kernels.cpu.library` compiles ahead of time.
"""

from __future__ import annotations

import ctypes
import enum
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden")
MARK = b"atlas-sha256:"
LIMIT_S = 300.0  # a compilation takes ten seconds


class Unavailable(RuntimeError):
    """There is no library. `next_step` says how to get it; everything works without it, slower."""

    def __init__(self, message: str, next_step: str) -> None:
        super().__init__(f"{message}; {next_step}")
        self.next_step = next_step


class Level(enum.IntEnum):
    """Instruction sets, each holding those before it. AVX512 means F, BW, DQ and VL."""

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_VBMI = 3


class Library:
    """A loaded library. `best` is the highest level this processor has; a higher one is refused by every call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = ctypes.CDLL(str(path))
        self.best = Level(self.function("atlas_best_level", ctypes.c_int)())

    def function(self, name: str, result: type, *arguments: type) -> Callable[..., int]:
        """An exported function with its types set."""
        found = self._handle[name]
        found.restype, found.argtypes = result, list(arguments)
        return found


def cache_dir() -> Path:
    """$XDG_CACHE_HOME or ~/.cache, then atlasd/kernels."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "atlasd" / "kernels"


@functools.cache
def library() -> Library:
    """The library for this process, compiled if need be. Raises Unavailable, each time anew."""
    return Library(obtain(cache_dir()))


def obtain(cache: Path) -> Path:
    """A verified library in `cache`, compiled if there is none. Raises Unavailable."""
    compiler = find_compiler()
    kept = find(cache, compiler)
    if kept:
        return kept
    if compiler is None:
        raise Unavailable("no C++ compiler", f"install one of {', '.join(COMPILERS)} (`sudo apt install g++`)")
    _make_private(cache)
    try:
        with (cache / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits, then finds the first one's library
            return find(cache, compiler) or _compile(compiler, cache / _name(compiler))
    except OSError as error:
        raise Unavailable(f"{error.filename or cache}: {error.strerror}", f"make {cache} writable") from error


def find(cache: Path, compiler: str | None) -> Path | None:
    """The library of this source and compiler, if it is whole; without a compiler, of this source and any compiler."""
    if not cache.is_dir() or _exposed(cache):
        return None
    names = [_name(compiler)] if compiler else sorted(path.name for path in cache.glob(f"{_stem()}-*.so"))
    return next((cache / name for name in names if _whole(cache / name)), None)


def find_compiler() -> str | None:
    """The path of the first compiler on PATH."""
    return next((path for path in map(shutil.which, COMPILERS) if path), None)


def describe() -> tuple[str, str]:
    """What there is, for a person, and the step that mends it ("" when nothing is missing). Compiles nothing."""
    cache, compiler = cache_dir(), find_compiler()
    try:
        if kept := find(cache, compiler):
            return f"compiled ({kept.name})", ""
    except Unavailable as error:
        return f"torch: {error}", error.next_step
    if exposed := cache.is_dir() and _exposed(cache):
        return f"torch: {exposed}", f"`chmod 700 {cache}`"
    if compiler is None:
        return "torch: no C++ compiler for the faster kernels", "`sudo apt install g++`"
    return f"compiled at first use, with {compiler}", ""


def _compile(compiler: str, target: Path) -> Path:
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
    os.close(handle)
    part = Path(name)
    try:
        command = [compiler, *FLAGS, "-o", name, str(HERE / "atlas.cpp")]
        done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace", timeout=LIMIT_S)
        if done.returncode:
            said = "\n".join(done.stderr.strip().splitlines()[:3])
            raise Unavailable(f"{compiler} failed: {said}", "install a newer g++ or clang++")
        content = part.read_bytes()
        part.write_bytes(content + MARK + hashlib.sha256(content).digest())
        part.chmod(0o700)
        part.replace(target)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{compiler} took more than {LIMIT_S:.0f} s", "try again on a quieter machine") from error
    finally:
        part.unlink(missing_ok=True)
    return target


def _whole(path: Path) -> bool:
    """Whether it is this user's own file and its digest matches."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    with open(handle, "rb") as file:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode) or state.st_uid not in (0, os.geteuid()) or state.st_mode & 0o022:
            return False
        data = file.read()
    size = len(data) - len(MARK) - hashlib.sha256().digest_size
    return size > 0 and data[size:] == MARK + hashlib.sha256(data[:size]).digest()


def _make_private(cache: Path) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"{error.filename}: {error.strerror}", f"make {cache.parent} writable") from error
    if exposed := _exposed(cache):
        raise Unavailable(exposed, f"`chmod 700 {cache}`, or remove it")


def _exposed(cache: Path) -> str:
    """Who else could put a library there; "" for nobody. Each directory above is held to less: a sticky one will do."""
    place = cache.resolve()
    state = place.stat()
    if state.st_uid not in (0, os.geteuid()) or state.st_mode & 0o022:
        return f"others can write to {place}"
    for above in place.parents:
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"others can write to {above}"
    return ""


@functools.cache
def _stem() -> str:
    digest = hashlib.sha256("\0".join((*FLAGS, platform.machine())).encode())
    for path in sorted(HERE.glob("*.[ch]*")):
        if path.suffix in (".cpp", ".h"):
            digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return f"atlas-{digest.hexdigest()[:16]}"


@functools.cache
def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], check=False, capture_output=True, timeout=LIMIT_S)
    return hashlib.sha256(done.stdout).hexdigest()[:16]


def _name(compiler: str) -> str:
    try:
        return f"{_stem()}-{_version(compiler)}.so"
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{compiler} cannot be run: {error}", "install g++ anew") from error


if __name__ == "__main__":
    print(obtain(cache_dir()))
