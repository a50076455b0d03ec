"""Fingerprints: which weights, tokenizer and settings K/V pages and token ids belong to.

A weight file is hashed whole (SHA-256) once and remembered by device, inode, size, mtime and ctime: a file swapped
under the same path, even with its times copied, has another inode or ctime and is hashed again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)


def digest(*parts: str) -> str:
    """SHA-256 of the parts, each with its length, as hex."""
    h = hashlib.sha256()
    for part in parts:
        data = part.encode()
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()


def weights(files: Sequence[Path], memory: Path) -> str:
    """Fingerprint of the files' content. `memory`: a JSON file of hashes known from earlier starts."""
    known = _load(memory)
    hashes = {}
    for file in files:
        stat = os.stat(file)
        stamp = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
        hashes[stamp] = known.get(stamp) or _hash(file)
    _save(memory, known | hashes)
    return digest(*hashes.values())


def tokenizer(directory: Path) -> str:
    """Fingerprint of what turns text into ids."""
    present = [directory / name for name in TOKENIZER_FILES if (directory / name).exists()]
    return digest(*(f"{path.name}:{_hash(path)}" for path in present))


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(memory: Path) -> dict[str, str]:
    try:
        value = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _save(memory: Path, hashes: dict[str, str]) -> None:
    """Replaced atomically; keeps the newest thousand."""
    draft = memory.with_suffix(f".{os.getpid()}")
    try:
        draft.write_text(json.dumps(dict(list(hashes.items())[-1000:])))
        os.replace(draft, memory)
    except OSError:
        draft.unlink(missing_ok=True)  # the next start hashes again
