"""The engine's main loop: takes requests in, runs one forward pass after the other, sends tokens out."""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from collections.abc import Sequence

import numpy as np
import torch
from atlas_client.errors import ErrorCode, ErrorReply
from atlas_client.protocol import Error, Progress, TierUsage, TokenLogprob, Tokens
from atlas_tiers.base import BLOCK_TOKENS, BlocksComing, KVStore, OutOfBlocks, Ticket
from atlas_tiers.errors import PageDamaged

from atlasd.config import Config

from .census import Census
from .forward import Forward, Piece
from .link import Link, encode
from .messages import Failed, Locate, Persist, Persisted, Relay, Shutdown, Started, Submit
from .model import LoadedModel
from .request import Request, State
from .sampling import Sampler
from .scheduler import Part, Scheduler
from .text import Text

log = logging.getLogger(__name__)

DEFAULT_MAX_TOKENS = 256
MORE_PAGES = "raise --kv-vram-gb, --kv-ram-gb or --kv-disk-gb, or shorten the context"
IDLE_WAIT_S = 0.05
BUSY_WAIT_S = 0.002  # while pages are being read or written


@dataclasses.dataclass
class _Ticketed:
    """A PERSIST on its way."""

    rid: str
    ticket: Ticket


class Worker:
    """Owns the model, the pages and the requests. Everything runs on the calling thread."""

    def __init__(self, loaded: LoadedModel, store: KVStore, link: Link, config: Config) -> None:
        self.loaded = loaded
        self.store = store
        self.link = link
        fits = max(1, store.pool_blocks - 2) * BLOCK_TOKENS
        self.scheduler = Scheduler(config.max_batch, min(config.prefill_chunk, fits))
        self.forward = Forward(loaded, store)
        self.text = Text(loaded.tokenizer, loaded.vocab, loaded.max_context)
        self.steps = 0
        self.stopping = False
        self.keeps_disk = config.disk_dir is not None
        self.kv_tokens = store.capacity
        self._settling: list[Request] = []  # finished, their pages being written
        self._persists: list[_Ticketed] = []
        self.census = Census(store, link.send)
        self.tokens = {"tokens_prefilled": 0, "tokens_generated": 0}  # computed since the start, for status

    # --- the loop -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Serves until SHUTDOWN."""
        while not self.stopping:
            self.turn()
        self.store.close()

    def turn(self) -> None:
        """One turn: messages in, pages in, admissions, one forward pass, messages out."""
        self.steps += 1
        parts = self.scheduler.plan()
        self.receive(0.0 if parts else self._wait_s())
        self.store.poll()
        self.scheduler.admit(self.begin)
        self.settle()
        self.census.step()
        if parts := self.scheduler.plan():
            self.compute(parts)

    def _wait_s(self) -> float:
        busy = self.scheduler.running or self._settling or self._persists
        if busy:
            self.store.wait(BUSY_WAIT_S)
            return 0.0
        return 0.0 if self.census.busy else IDLE_WAIT_S

    # --- messages in ----------------------------------------------------------------------------------

    def receive(self, wait_s: float) -> None:
        # Cancels are taken first: a request that is sent before its cancel is then among the messages read after.
        self.link.wait(wait_s)
        cancelled = self.link.cancelled()
        for message, raw in self.link.receive():
            match message:
                case Submit():
                    self.submit(message, _ids(raw[0]))
                case Persist():
                    self.persist(message, _ids(raw[0]))
                case Locate():
                    self.census.add(message, raw[0])
                case Shutdown():
                    self.stopping = True
        for rid in cancelled:
            if request := self.scheduler.find(rid):
                self.fail(request, ErrorReply(ErrorCode.CANCELLED, "cancelled by the client"))

    def submit(self, message: Submit, history: list[int]) -> None:
        """Checks a request and queues it, or answers FAILED."""
        try:
            self.scheduler.add(self._request(message, history))
        except ErrorReply as error:
            self.link.send(Failed(message.rid, Error.of(error)))
        except Exception as error:
            log.exception("request %s", message.rid)
            reply = ErrorReply(ErrorCode.INTERNAL, f"{type(error).__name__}: {error}")
            self.link.send(Failed(message.rid, Error.of(reply)))

    def _request(self, message: Submit, history: list[int]) -> Request:
        generate, sampling = message.request, message.request.sampling
        if sampling.seed is None:
            sampling.seed = random.getrandbits(63)
        prompt, shown = self.text.prompt(
            generate, fresh=not history, last_finish=message.last_finish, answer=not message.append_only
        )
        self.text.check(history)  # it may have been imported
        self.text.check(prompt)
        base = len(history) + len(prompt)
        if base == 0 or (message.append_only and not prompt):
            raise ErrorReply(ErrorCode.INVALID_PARAMETER, "the prompt is empty")
        limit = self.loaded.max_context
        if base + (0 if message.append_only else 1) > limit:
            past = f" after {len(history)} of the session" if history else ""
            raise ErrorReply(ErrorCode.CONTEXT_OVERFLOW, f"{len(prompt)} tokens{past} do not fit into {limit}")
        if base + 1 > self.kv_tokens:
            raise ErrorReply(
                self._memory_code,
                f"{base} tokens do not fit into the {self.kv_tokens} that pages are there for",
                MORE_PAGES,
            )
        wanted = DEFAULT_MAX_TOKENS if sampling.max_tokens is None else sampling.max_tokens
        room = min(limit, self.kv_tokens) - base
        return Request(
            submit=message,
            history=history,
            prompt=prompt,
            prompt_text=shown,
            max_tokens=0 if message.append_only else min(wanted, room),
            decoder=self.text.decoder(history + prompt, sampling.stop),
            sampler=Sampler(sampling, self.loaded.defaults, base, self.loaded.vocab),
        )

    @property
    def _memory_code(self) -> ErrorCode:
        return ErrorCode.OUT_OF_RAM if self.loaded.device.type == "cpu" else ErrorCode.OUT_OF_VRAM

    def persist(self, message: Persist, tokens: list[int]) -> None:
        if not message.purge:
            self._persists.append(_Ticketed(message.rid, self.store.persist(tokens, message.owner)))
            return
        try:
            self.link.send(Persisted(message.rid, self.store.purge(tokens, message.owner, keep=message.keep)))
        except OSError as error:
            reply = ErrorReply(ErrorCode.INTERNAL, f"KV pages could not be erased: {error}", "delete the KV directory")
            self.link.send(Persisted(message.rid, 0, Error.of(reply)))

    # --- admission and pages --------------------------------------------------------------------------

    def begin(self, request: Request) -> bool:
        """Takes pages for a request: finds its prefix, starts reading it. False: no pages are free now."""
        try:
            request.kv = self.store.open(request.tokens, request.submit.owner, durable=request.durable)
        except OutOfBlocks:
            if self._pages_may_come():
                return False
            self.fail(request, ErrorReply(self._memory_code, "no pages are free", MORE_PAGES))
            return True
        first = not request.admitted
        request.state = State.RESTORING
        if first:
            request.admitted = time.monotonic()
            self.link.send(Started(request.rid, 1e3 * (request.admitted - request.arrived)))
        return True

    def _pages_may_come(self, needy: Request | None = None) -> bool:
        """Whether pages will be freed by what others finish or the disk takes."""
        others = any(request is not needy for request in self.scheduler.running)
        return others or bool(self._settling) or self.store.writing

    def settle(self) -> None:
        """Moves on what waited for pages: restored requests run, written ones are answered."""
        for request in self.scheduler.running:
            if request.state is State.RESTORING and request.kv and request.kv.ready:
                self._restored(request)
        for request in [r for r in self._settling if r.ticket and r.ticket.done]:
            self._settling.remove(request)
            self._answer(request)
        for item in [p for p in self._persists if p.ticket.done]:
            self._persists.remove(item)
            error = None if item.ticket.durable else Error.of(_not_durable(item.ticket))
            self.link.send(Persisted(item.rid, item.ticket.pages, error))

    def _restored(self, request: Request) -> None:
        kv = request.kv
        assert kv is not None
        request.state = State.RUNNING
        if request.restored:  # brought back after it gave way: its usage stands
            return
        request.restored = time.monotonic()
        request.usage.prompt = request.base
        request.usage.reused, request.usage.restored = kv.reused, kv.restored
        request.usage.prefilled = request.base - kv.length
        request.reset_reason = kv.reset_reason or request.why_computed(
            kv.length, self.loaded.identity, keeps_disk=self.keeps_disk
        )
        if kv.restored:
            self._progress(request, "restore", kv.restored, kv.restored)

    # --- computing ------------------------------------------------------------------------------------

    def compute(self, parts: list[Part]) -> None:
        """Reserves pages, runs the forward pass, draws tokens."""
        parts = [part for part in parts if self._reserve(part)]
        parts = [part for part in parts if part.request.state is State.RUNNING]  # some gave way to others
        if not parts:
            self.store.wait(BUSY_WAIT_S)
            return
        pieces, start = [_piece(part) for part in parts], time.perf_counter()
        try:
            logits = self.forward(pieces)
        except PageDamaged as error:
            self._page_lost([part.request for part in parts], error)
            return
        except (RuntimeError, ValueError, IndexError, OSError, MemoryError) as error:
            log.exception("forward pass of %d requests", len(parts))
            short = isinstance(error, torch.OutOfMemoryError | MemoryError)
            code = self._memory_code if short else ErrorCode.INTERNAL
            for part in parts:
                self.fail(part.request, ErrorReply(code, f"forward pass: {error}"))
            return
        rows = iter(logits.cpu())
        if len(pieces) == 1 and (pieces[0].sample or self.loaded.device.type == "cpu"):  # else it may still be running
            self.store.note_prefill(len(pieces[0].tokens), pieces[0].first, time.perf_counter() - start)
        for part in parts:
            kv = part.request.kv
            assert kv is not None
            self.tokens["tokens_prefilled"] += 0 if part.request.decoding else part.count
            kv.commit(part.request.tokens[kv.length : kv.length + part.count])
            if part.sample:
                self._next(part.request, next(rows))
            else:
                self._progress(part.request, "prefill", kv.length, part.request.base)

    def _reserve(self, part: Part) -> bool:
        """Pages for the part's tokens; younger requests give theirs up when there are none. False: not in this pass."""
        request = part.request
        while request.state is State.RUNNING and request.kv:
            try:
                request.kv.reserve(part.count)
                return True
            except BlocksComing:
                return False
            except OutOfBlocks:
                victim = self.scheduler.victim(request)
                if victim is None:
                    self._give_way(request)
                    return False
                self._preempt(victim)
        return False

    def _give_way(self, request: Request) -> None:
        """The youngest request found no page: it waits, unless nobody else could ever free one."""
        if self._pages_may_come(request):
            self._preempt(request)
        else:
            self.fail(
                request, ErrorReply(self._memory_code, f"no page left at token {len(request.tokens)}", MORE_PAGES)
            )

    def _page_lost(self, requests: list[Request], error: PageDamaged) -> None:
        """A page that was away could not be read, and is gone: who had pages away begins again with what is left."""
        for request in reversed(requests):
            if request.kv is not None and any(table.away for table in request.kv.tables):
                request.reset_reason = f"{error}: computed again"
                self._preempt(request)

    def _preempt(self, request: Request) -> None:
        log.info("request %s gives its pages back at token %d", request.rid, len(request.tokens))
        assert request.kv is not None
        request.kv.release()
        request.kv = None
        self.scheduler.requeue(request)

    def _next(self, request: Request, logits: torch.Tensor) -> None:
        """Whatever goes wrong with one request's token ends that request alone, not the engine."""
        try:
            self._computed(request, logits)
        except Exception as error:
            log.exception("request %s", request.rid)
            self.fail(request, ErrorReply(ErrorCode.INTERNAL, f"{type(error).__name__}: {error}"))

    def _computed(self, request: Request, logits: torch.Tensor) -> None:
        """The last token's logits are there: draw the next one, or finish."""
        if request.max_tokens == 0:
            self._finish(request, "append" if request.submit.append_only else "length", "")
            return
        try:
            token, logprob = request.sampler.pick(logits, request.tokens)
        except ErrorReply as error:
            self.fail(request, error)
            return
        now = time.monotonic()
        request.first_token = request.first_token or now
        request.last_token = now
        if token in self.loaded.eos and not request.submit.request.sampling.ignore_eos:
            self._finish(request, "eos", "")
            return
        request.tokens.append(token)
        self.tokens["tokens_generated"] += 1
        text = request.decoder.feed(token)
        if request.decoder.stopped:
            self._finish(request, "stop", text, token, logprob)
        elif len(request.generated) >= request.max_tokens:
            self._finish(request, "length", text, token, logprob)
        else:
            self._emit(request, [token], text, logprob)

    # --- messages out ---------------------------------------------------------------------------------

    def _emit(self, request: Request, ids: list[int], text: str, logprob: TokenLogprob | None) -> None:
        request.text += text
        if request.submit.request.stream and (ids or text):
            event = Tokens(len(request.generated) - len(ids), ids, text, [logprob] if logprob else [])
            self.link.send(Relay(request.rid, progress=False), [encode(event)])

    def _progress(self, request: Request, phase: str, done: int, total: int) -> None:
        self.link.send(Relay(request.rid, progress=True), [encode(Progress(phase, done, total))])

    def _finish(
        self, request: Request, reason: str, text: str, token: int | None = None, logprob: TokenLogprob | None = None
    ) -> None:
        """The last tokens go out; a session's pages are written before the answer."""
        if reason != "stop":
            text += request.decoder.flush()
        self._emit(request, [] if token is None else [token], text, logprob)
        request.last_token = request.last_token or time.monotonic()
        request.usage.generated = len(request.generated)
        request.finish_reason = reason
        request.state = State.FINISHED
        self.scheduler.remove(request)
        assert request.kv is not None
        if request.durable:
            request.ticket = request.kv.persist()
            self._settling.append(request)
        else:
            self._answer(request)

    def _answer(self, request: Request) -> None:
        assert request.kv is not None
        request.kv.release()
        message = request.finished(self.loaded.identity, self.loaded.tokenizer_id)
        self.link.send(message, [_raw(request.prompt), _raw(request.generated)])

    def fail(self, request: Request, error: ErrorReply) -> None:
        """The terminal FAILED of a request, wherever it is."""
        self.scheduler.remove(request)
        request.state = State.FINISHED
        if request.kv:
            request.kv.release()
        self.link.send(Failed(request.rid, Error.of(error)))

    def tiers(self) -> list[TierUsage]:
        """Pages by tier, for status."""
        return [TierUsage(**dataclasses.asdict(stats)) for stats in self.store.stats()]


def _not_durable(ticket: Ticket) -> ErrorReply:
    if ticket.error:
        return ErrorReply(ErrorCode.DISK_FULL, ticket.error)
    return ErrorReply(
        ErrorCode.INVALID_PARAMETER, "this daemon keeps no pages on disk", "start it without --kv-disk-path none"
    )


def _piece(part: Part) -> Piece:
    kv = part.request.kv
    assert kv is not None
    tokens = part.request.tokens[kv.length : kv.length + part.count]
    return Piece(tokens, kv.length, kv.tables, part.sample)


def _ids(raw: bytes) -> list[int]:
    return np.frombuffer(raw, dtype="<u4").tolist()  # type: ignore[no-any-return]


def _raw(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, dtype="<u4").tobytes()
