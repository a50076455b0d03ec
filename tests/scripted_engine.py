"""An engine without a model: a real process that speaks the engine's protocol and obeys orders in the prompt.

The prompt is a JSON object of orders, or plain text (no orders):
    n        tokens to generate when the request names no max_tokens
    delay    seconds between tokens
    start    seconds before STARTED
    at       index at which `do` happens: "crash" (SIGKILL itself), "exit", "hang" (loop stops, heartbeat goes on),
             "mute" (everything stops), "fail" (FAILED with `code`), "deaf" (ignores CANCEL from now on)
    stamp    each text is the monotonic clock in nanoseconds, as is taken right before the event is sent
    pad      bytes of text per token

Model names are orders too: "missing" fails with NO_SUCH_MODEL, "dies" exits at once, "slow" loads for a second.
A token follows from all tokens before it: tests know what must come (next_token).
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import sys
import threading
import time
import zlib
from array import array
from typing import Any

import msgspec
import zmq
from atlas_client.errors import ErrorCode, ErrorReply
from atlas_client.protocol import Error, ModelInfo, Progress, TierUsage, Timings, Tokens, Usage

from atlasd.engine.messages import (
    Beat,
    Cancel,
    EngineSpec,
    Failed,
    Finished,
    Locate,
    Located,
    Persist,
    Persisted,
    Relay,
    Shutdown,
    Started,
    State,
    Submit,
    ToEngine,
)

encode = msgspec.msgpack.encode
_to_engine = msgspec.msgpack.Decoder(ToEngine)


def prompt_tokens(text: str) -> list[int]:
    """One token per byte."""
    return list(text.encode())


def next_token(history: int) -> int:
    """The token after a history, which is the CRC of all ids before it."""
    return history % 50_000


def crc(ids: bytes, start: int = 0) -> int:
    return zlib.crc32(ids, start)


def expected(history: list[int], count: int) -> list[int]:
    """The tokens generated after `history`."""
    state = crc(array("I", history).tobytes())
    made = []
    for _ in range(count):
        made.append(next_token(state))
        state = crc(array("I", made[-1:]).tobytes(), state)
    return made


@dataclasses.dataclass
class Run:
    message: Submit
    orders: dict[str, Any]
    prompt: list[int]
    state: int
    count: int
    due: float
    started: bool = False
    deaf: bool = False
    made: list[int] = dataclasses.field(default_factory=list)
    text: list[str] = dataclasses.field(default_factory=list)


class Engine:
    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        context = zmq.Context()
        self.work = context.socket(zmq.PAIR)
        self.work.connect(spec.work_endpoint)
        self.control = context.socket(zmq.PAIR)
        self.control.connect(spec.control_endpoint)
        self.context = context
        self.runs: dict[str, Run] = {}
        self.steps = 0
        self.mute = False
        self.leaving = False
        self.beats = threading.Thread(target=self.beat, daemon=True)
        self.cancelled: set[str] = set()
        self.persisted = 0

    def send(self, message: Any, *raw: bytes) -> None:
        self.work.send_multipart([encode(message), *raw])

    def leave(self) -> None:
        """Exits when everything sent has reached the broker."""
        self.leaving = True
        self.beats.join()
        self.work.close(2000)
        self.context.term()
        os._exit(0)

    def load(self) -> None:
        name = self.spec.model
        self.send(State("starting"))
        if name == "dies":
            os._exit(3)
        if name == "missing":
            error = Error.of(ErrorReply(ErrorCode.NO_SUCH_MODEL, "no model 'missing'"))
            self.send(State("failed", error=error))
            self.leave()
        steps = 10 if name.startswith("slow") else 1
        for done in range(steps):
            self.send(State("loading", done, steps, "tensors"))
            time.sleep(0.1 if steps > 1 else 0)
        model = ModelInfo(name, "ready", vocab_size=50_000, max_context=100_000)
        tokenizer = "tok-other" if name.endswith("other") else "tok"
        self.send(State("ready", model=model, tokenizer=tokenizer, kv_identity="kv-" + name))

    def beat(self) -> None:
        """The control socket belongs to this thread."""
        due = 0.0
        while not self.mute:
            if self.leaving:
                self.control.close(0)
                return
            if self.control.poll(20):
                message = msgspec.msgpack.decode(self.control.recv(), type=Cancel)
                self.cancelled.add(message.rid)
            if time.monotonic() >= due:
                due = time.monotonic() + 0.2
                started = sum(run.started for run in self.runs.copy().values())
                tier = TierUsage("device", 10, 10, 0, 0, 1, 0, 10)
                beat = Beat(
                    steps=self.steps, running=started, waiting=0, tiers=[tier],
                    counters={"persisted": self.persisted}, warnings=["scripted"],
                )  # fmt: skip
                self.control.send(encode(beat))
        time.sleep(1000)

    def serve(self) -> None:
        self.beats.start()
        self.load()
        while True:
            due = min((run.due for run in self.runs.values()), default=time.monotonic() + 0.02)
            wait = min(20.0, max(0.0, (due - time.monotonic()) * 1000))
            if self.work.poll(int(wait)):
                while self.work.poll(0):
                    self.take(self.work.recv_multipart())
            self.steps += 1
            for rid in [rid for rid in self.cancelled if rid in self.runs and not self.runs[rid].deaf]:
                self.cancelled.discard(rid)
                del self.runs[rid]
                self.send(Failed(rid, Error.of(ErrorReply(ErrorCode.CANCELLED, "cancelled"))))
            now = time.monotonic()
            for run in list(self.runs.values()):
                if now >= run.due:
                    self.step(run)

    def take(self, frames: list[bytes]) -> None:
        message = _to_engine.decode(frames[0])
        match message:
            case Submit():
                run = self.accept(message, frames[1])
                self.runs[message.rid] = run
            case Persist():
                self.persisted += 1
                self.send(Persisted(message.rid, len(frames[1]) // 256))
            case Locate():  # everything is in device memory but each session's last token
                self.send(Located(message.rid, [{"device": n - 1, "nowhere": 1} for n in message.counts]))
            case Shutdown():
                self.leave()

    def accept(self, message: Submit, history: bytes) -> Run:
        request = message.request
        text = request.prompt if request.prompt is not None else ""
        if request.messages:
            text = "".join(part.content for part in request.messages)
        prompt = list(request.tokens) if request.tokens is not None else prompt_tokens(text)
        orders = json.loads(text) if text.startswith("{") else {}
        limit = request.sampling.max_tokens
        count = 0 if message.append_only else limit if limit is not None else orders.get("n", 4)
        state = crc(array("I", prompt).tobytes(), crc(history))
        run = Run(message, orders, prompt, state, count, time.monotonic() + orders.get("start", 0.0))
        run.orders["history"] = len(history) // 4
        return run

    def step(self, run: Run) -> None:
        rid = run.message.rid
        if not run.started:
            run.started = True
            self.send(Started(rid, 0.5))
            total = len(run.prompt)
            self.send(Relay(rid, True), encode(Progress("prefill", total, total)))
        if run.orders.get("at") == len(run.made) and self.obey(run):
            return
        if len(run.made) == run.count:
            self.finish(run)
            return
        token = next_token(run.state)
        run.state = crc(array("I", [token]).tobytes(), run.state)
        text = f"<{token}>" + "x" * run.orders.get("pad", 0)
        if run.orders.get("stamp"):
            text = str(time.monotonic_ns())
        if run.message.request.stream:
            self.send(Relay(rid, False), encode(Tokens(len(run.made), [token], text)))
        run.made.append(token)
        run.text.append(text)
        run.due = max(run.due + run.orders.get("delay", 0.0), time.monotonic() - 0.05)

    def obey(self, run: Run) -> bool:
        match run.orders.get("do"):
            case "crash":
                time.sleep(0.05)  # what was sent before is on its way
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(7)
            case "hang":
                time.sleep(1000)
            case "mute":
                self.mute = True
                time.sleep(1000)
            case "deaf":
                run.deaf = True
                return False
            case "fail":
                del self.runs[run.message.rid]
                code = ErrorCode(run.orders.get("code", "CONTEXT_OVERFLOW"))
                self.send(Failed(run.message.rid, Error.of(ErrorReply(code, "as ordered"))))
        return True

    def finish(self, run: Run) -> None:
        rid, request = run.message.rid, run.message.request
        del self.runs[rid]
        total = len(run.prompt) + run.orders["history"]
        self.send(
            Finished(
                rid=rid, finish_reason="append" if run.message.append_only else "length", text="".join(run.text),
                prompt_text=request.prompt or "", usage=Usage(total, 0, 0, total, len(run.made)),
                timings=Timings(0.5, 0, 1, 2, 100), kv_durable=True, kv_identity="kv-" + self.spec.model,
                tokenizer="tok-other" if self.spec.model.endswith("other") else "tok", reset_reason="",
                seed=request.sampling.seed,
            ),
            array("I", run.prompt).tobytes(),
            array("I", run.made).tobytes(),
        )  # fmt: skip


def main() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    spec = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=EngineSpec)
    if os.getppid() != spec.broker_pid:
        sys.exit(0)  # the broker was killed before the line above could tie this process to it
    Engine(spec).serve()


if __name__ == "__main__":
    main()
