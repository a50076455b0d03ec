"""`atlasctl` against the real daemon on the bundled model."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from cli_support import ATLASCTL, Terminal, answer, atlasctl
from conftest import Daemon

PROMPT = "def read_lines(path):\n"
FIELDS = {
    "text", "tokens", "finish_reason", "usage", "timings", "session", "durable", "kv_durable", "reset_reason", "seed",
    "request_id", "logprobs",
}  # fmt: skip


def test_generate_streams_what_json_reports(shared_daemon: Daemon) -> None:
    arguments = ("generate", PROMPT, "-n", "8", "--temperature", "0")
    found = answer(*arguments, "--logprobs", "2", socket=shared_daemon.socket)
    assert set(found) == FIELDS
    assert set(found["usage"]) == {"prompt", "reused", "restored", "prefilled", "generated"}
    assert set(found["timings"]) == {"queue_ms", "restore_ms", "prefill_ms", "ttft_ms", "decode_tokens_per_s"}
    assert [entry["id"] for entry in found["logprobs"]] == found["tokens"]
    assert all(len(entry["top"]) == 2 for entry in found["logprobs"])
    ended = atlasctl(*arguments, socket=shared_daemon.socket)
    assert (ended.returncode, ended.stdout.decode(), ended.stderr) == (0, found["text"], b"")


def test_bad_values_reach_the_user_with_the_next_step(shared_daemon: Daemon) -> None:
    for arguments in (("generate", "x " * 20000, "-n", "1"), ("generate", "x", "--model", "another")):
        ended = atlasctl(*arguments, socket=shared_daemon.socket)
        assert ended.returncode == 1
        assert b"next: " in ended.stderr
    assert b"MODEL_NOT_LOADED" in ended.stderr
    for arguments in (
        ("session", "show", "nowhere"),
        ("session", "delete", "nowhere"),
        ("session", "export", "nowhere", "-o", "x"),
    ):
        ended = atlasctl(*arguments, socket=shared_daemon.socket)
        assert ended.returncode == 1
        assert b"NO_SUCH_SESSION" in ended.stderr
    assert not Path("x").exists()


def test_sessions_by_command(shared_daemon: Daemon, root: Path) -> None:
    socket = shared_daemon.socket
    assert answer("session", "open", "cli one", socket=socket)["tokens"] == 0
    turn = answer("generate", PROMPT, "-s", "cli one", "-n", "4", "--temperature", "0", socket=socket)
    assert turn["session"] == "cli one"
    assert turn["durable"]
    assert answer("session", "append", "cli one", "-", socket=socket, stdin=b"# more\n")["finish_reason"] == "append"
    shown = answer("session", "show", "cli one", "--text", "--tokens", socket=socket)
    assert shown["turns"][0]["text"] == turn["text"]
    assert len(shown["tokens"]) == shown["info"]["tokens"]
    assert answer("session", "fork", "cli one", "cli fork", "--turn", "1", socket=socket)["turns"] == 1
    assert answer("session", "truncate", "cli one", "--turns", "1", socket=socket)["turns"] == 1
    assert answer("session", "rename", "cli one", "cli two", socket=socket)["name"] == "cli two"
    answer("session", "checkpoint", "cli two", socket=socket)
    archive = root / "archive"
    answer("session", "export", "cli two", "-o", str(archive), socket=socket)
    piped = atlasctl("session", "export", "cli two", socket=socket)
    assert piped.returncode == 0
    assert piped.stdout
    assert answer("session", "import", "cli three", str(archive), socket=socket)["turns"] == 1
    names = {info["name"] for info in answer("session", "list", socket=socket)["sessions"]}
    assert {"cli two", "cli fork", "cli three"} <= names
    listed = atlasctl("session", "list", socket=socket).stdout.decode()
    assert "cli three" in listed
    for name in ("cli two", "cli fork", "cli three"):
        assert answer("session", "delete", name, socket=socket)["deleted"]
    damaged = atlasctl("session", "import", "cli bad", "-", socket=socket, stdin=archive.read_bytes()[:-3])
    assert damaged.returncode == 1


def test_status_models_and_doctor(shared_daemon: Daemon) -> None:
    socket = shared_daemon.socket
    status = answer("status", socket=socket)
    assert (status["engine_state"], status["socket"]) == ("ready", str(socket))
    assert "engine   ready" in atlasctl("status", socket=socket).stdout.decode()
    assert "demo" in {model["name"] for model in answer("model", "list", socket=socket)["models"]}
    assert answer("model", "load", "demo", socket=socket)["state"] == "ready"
    assert atlasctl("model", "list", socket=socket).returncode == 0
    found = answer("doctor", socket=socket)
    assert found["ok"]
    assert {check["state"] for check in found["checks"] if check["name"] in ("daemon", "engine")} == {"ok"}


def test_a_chat_that_is_interrupted_and_resumed(shared_daemon: Daemon) -> None:
    socket = shared_daemon.socket
    terminal = Terminal("chat", "-s", "cli talk", "--raw", "-n", "6", "--temperature", "0", "-v", socket=socket)
    terminal.wait("new session[^>]*> ")
    terminal.type("import os\n")
    terminal.wait("tokens/s")
    terminal.wait("> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    turns = answer("session", "show", "cli talk", socket=socket)["info"]["turns"]
    assert turns == 1
    flags = ("--raw", "-n", "1000", "--ignore-eos", "--temperature", "0")
    terminal = Terminal("chat", "-s", "cli talk", *flags, socket=socket)
    terminal.wait("1 turns[^>]*> ")
    terminal.type("import sys\n")
    terminal.wait("import sys\r\n.")
    terminal.type("\x03")
    terminal.wait("stopped[^>]*> ")
    terminal.type("/quit\n")
    assert terminal.end() == 0
    assert answer("session", "show", "cli talk", socket=socket)["info"]["turns"] == turns
    answer("session", "delete", "cli talk", socket=socket)


def test_up_says_what_runs_and_down_stops_it(root: Path) -> None:
    started = answer("up", "--no-wait", "--state-dir", str(root / "state"), "--", "--threads", "1", socket=root / "s")
    pid = started["status"]["pid"]
    try:
        assert started["started"]
        again = atlasctl("up", socket=root / "s")
        assert again.returncode == 0
        assert f"already running: pid {pid}".encode() in again.stdout
        assert atlasctl("up", "--", "--threads", "1", socket=root / "s").returncode == 0
        others = (("--model", "a/b"), ("--state-dir", "elsewhere"), ("--", "--threads", "2"))
        for other in others:
            refused = atlasctl("up", *other, socket=root / "s")
            assert refused.returncode == 1
            assert b"running already" in refused.stderr
        assert answer("down", socket=root / "s") == {"stopped": True, "pid": pid}
        assert not Path(f"/proc/{pid}/exe").exists()
    finally:
        with_pid = Path(f"/proc/{pid}/exe")
        if with_pid.exists():
            os.kill(pid, 9)
    assert atlasctl("status", socket=root / "s").returncode == 3


def test_a_daemon_takes_no_modules_from_the_directory_it_is_started_in(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("lmdb", "torch", "json"):
        (root / f"{module}.py").write_text("raise SystemExit(f'{__file__} was imported')\n")
    monkeypatch.chdir(root)
    answer("up", "--state-dir", str(root / "state"), "--", "--threads", "1", socket=root / "s")
    answer("down", socket=root / "s")


def test_a_model_directory_is_looked_for_from_here(
    shared_daemon: Daemon, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "here").mkdir()
    monkeypatch.chdir(root)
    refused = atlasctl("model", "load", "here", socket=shared_daemon.socket)
    assert f"{root}/here/config.json is missing".encode() in refused.stderr
    assert answer("status", socket=shared_daemon.socket)["engine_state"] == "ready"


def test_an_archive_is_written_to_a_pipe_and_through_a_link_not_in_their_place(
    shared_daemon: Daemon, root: Path
) -> None:
    socket, pipe, link, file = shared_daemon.socket, root / "pipe", root / "link", root / "file"
    answer("generate", PROMPT, "-s", "cli piped", "-n", "2", socket=socket)
    os.mkfifo(pipe)
    link.symlink_to(file)
    answer("session", "export", "cli piped", "-o", str(link), socket=socket)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        answer("session", "export", "cli piped", "-o", str(pipe), socket=socket)
        assert os.read(reader, 1 << 20) == file.read_bytes()
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert link.is_symlink()
    answer("session", "delete", "cli piped", socket=socket)


@pytest.mark.parametrize("command", [("generate", PROMPT, "-n", "2"), ("session", "list"), ("status", "--json")])
def test_a_full_disk_under_the_output_is_no_traceback(shared_daemon: Daemon, command: tuple[str, ...]) -> None:
    environment = {**os.environ, "ATLAS_SOCKET": str(shared_daemon.socket)}
    with open("/dev/full", "wb") as full:
        ended = subprocess.run([*ATLASCTL, *command], stdout=full, stderr=subprocess.PIPE, env=environment, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.startswith(b"atlasctl: OUTPUT: standard output: No space left on device")
    assert b"Traceback" not in ended.stderr


@pytest.mark.parametrize("name", ["", "x" * 201])
def test_a_session_name_that_is_none(shared_daemon: Daemon, name: str) -> None:
    ended = atlasctl("session", "open", name, socket=shared_daemon.socket)
    assert ended.returncode == 1
    assert b"INVALID_PARAMETER" in ended.stderr
