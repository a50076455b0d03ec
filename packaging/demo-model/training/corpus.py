"""The training text: the source files of a Python standard library, and which of them are held out."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

EXCLUDED = frozenset({"site-packages", "lib2to3", "encodings"})  # other people's code, and tables
SMALLEST, LARGEST = 200, 300_000  # bytes, both exclusive: no empty markers, no generated files


@dataclasses.dataclass(frozen=True)
class Document:
    """One source file. `name` is its path below the library's root, with forward slashes."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """About 2 % of the files, by the SHA-256 of their name: the same ones on every machine."""
        return hashlib.sha256(self.name.encode()).digest()[0] < 5


def library_root() -> Path:
    """The running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def documents(root: Path) -> Iterator[Document]:
    """Every UTF-8 source file below `root` of a sensible size, folder by folder, in order of name."""
    for folder in sorted(Path(path) for path, _, _ in os.walk(root)):
        if not EXCLUDED.intersection(folder.relative_to(root).parts):
            for path in sorted(folder.glob("*.py")):
                yield from _read(path, root)


def _read(path: Path, root: Path) -> Iterator[Document]:
    if not SMALLEST < path.stat().st_size < LARGEST:
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # the test suite holds files in other encodings on purpose
        return
    yield Document(path.relative_to(root).as_posix(), text)
