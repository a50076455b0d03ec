"""One request as handlers see it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from .streams import Stream


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """A decoded request. `stream` takes its replies."""

    request: Any  # one of protocol.Request
    raw: Sequence[bytes]
    digest: bytes
    stream: Stream

    @property
    def owner(self) -> str:
        return self.stream.key[0]

    @property
    def rid(self) -> str:
        return self.stream.key[1]
