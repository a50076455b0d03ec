"""One request inside the engine, from submission to its terminal message. No torch."""

from __future__ import annotations

import dataclasses
import enum
import time
from typing import TYPE_CHECKING

from atlas_client.protocol import Timings, Usage
from atlas_tiers.base import BLOCK_TOKENS, KVSequence, Ticket

from .messages import Finished, Submit

if TYPE_CHECKING:
    from .sampling import Sampler
    from .text import Decoder


class State(enum.Enum):
    QUEUED = "queued"  # no pages held
    RESTORING = "restoring"  # pages held, some still being read
    RUNNING = "running"  # prefill or decode: len(tokens) - kv.length says which
    FINISHED = "finished"


@dataclasses.dataclass(eq=False)
class Request:
    """tokens = history (session so far) + prompt + generated; K/V exists for tokens[:kv.length]."""

    submit: Submit
    history: list[int]
    prompt: list[int]
    prompt_text: str
    max_tokens: int
    decoder: Decoder
    sampler: Sampler
    tokens: list[int] = dataclasses.field(init=False)
    state: State = State.QUEUED
    kv: KVSequence | None = None
    text: str = ""
    finish_reason: str = ""
    usage: Usage = dataclasses.field(default_factory=Usage)
    reset_reason: str = ""
    ticket: Ticket | None = None
    arrived: float = dataclasses.field(default_factory=time.monotonic)
    admitted: float = 0.0
    restored: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0

    def __post_init__(self) -> None:
        self.tokens = self.history + self.prompt
        self.arrived = self.submit.arrived or self.arrived

    @property
    def rid(self) -> str:
        return self.submit.rid

    @property
    def durable(self) -> bool:
        return self.submit.session is not None

    @property
    def base(self) -> int:
        """Tokens before the first generated one."""
        return len(self.history) + len(self.prompt)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.base :]

    @property
    def pending(self) -> int:
        """Tokens whose K/V is still to be computed: 1 while decoding."""
        return len(self.tokens) - (self.kv.length if self.kv else 0)

    @property
    def decoding(self) -> bool:
        return self.pending == 1 and len(self.tokens) > self.base

    def why_computed(self, found: int, identity: str, *, keeps_disk: bool) -> str:
        """Why pages for only `found` of the session's tokens were usable; its last token never had K/V. "": nothing
        was lost."""
        lost = len(self.history) - 1 - found
        if lost <= 0:
            return ""
        before = self.submit.kv_identity
        if not before:
            return "" if lost < BLOCK_TOKENS else "no KV pages were kept for this session yet"
        if before != identity:
            return "the pages are of another model, quantization or KV type"
        if lost < BLOCK_TOKENS:
            return f"the last part-filled page was not kept: {lost} tokens recomputed"
        if not keeps_disk:
            return "KV pages are kept in memory only and were gone"
        return "the pages were evicted, or never reached the disk"

    def finished(self, identity: str, tokenizer: str) -> Finished:
        """The terminal message of a request that ended well."""
        return Finished(
            rid=self.rid,
            finish_reason=self.finish_reason,
            text=self.text,
            prompt_text=self.prompt_text,
            usage=self.usage,
            timings=self.timings(),
            kv_durable=bool(self.ticket and self.ticket.durable),
            kv_identity=identity,
            tokenizer=tokenizer,
            reset_reason=self.reset_reason,
            seed=self.submit.request.sampling.seed,
        )

    def timings(self) -> Timings:
        """Milliseconds since arrival, split at admission, restore and first token."""
        decoded, span = len(self.generated) - 1, self.last_token - self.first_token
        first = self.first_token or self.last_token
        return Timings(
            queue_ms=1e3 * (self.admitted - self.arrived),
            restore_ms=1e3 * (self.restored - self.admitted),
            prefill_ms=1e3 * max(0.0, first - self.restored),
            ttft_ms=1e3 * max(0.0, first - self.arrived),
            decode_tokens_per_s=decoded / span if decoded > 0 and span > 0 else 0.0,
        )
