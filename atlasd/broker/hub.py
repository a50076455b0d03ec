"""Models that can be loaded without a download: what the hub's cache directory holds. Imports no hub library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from atlas_client.protocol import ModelInfo

DEMO = "demo"


def cache_dir() -> Path:
    """The hub's cache, found as huggingface_hub finds it."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


def cached(directory: Path) -> Iterator[ModelInfo]:
    """Models in the cache with at least one snapshot that has a configuration."""
    for path in sorted(directory.glob("models--*--*")):
        name = path.name.removeprefix("models--").replace("--", "/", 1)
        if any(path.glob("snapshots/*/config.json")):
            yield ModelInfo(name, "available", str(path))


def available(configured: str) -> list[ModelInfo]:
    """The bundled model, the configured one, and the cached ones, each once."""
    models = {DEMO: ModelInfo(DEMO, "available"), configured: ModelInfo(configured, "available")}
    for info in cached(cache_dir()):
        models[info.name] = info
    return list(models.values())
