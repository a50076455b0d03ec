"""Client of the AtlasInfer daemon: `Client`, `AsyncClient`, the errors they raise and the protocol's types.

Names are imported when first used: `import atlas_client` loads neither ZeroMQ nor msgspec, and never torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .aio import AsyncClient, AsyncGeneration, AsyncSession
    from .client import Client, Generation, Session
    from .errors import AtlasError, DaemonUnavailable, ErrorCode, ErrorReply

__version__ = "0.1.0"
__all__ = [
    "AsyncClient",
    "AsyncGeneration",
    "AsyncSession",
    "AtlasError",
    "Client",
    "DaemonUnavailable",
    "ErrorCode",
    "ErrorReply",
    "Generation",
    "Session",
]

_HOME = {
    **dict.fromkeys(("AsyncClient", "AsyncGeneration", "AsyncSession"), "aio"),
    **dict.fromkeys(("Client", "Generation", "Session"), "client"),
    **dict.fromkeys(("AtlasError", "DaemonUnavailable", "ErrorCode", "ErrorReply"), "errors"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
