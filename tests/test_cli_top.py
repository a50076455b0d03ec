"""`atlasctl status`, `top` and `session show`: figures, frames of any size, and the live view at a terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from atlas_client import Client
from atlas_client.cli import figures
from atlas_client.cli.frame import View, lines
from atlas_client.protocol import ModelInfo, SessionInfo, SessionList, SessionsReply, Status, StatusReply, TierUsage
from cli_support import Terminal, answer, atlasctl, started
from client_support import ScriptedBroker, Send
from conftest import Daemon

MIB = 1 << 20
COUNTERS = {
    "device_hit_pages": 60, "host_hit_pages": 10, "disk_hit_pages": 20, "miss_pages": 10,
    "disk_bytes_read": 40 * MIB, "disk_read_us": 20_000, "disk_bytes_written": 100 * MIB, "disk_write_us": 100_000,
    "host_bytes_read": 8 * MIB, "host_read_us": 1000, "host_bytes_written": 0, "host_write_us": 0,
    "disk_bytes_written_today": 300 * MIB, "disk_pages_damaged": 2, "disk_write_errors": 1, "disk_writes_dropped": 0,
    "tokens_prefilled": 5000, "tokens_generated": 700,
}  # fmt: skip
TIERS = [
    TierUsage("device", 128, 64, 4, 60, MIB, 64 * MIB, 128 * MIB),
    TierUsage("host", 256, 256, 0, 0, MIB, 0, 256 * MIB),
    TierUsage("disk", 1000, 1, 0, 999, MIB, 999 * MIB, 1000 * MIB),
]
WHERE = {"device": 6000, "host": 0, "disk": 20, "nowhere": 1}
SESSIONS = [
    SessionInfo("a talk", "s1", 6021, 3, 0.0, 0.0, busy=True, where=WHERE),
    SessionInfo("会議" * 40, "s2", 9, 1, 0.0, 0.0),
    *(SessionInfo(f"older {i}", f"o{i}", 64, 1, 0.0, 0.0, where={"disk": 64}) for i in range(30)),
]


def status(**given: Any) -> StatusReply:
    values: dict[str, Any] = {
        "version": "0.1.0", "pid": 7, "boot": "b", "uptime_s": 3700.0, "socket": "/s", "state_dir": "/d",
        "rss_bytes": 30 * MIB, "sessions": 32, "queued": 1, "running": 2, "engine_state": "ready", "engine_pid": 8,
        "engine_rss_bytes": 400 * MIB, "tiers": TIERS, "model": ModelInfo("demo", "ready", device="cpu"),
        "counters": COUNTERS, "counters_at": 3699.0, "warnings": ["odd \x1b[2J"],
    }  # fmt: skip
    return StatusReply(**(values | given))


def drawn(view: View, width: int, height: int, **options: Any) -> list[str]:
    return [line.plain for line in lines(view, width, height, **options)]


def test_shares_and_bandwidths_are_those_of_the_counts() -> None:
    assert figures.found_shares(COUNTERS) == {"device": 0.6, "host": 0.1, "disk": 0.2, "missed": 0.1}
    assert figures.bandwidth(COUNTERS, "disk", "read") == 40 * MIB / 0.02
    assert figures.bandwidth(COUNTERS, "disk", "written") == 100 * MIB / 0.1
    assert figures.bandwidth(COUNTERS, "host", "written") is None
    assert set(figures.found_shares({}).values()) == {None}
    assert figures.bandwidth({}, "disk", "read") is None
    assert figures.percent(0.999) == ">99 %"
    assert figures.percent(0.001) == "<1 %"
    assert [line.split(" (")[0] for line in figures.faults(COUNTERS)] == [
        "2 pages on disk were damaged", "a write to disk failed",
    ]  # fmt: skip


def test_rates_are_differences_by_the_clock_of_the_counts() -> None:
    before = status(counters={"tokens_generated": 100}, counters_at=10.0, uptime_s=50.0)
    after = status(counters={"tokens_generated": 160, "disk_bytes_read": 4096}, counters_at=12.0, uptime_s=50.5)
    rates = figures.rates(before, after)
    assert (rates["tokens_generated"], rates["disk_bytes_read"]) == (30.0, 2048.0)
    assert rates["host_bytes_read"] is None
    for other in (status(boot="c"), status(engine_pid=9), status(counters={"tokens_generated": 90})):
        assert figures.rates(before, other)["tokens_generated"] is None
    assert figures.rates(None, after)["tokens_generated"] is None


@pytest.mark.parametrize("width", [1, 12, 30, 50, 79, 80, 200])
@pytest.mark.parametrize("height", [1, 4, 10, 24, 60])
def test_a_frame_fits_any_terminal(width: int, height: int) -> None:
    rates = dict.fromkeys(figures.rates(None, None), 123_456_789.0)
    views = [
        View(status(), rates, SESSIONS), View(status(), {}, []), View(None, {}, [], "no daemon is listening on /s"),
        View(status(tiers=[], counters={}, model=None, engine_state="failed", engine_error="x" * 300), {}, SESSIONS),
    ]  # fmt: skip
    for view in views:
        shown = lines(view, width, height, hint="q quits")
        assert 0 < len(shown) <= height
        assert max(line.cell_len for line in shown) <= width
        assert "\x1b" not in "".join(line.plain for line in shown)


def test_a_frame_shows_tiers_rates_and_sessions_running_ones_first() -> None:
    rates = {**figures.rates(None, None), "tokens_generated": 61.54, "tokens_prefilled": 2500.0, "disk_bytes_read": 3e6}
    shown = drawn(View(status(), rates, SESSIONS), 80, 24)
    text = "\n".join(shown)
    assert "prefill 2,500  decode 61.5 tokens/s" in text
    assert re.search(r"device ████░░░░  64.0 MiB/128.0 MiB  found  60 %", text)
    assert re.search(r"disk +█{8} +999.0 MiB/1000.0 MiB +found +20 % +r 2.9 MiB/s w -", text)
    wide = "\n".join(drawn(View(status(), rates, SESSIONS), 100, 24))
    assert re.search(r"device █{10}░{10} ", wide)
    fast = dict.fromkeys(rates, 1023.94 * 1024)
    assert "r 1023.9 KiB/s w 1023.9 KiB/s" in "\n".join(drawn(View(status(), fast, []), 80, 24))
    assert "missed 10 % of prefix pages, written to disk today 300.0 MiB" in text
    assert "2 pages on disk were damaged" in text
    head = next(i for i, line in enumerate(shown) if line.startswith("SESSION"))
    assert shown[head + 1].split() == ["*", "a", "talk", "6,021", "6,000", "20", "1"]
    assert shown[head + 2].split()[1:] == ["9", "?", "?", "?", "?"]
    assert len(shown) == 24
    plain = "".join(drawn(View(status(), rates, []), 80, 24, ascii_only=True))
    assert plain.isascii()


def test_status_says_a_dash_for_what_an_engine_does_not_report(root: Path) -> None:
    replies = iter([status(counters={}, tiers=TIERS[:1]), status(), status(tiers=[], counters={}, model=None)])
    with ScriptedBroker(root / "s", lambda rid, body, send: send(next(replies))):
        old, new, none = (atlasctl("status", socket=root / "s").stdout.decode() for _ in range(3))
    assert "missed - of the prefix pages" in old
    assert "TIER" not in none
    assert re.search(r"disk +999.0 MiB +1000.0 MiB +999 +0 +1,000 +20 %", new)
    assert re.search(r"disk +40.0 MiB +2.0 GiB/s +100.0 MiB +1000.0 MiB/s", new)
    assert re.search(r"RAM +8.0 MiB +7.8 GiB/s +0 B +-", new)
    assert "written to disk today (UTC): 300.0 MiB" in new
    assert "fault: 2 pages on disk were damaged" in new
    assert max(map(len, new.splitlines())) <= 80


def test_an_older_daemon_that_knows_no_places_is_shown(root: Path) -> None:
    def script(rid: str, body: Any, send: Send) -> None:
        send(status(counters={}) if isinstance(body, Status) else SessionsReply(SESSIONS[1:2]))

    with ScriptedBroker(root / "s", script) as broker:
        ended = atlasctl("top", "--interval", "0.1", socket=root / "s")
    assert ended.returncode == 0
    assert b"?" in ended.stdout
    assert SessionList(where=True, limit=32) in [body for _, body in broker.requests]


def test_where_a_session_is_adds_up_to_its_tokens(shared_daemon: Daemon) -> None:
    socket = shared_daemon.socket
    turn = answer("generate", "import os\n" * 60, "-s", "cli placed", "-n", "9", "--ignore-eos", socket=socket)
    info = answer("session", "show", "cli placed", socket=socket)["info"]
    assert info["where"] == {"device": info["tokens"] - 1, "disk": 0, "nowhere": 1}
    assert info["tokens"] == turn["usage"]["prompt"] + 9
    shown = atlasctl("session", "show", "cli placed", socket=socket).stdout.decode()
    assert f"KV device {info['tokens'] - 1:,}, disk 0, nowhere 1 tokens" in shown
    answer("session", "append", "cli placed", "import sys\n", socket=socket)
    info = answer("session", "show", "cli placed", socket=socket)["info"]
    assert info["where"]["device"] == info["tokens"]
    answer("session", "delete", "cli placed", socket=socket)


def test_where_is_not_known_without_an_engine_and_said_at_once(daemon: Daemon) -> None:
    """And after a restart the pages are where they were: on disk."""
    daemon.start()
    answer("generate", "import os\n" * 60, "-s", "kept", "-n", "9", "--ignore-eos", socket=daemon.socket)
    daemon.kill()
    daemon.start()
    info = answer("session", "show", "kept", socket=daemon.socket)["info"]
    assert info["where"] == {"device": 0, "disk": info["tokens"] - 1, "nowhere": 1}
    answer("model", "unload", socket=daemon.socket)
    shown = atlasctl("session", "show", "kept", socket=daemon.socket)
    assert b"KV not known" in shown.stdout
    assert answer("session", "show", "kept", socket=daemon.socket)["info"]["where"] == {}
    found = answer("status", socket=daemon.socket)
    assert (found["engine_state"], found["tiers"], found["counters"]) == ("stopped", [], {})


def test_one_frame_of_a_daemon_at_work(shared_daemon: Daemon) -> None:
    socket = shared_daemon.socket

    def work() -> None:
        with Client(socket) as client:
            assert client.session("cli busy").generate("import os\n", max_tokens=500, ignore_eos=True).text

    worker = threading.Thread(target=work)
    worker.start()
    frames = []
    while worker.is_alive():
        frames.append(answer("top", "--once", "--interval", "0.5", socket=socket))
    rates = [frame["rates"]["tokens_generated"] for frame in frames]
    assert any(rate and rate > 1 for rate in rates), rates
    assert any(frame["sessions"][0]["name"] == "cli busy" and frame["sessions"][0]["busy"] for frame in frames)
    text = atlasctl("top", socket=socket).stdout.decode()
    assert re.search(r"^ {2}cli busy .*5\d\d", text, re.MULTILINE)
    assert "\x1b" not in text
    answer("session", "delete", "cli busy", socket=socket)


@pytest.fixture
def scripted(root: Path) -> Iterator[ScriptedBroker]:
    def script(rid: str, body: Any, send: Send) -> None:
        send(status() if isinstance(body, Status) else SessionsReply(SESSIONS))

    with ScriptedBroker(root / "s", script) as broker:
        yield broker


@pytest.mark.parametrize("key", ["q", "\x03", "TERM"])
def test_the_live_view_ends_cleanly(root: Path, scripted: ScriptedBroker, key: str) -> None:
    terminal = Terminal("top", "--interval", "0.2", socket=root / "s")
    before = termios.tcgetattr(terminal._fd)
    assert "\x1b[?1049h" in terminal.wait("a talk")
    assert termios.tcgetattr(terminal._fd)[3] & termios.ICANON == 0
    terminal.wait("q quits")
    if key == "TERM":
        os.kill(terminal.pid, signal.SIGTERM)
    else:
        terminal.type(key)
    terminal.wait(re.escape("\x1b[?1049l"))
    assert terminal.end() == 0
    assert termios.tcgetattr(terminal._fd)[3] == before[3]


def test_the_live_view_outlives_the_daemon(root: Path) -> None:
    def script(rid: str, body: Any, send: Send) -> None:
        send(status() if isinstance(body, Status) else SessionsReply(SESSIONS))

    terminal = Terminal("top", "--interval", "0.2", socket=root / "s")
    terminal.wait("no daemon")
    for boot in ("b1", "b2"):
        with ScriptedBroker(root / "s", script, boot):
            terminal.wait("a talk")
        terminal.wait("no daemon")
    terminal.type("q")
    assert terminal.end() == 0


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_terminals_without_colour_or_cursor(
    root: Path, scripted: ScriptedBroker, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    terminal = Terminal("top", "--interval", "0.2", socket=root / "s", environment={name: value})
    shown = terminal.wait("a talk") + terminal.wait("a talk")
    terminal.type("q")
    assert terminal.end() == 0
    assert not re.search("\x1b\\[[0-9;]*3[0-7]m", shown)
    if name == "TERM":
        assert "\x1b" not in shown


def test_json_at_a_terminal_is_one_object_a_frame(root: Path, scripted: ScriptedBroker) -> None:
    terminal = Terminal("top", "--json", "--interval", "0.2", socket=root / "s")
    seen = terminal.wait("\n") + terminal.wait("\n")
    terminal.type("\x03")
    assert terminal.end() == 0
    frames = [json.loads(line) for line in seen.splitlines()]
    assert [set(frame) for frame in frames] == 2 * [{"status", "derived", "rates", "sessions"}]
    assert frames[0]["derived"]["missed"] == 0.1
    running = started(("top", "--json"), root / "s")
    assert len(running.communicate(timeout=20)[0].splitlines()) == 1
