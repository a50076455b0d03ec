"""`atlasctl generate` and `chat` with a scripted broker: keys, pipes, terminals and hostile text."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from atlas_client.protocol import (
    Accepted,
    Cancel,
    ChatMessage,
    Done,
    Error,
    Generate,
    Ok,
    Progress,
    SessionDetail,
    SessionFork,
    SessionInfo,
    SessionOpen,
    SessionReply,
    SessionShow,
    SessionTruncate,
    Timings,
    Usage,
)  # fmt: skip
from cli_support import Terminal, atlasctl, started
from client_support import ScriptedBroker, Send, done, tokens

CANCELLED = Error("CANCELLED", "cancelled by the client", False, "send it again")
HOSTILE = "a\x1b]0;owned\x07b\x1b[2Jc\rd\x9b31me\tf"
INFO = SessionInfo("talk", "s1", 6021, 3, 0.0, 0.0)


class Daemon:
    """Answers as a daemon with one session would. "forever" is answered until it is cancelled."""

    def __init__(self, socket: Path) -> None:
        self.broker = ScriptedBroker(socket, self.script)
        self.on_ping: Callable[[int], None] | None = None  # called once, with the next PING

    def script(self, rid: str, body: Any, send: Send) -> None:
        match body:
            case Generate():
                self.generate(rid, body, send)
            case SessionShow():
                send(SessionDetail(INFO, []))
            case SessionOpen() | SessionFork() | SessionTruncate():
                send(SessionReply(INFO))
            case _:
                send(Ok())

    def generate(self, rid: str, body: Generate, send: Send) -> None:
        text = body.prompt if body.prompt is not None else (body.messages or [])[-1].content
        send(Accepted(0))
        if "template" in text:
            send(Error("INVALID_PARAMETER", "this model has no chat template", False, ""))
        elif "forever" in text:
            self.broker.known.add(rid)
            send(tokens(0, [1], "begun"))
            self.cancelled = lambda: send(CANCELLED)
            self.more = lambda index: send(tokens(index, [index], "more"))
        else:
            usage, times = Usage(prompt=6030, restored=6021, prefilled=9), Timings(restore_ms=34.2)
            reply = f"<{text}>"
            send(tokens(0, [1], reply))
            send(Done(finish_reason="eos", text=reply, tokens=[1], usage=usage, timings=times, durable=True))

    def await_cancel(self) -> None:
        end = time.monotonic() + 20
        while not self.broker.seen(Cancel):
            assert time.monotonic() < end, "no cancel came"
            time.sleep(0.01)


@pytest.fixture
def fake(root: Path) -> Iterator[Daemon]:
    daemon = Daemon(root / "s")
    control = daemon.broker._control

    def with_cancel(socket: Any, identity: bytes, frames: list[bytes]) -> None:
        control(socket, identity, frames)
        if isinstance(daemon.broker.controls[-1][1], Cancel):
            daemon.cancelled()
        elif daemon.on_ping is not None:
            more, daemon.on_ping = daemon.on_ping, None
            more(1)

    daemon.broker._control = with_cancel  # type: ignore[method-assign]
    with daemon.broker:
        yield daemon


def test_what_is_sent_is_exactly_what_was_given(root: Path, fake: Daemon) -> None:
    (root / "file").write_bytes(b"Zeile\r\n\n")
    name = str(root / "file")
    for arguments, stdin, sent in (
        (("text",), b"", "text"),
        (("-",), b"from stdin\n", "from stdin\n"),
        ((), "Grüße\n".encode(), "Grüße\n"),
        (("-f", name), b"", "Zeile\r\n\n"),
        ((f"@{name}",), b"", "Zeile\r\n\n"),
        ((f"@@{name}",), b"", f"@{name}"),
        ((name,), b"", name),  # an argument that names a file is a text
    ):
        ended = atlasctl("generate", *arguments, socket=root / "s", stdin=stdin)
        assert ended.returncode == 0, ended
        assert fake.broker.requests[-1][1].prompt == sent
        assert ended.stdout.decode() == f"<{sent}>"
        assert ended.stderr == b""


def test_every_sampling_flag_arrives(root: Path, fake: Daemon) -> None:
    flags = (
        "-n 7 --temperature 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.1 --presence-penalty 0.2 "
        "--frequency-penalty -0.3 --seed 42 --stop a --stop b --logit-bias 5=-1.5 --logit-bias 6=2 --logprobs 2 "
        "--ignore-eos -s name --model demo --deadline-ms 99999"
    )
    assert atlasctl("generate", "x", *flags.split(), socket=root / "s").returncode == 0
    request = fake.broker.requests[-1][1]
    sampling = request.sampling
    assert (request.session, request.model, request.deadline_ms) == ("name", "demo", 99999)
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.top_p) == (7, 0.5, 3, 0.9)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.seed) == (0.1, 1.1, 42)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.2, -0.3)
    assert (sampling.stop, sampling.logit_bias, sampling.logprobs) == (["a", "b"], {5: -1.5, 6: 2.0}, 2)
    assert sampling.ignore_eos


def test_the_usage_line_is_for_terminals_and_verbose(root: Path, fake: Daemon) -> None:
    ended = atlasctl("generate", "x", "-v", socket=root / "s")
    assert ended.stdout == b"<x>"
    assert b"prompt 6,030 = 6,021 restored + 9 computed" in ended.stderr


def test_ctrl_c_cancels_and_exits_with_130(root: Path, fake: Daemon) -> None:
    for extra in ((), ("--json",)):
        fake.broker.controls.clear()
        running = started(("generate", "forever", *extra), root / "s")
        assert running.stdout is not None
        if extra:
            end = time.monotonic() + 20
            while not fake.broker.known - set(fake.broker.seen(Cancel)) and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(0.3)  # until its handler for the signal is there
        else:
            assert running.stdout.read(5) == b"begun"
        running.send_signal(signal.SIGINT)
        fake.await_cancel()
        out, err = running.communicate(timeout=20)
        assert running.returncode == 130, err
        if extra:
            assert json.loads(out)["error"]["code"] == "CANCELLED"
        assert b"Traceback" not in err


def test_a_closed_pipe_cancels_quietly(root: Path, fake: Daemon) -> None:
    running = started(("generate", "forever"), root / "s")
    assert running.stdout is not None
    assert running.stdout.read(5) == b"begun"
    running.stdout.close()
    fake.on_ping = fake.more
    fake.await_cancel()
    assert running.wait(20) == 130
    assert running.stderr is not None
    assert running.stderr.read() == b""


def test_the_model_can_not_drive_the_terminal(root: Path, fake: Daemon) -> None:
    piped = atlasctl("generate", "-", socket=root / "s", stdin=HOSTILE.encode())
    assert piped.stdout.decode() == f"<{HOSTILE}>"
    (root / "hostile").write_text(HOSTILE, newline="")
    terminal = Terminal("generate", "-f", str(root / "hostile"), socket=root / "s")
    shown = terminal.wait("tokens/s")
    assert terminal.end() == 0
    assert "<a]0;ownedb[2Jcd31me\tf>" in shown.replace("\r\n", "\n")
    assert "\x1b" not in shown


def test_a_bar_is_shown_for_a_long_prefill_only_at_a_terminal(root: Path) -> None:
    def script(rid: str, body: Any, send: Send) -> None:
        for part in range(8):
            send(Progress("prefill", part * 512, 4096))
            time.sleep(0.1)
        send(tokens(0, [1], "end"))
        send(done([1], "end"))

    with ScriptedBroker(root / "s", script):
        terminal = Terminal("generate", "x", socket=root / "s")
        assert "reading the prompt" in terminal.wait("end")
        assert terminal.end() == 0
        assert atlasctl("generate", "x", socket=root / "s").stderr == b""


def test_a_chat_at_the_terminal(root: Path, fake: Daemon) -> None:
    terminal = Terminal("chat", "-s", "talk", "--system", "Be brief.", socket=root / "s")
    terminal.wait("has turns already")
    assert terminal.end() == 2

    terminal = Terminal("chat", "-s", "talk", socket=root / "s")
    terminal.wait("6,021 tokens, 3 turns[^>]*> ")
    terminal.type("hello\n")
    terminal.wait("<hello>")
    terminal.wait("resumed 6,021 tokens from disk in 34 ms")
    terminal.wait("> ")
    terminal.type("go on forever\n")
    terminal.wait("begun")
    terminal.type("\x03")
    terminal.wait("stopped")
    terminal.wait("> ")
    for line, said in (
        ("/help", "/truncate N"), ("/undo", "3 turns, 6,021 tokens left"), ("/fork other", "now in other"),
        ("/fork", "needs"), ("/truncate x", "needs"), ("/truncate 2", "left"), ("/inf", "did you mean /info"),
        ("/info", "talk: 6,021"), ("a template", "generate --session"), ("still here", "<still here>"),
    ):  # fmt: skip
        terminal.type(line + "\n")
        terminal.wait(said.replace("(", "\\("))
        terminal.wait("> ")
    terminal.type("half a line")
    terminal.wait("half a line")
    terminal.interrupt("Ctrl-C again[^>]*> ")
    terminal.interrupt("left")
    assert terminal.end() == 0
    assert "hello" in (root / "home" / "chat_history").read_text()
    assert fake.broker.seen(Cancel)

    terminal = Terminal("chat", "-s", "talk", socket=root / "s")
    terminal.wait("> ")
    terminal.type("\x1b[A")  # the history, from the last program
    terminal.wait("still here")
    terminal.type("\n")
    terminal.wait("<still here>")
    terminal.wait("> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_a_chat_from_a_pipe(root: Path, fake: Daemon) -> None:
    ended = atlasctl("chat", "-s", "talk", socket=root / "s", stdin=b"one\n\ntwo\n/quit\nthree\n")
    assert ended.returncode == 0
    assert ended.stdout == b"<one>\n<two>\n"
    sent = [body.messages for _, body in fake.broker.requests if isinstance(body, Generate)]
    assert sent == [[ChatMessage("user", "one")], [ChatMessage("user", "two")]]
    ended = atlasctl("chat", "-s", "talk", "--raw", socket=root / "s", stdin=b"one\n")
    assert fake.broker.requests[-1][1].prompt == "one\n"
    ended = atlasctl("chat", "-s", "talk", socket=root / "s", stdin=b"template\nnever\n")
    assert ended.returncode == 1
    assert b"chat --raw" in ended.stderr
    assert atlasctl("chat", "-s", "talk", socket=root / "s", stdin=b"a\xff\n").returncode == 2
