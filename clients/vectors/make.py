"""Writes v1.json, the golden vectors of protocol version 1: `python clients/vectors/make.py`.

Each vector is one message: its name, the socket and direction it travels, header and body as JSON, every frame as hex.
A client passes when it decodes the frames to the JSON, and when what it encodes from the JSON decodes to the same.
`accept`: frames that must be read although this version would write them otherwise. `reject`: those to be refused.
A published file is never changed: another protocol version gets another file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
from atlas_client import framing
from atlas_client import protocol as p
from atlas_client.errors import ErrorCode, ErrorReply

FILE = Path(__file__).with_name("v1.json")
RID = "5f0c2a6e9b1d4c3f8a7e6d5c4b3a2910"
INFO = p.SessionInfo("tale", "s-01", 130, 2, 1750000000.0, 1750000600.5, model="demo", parent="s-00", forked_at=64)
LOCATED = p.SessionInfo(
    "tale", "s-01", 130, 2, 1750000000.0, 1750000600.5,
    where={"device": 64, "host": 0, "disk": 65, "nowhere": 1},
)  # fmt: skip
MODEL = p.ModelInfo(
    "demo", "ready", path="/srv/demo", architecture="LlamaForCausalLM", fingerprint="9f86d081884c7d65",
    quantization="e2m5", layers_quantized=42, layers_kept=1, weight_bytes=12_345_678, kv_bytes_per_token=6144,
    max_context=8192, vocab_size=4096, device="cpu", dtype="float32",
)  # fmt: skip
USAGE = p.Usage(prompt=130, reused=64, restored=0, prefilled=66, generated=2)
TIMINGS = p.Timings(queue_ms=0.5, restore_ms=0.0, prefill_ms=12.25, ttft_ms=13.5, decode_tokens_per_s=80.0)
SAMPLING = p.Sampling(
    max_tokens=64, temperature=0.5, top_k=40, top_p=0.875, min_p=0.0625, repetition_penalty=1.125,
    presence_penalty=0.25, frequency_penalty=-0.25, seed=2**62 + 1, stop=["\n\n", "Ende."],
    logit_bias={50: -100.0, 7: 2.5}, logprobs=2, ignore_eos=True,
)  # fmt: skip
CHAT = [p.ChatMessage("system", "Be brief."), p.ChatMessage("user", "Grüße an 東京 🚀")]
TURN = p.TurnInfo(0, RID, 0, 60, 5, "eos", 1750000000.0, prompt="Once upon", text=" a time")
FIRST_CAPABILITIES = ["generate", "sessions", "attach", "models", "credit"]
TIER = p.TierUsage("disk", 1000, 900, 0, 100, 393216, 39321600, 21474836480)
TOKEN_IDS = b"\x01\x00\x00\x00\x02\x00\x00\x00\xff\xff\x00\x00"  # 1, 2, 65535

REQUESTS: dict[str, tuple[Any, list[bytes]]] = {
    "hello": (p.Hello("vectors/1", capabilities=["generate"]), []),
    "generate, least": (p.Generate(prompt="def "), []),
    "generate, chat in a session": (
        p.Generate(
            messages=CHAT, session="tale", sampling=SAMPLING, stream=False, detach=True, model="demo",
            deadline_ms=60000, credit=256,
        ),
        [],
    ),
    "generate, token ids": (p.Generate(tokens=[0, 127, 128, 65536], sampling=p.Sampling(seed=0)), []),
    "attach": (p.Attach(17), []),
    "session.open": (p.SessionOpen("tale", create=False), []),
    "session.append": (p.SessionAppend(session="tale", prompt="and then"), []),
    "session.fork": (p.SessionFork("tale", "tale, other end", at_turn=1), []),
    "session.truncate": (p.SessionTruncate("tale", tokens=0), []),
    "session.rename": (p.SessionRename("tale", "märchen"), []),
    "session.checkpoint": (p.SessionCheckpoint("tale"), []),
    "session.list": (p.SessionList(), []),
    "session.list, with places": (p.SessionList(where=True, limit=32), []),
    "session.show": (p.SessionShow("tale", text=True), []),
    "session.show, with places": (p.SessionShow("tale", where=True), []),
    "session.export": (p.SessionExport("tale"), []),
    "session.import": (p.SessionImport("copy"), [b"\x00archive\xff"]),
    "session.delete": (p.SessionDelete("tale", purge=True), []),
    "model.list": (p.ModelList(), []),
    "model.load": (p.ModelLoad("org/model", revision="main"), []),
    "model.unload": (p.ModelUnload(), []),
    "status": (p.Status(), []),
}  # fmt: skip
CONTROL: dict[str, tuple[Any, list[bytes]]] = {
    "cancel": (p.Cancel(), []),
    "credit": (p.Credit(128), []),
    "ping": (p.Ping(), []),
}
CONTROL_REPLIES: dict[str, tuple[Any, list[bytes]]] = {"pong": (p.Pong("b-7", known=True), [])}
REPLIES: dict[str, tuple[Any, list[bytes]]] = {
    "welcome": (p.Welcome(1, "atlasd/0.1.0", "b-7", FIRST_CAPABILITIES, 1000, 32 * 2**20), []),
    "accepted": (p.Accepted(3), []),
    "progress": (p.Progress("prefill", 512, 6021), []),
    "tokens": (p.Tokens(0, [42, 4095], "für"), []),
    "tokens, no text yet": (p.Tokens(2, [17], ""), []),
    "tokens with logprobs": (
        p.Tokens(3, [5], "x", [p.TokenLogprob(5, -0.25, [(5, -0.25), (9, -2.5)])]),
        [],
    ),
    "done": (
        p.Done(
            finish_reason="eos", text="für", tokens=[42, 4095], usage=USAGE, timings=TIMINGS, session="tale",
            durable=True, kv_durable=True, reset_reason="another model", seed=2**62 + 1,
        ),
        [],
    ),
    "session": (p.SessionReply(INFO), []),
    "sessions": (p.SessionsReply([INFO]), []),
    "session.detail": (p.SessionDetail(INFO, [TURN]), [TOKEN_IDS]),
    "archive": (p.Archive(INFO), [b"\x00archive\xff"]),
    "model": (p.ModelReply(MODEL), []),
    "models": (p.ModelsReply([MODEL]), []),
    "status.reply": (
        p.StatusReply(
            version="0.1.0", pid=4242, boot="b-7", uptime_s=12.5, socket="/run/atlasd/atlasd.sock",
            state_dir="/var/lib/atlasd", rss_bytes=50_000_000, sessions=1, queued=0, running=1, engine_state="ready",
            engine_pid=4243, engine_restarts=1, engine_rss_bytes=900_000_000, model=MODEL, tiers=[TIER],
            counters={"pages_restored": 100}, warnings=["disk nearly full"],
        ),
        [],
    ),
    "ok": (p.Ok("2 pages"), []),
    "error": (p.Error.of(ErrorReply(ErrorCode.CONTEXT_OVERFLOW, "9,000 tokens do not fit in 8,192")), []),
    "sessions, with places": (p.SessionsReply([LOCATED]), []),
    "session.detail, with places": (p.SessionDetail(LOCATED, [TURN]), [TOKEN_IDS]),
    "status.reply, with the time of its counts": (
        p.StatusReply(
            version="0.1.0", pid=4242, boot="b-7", uptime_s=12.5, socket="/run/atlasd/atlasd.sock",
            state_dir="/var/lib/atlasd", rss_bytes=50_000_000, sessions=1, queued=0, running=1, engine_state="ready",
            counters={"tokens_generated": 40, "disk_bytes_written": 393216}, counters_at=12.25,
        ),
        [],
    ),
}  # fmt: skip

PLAIN_HEADER = {"rid": RID}
ACCEPT: dict[str, list[Any]] = {
    "unknown fields are ignored": [PLAIN_HEADER | {"trace": "x"}, {"type": "attach", "last_seq": 4, "colour": "red"}],
    "the tag may come last": [PLAIN_HEADER, {"last_seq": 4, "type": "attach"}],
    "defaults may be written out": [PLAIN_HEADER | {"seq": 0}, {"type": "generate", "prompt": "a", "stream": True}],
}
REJECT: dict[str, tuple[str, list[Any]]] = {
    "unknown type": ("BAD_FRAME", [PLAIN_HEADER, {"type": "session.explode"}]),
    "no type": ("BAD_FRAME", [PLAIN_HEADER, {"last_seq": 1}]),
    "body is a list": ("BAD_FRAME", [PLAIN_HEADER, [1, 2]]),
    "negative count": ("INVALID_PARAMETER", [PLAIN_HEADER, {"type": "attach", "last_seq": -1}]),
    "temperature is text": (
        "INVALID_PARAMETER",
        [PLAIN_HEADER, {"type": "generate", "prompt": "a", "sampling": {"temperature": "hot"}}],
    ),
    "empty session name": ("INVALID_PARAMETER", [PLAIN_HEADER, {"type": "session.show", "session": ""}]),
}
BROKEN = {
    "another protocol": ("UNSUPPORTED_VERSION", [b"ATL9", msgspec.msgpack.encode(PLAIN_HEADER), b"\x80"]),
    "another magic": ("BAD_FRAME", [b"HTTP", msgspec.msgpack.encode(PLAIN_HEADER), b"\x80"]),
    "two frames": ("BAD_FRAME", [framing.MAGIC, msgspec.msgpack.encode(PLAIN_HEADER)]),
    "bad request id": ("BAD_FRAME", [framing.MAGIC, msgspec.msgpack.encode({"rid": "a/b"}), b"\x80"]),
    "cut body": ("BAD_FRAME", [framing.MAGIC, msgspec.msgpack.encode(PLAIN_HEADER), b"\x82\xa4type"]),
}


def vectors() -> dict[str, Any]:
    """The whole file as built-in values."""
    messages = [
        *(_message("work", "request", 0, *item) for item in REQUESTS.items()),
        *(_message("control", "request", 0, *item) for item in CONTROL.items()),
        *(_message("control", "reply", 0, *item) for item in CONTROL_REPLIES.items()),
        *(_message("work", "reply", seq, *item) for seq, item in enumerate(REPLIES.items(), 1)),
    ]
    accept = [{"name": name, "frames": _encoded(parts), "body": parts[1]} for name, parts in ACCEPT.items()]
    reject = [{"name": name, "code": code, "frames": _encoded(parts)} for name, (code, parts) in REJECT.items()]
    reject += [{"name": name, "code": code, "frames": _hex(frames)} for name, (code, frames) in BROKEN.items()]
    return {"version": p.VERSION, "messages": messages, "accept": accept, "reject": reject}


def text() -> str:
    """The file's content."""
    return json.dumps(vectors(), ensure_ascii=False, indent=1) + "\n"


def _message(socket: str, direction: str, seq: int, name: str, item: tuple[Any, list[bytes]]) -> dict[str, Any]:
    body, raw = item
    header = p.Header(RID, seq)
    return {
        "name": name,
        "socket": socket,
        "direction": direction,
        "header": json.loads(msgspec.json.encode(header)),
        "body": json.loads(msgspec.json.encode(body)),
        "raw": _hex(raw),
        "frames": _hex(framing.encode(header, body, raw)),
    }


def _encoded(parts: list[Any]) -> list[str]:
    return _hex([framing.MAGIC, *(msgspec.msgpack.encode(part) for part in parts)])


def _hex(frames: list[bytes]) -> list[str]:
    return [frame.hex() for frame in frames]


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print(f"{FILE}: {len(vectors()['messages'])} messages", file=sys.stderr)
