"""`atlasctl` without a daemon: what it imports, how it refuses, its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_support import Terminal, atlasctl
from client_support import ScriptedBroker, done

HEAVY = ("torch", "transformers", "numpy")
COMMANDS = [
    ("generate", "x"), ("chat", "-s", "a"), ("session", "list"), ("session", "open", "a"),
    ("session", "append", "a", "x"),
    ("session", "fork", "a", "b"), ("session", "truncate", "a", "--turns", "1"), ("session", "show", "a"),
    ("session", "rename", "a", "b"), ("session", "checkpoint", "a"), ("session", "export", "a", "-o", "f"),
    ("session", "import", "a", "-"), ("session", "delete", "a"), ("model", "list"), ("model", "load", "demo"),
    ("model", "unload"), ("status",), ("top",),
]  # fmt: skip


def _modules(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules, file=sys.stderr)"
    return set(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stderr.split())


def test_importing_the_client_loads_nothing_heavy() -> None:
    bare = _modules("import atlas_client")
    assert "atlas_client" in bare
    assert not bare & {*HEAVY, "zmq", "msgspec", "click", "rich"}
    used = _modules("from atlas_client import Client, AsyncClient, ErrorReply\nClient(); AsyncClient()")
    assert {"zmq", "msgspec"} <= used
    assert not used & {*HEAVY, "click", "rich"}


def test_help_loads_nothing_heavy() -> None:
    run = "from atlas_client.cli.main import main\ntry: main({})\nexcept SystemExit: pass"
    loaded = _modules(run.format("['--help']"))
    assert "click" in loaded
    assert not loaded & {*HEAVY, "zmq", "msgspec", "rich"}
    every = "\n".join(
        run.format(f"{[command, '--help']}")
        for command in ("generate", "chat", "session", "doctor", "up", "status", "top")
    )
    assert not _modules(every) & {*HEAVY, "zmq", "msgspec", "rich"}


def test_nothing_but_the_error_names_is_exported_wrongly() -> None:
    import atlas_client

    for name in atlas_client.__all__:
        assert getattr(atlas_client, name).__name__ == name
    with pytest.raises(AttributeError, match="Klient"):
        _ = atlas_client.Klient


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_without_a_daemon_each_command_says_how_to_start_one(root: Path, command: tuple[str, ...]) -> None:
    ended = atlasctl(*command, socket=root / "s", stdin=b"")
    assert ended.returncode == 3
    assert ended.stdout == b""
    assert b"no daemon is listening" in ended.stderr
    assert b"atlasctl up" in ended.stderr


def test_an_error_is_json_when_json_is_asked_for(root: Path) -> None:
    for arguments in (("--json", "status"), ("status", "--json")):
        ended = atlasctl(*arguments, socket=root / "s")
        error = json.loads(ended.stdout)["error"]
        assert (ended.returncode, error["code"], error["retryable"]) == (3, "NO_DAEMON", True)
        assert "atlasctl up" in error["next_step"]
        assert ended.stderr == b""
    ended = atlasctl("generate", "--json", "--nope", socket=root / "s")
    assert (ended.returncode, json.loads(ended.stdout)["error"]["code"]) == (2, "USAGE")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generat", "x"), "Did you mean 'generate'?"),
        (("session", "lst"), "Did you mean 'list'?"),
        (("generate", "x", "--temprature", "1"), "--temperature"),
        (("generate", "x", "--temperature", "hot"), "hot"),
        (("generate", "x", "--temperature", "-1"), "-1"),
        (("generate", "x", "--top-p", "0"), "top-p"),
        (("generate", "x", "--logit-bias", "seven=1"), "TOKEN_ID=VALUE"),
        (("generate", "x", "-n", "many"), "many"),
        (("generate", "@no-such-file"), "write @@no-such-file"),
        (("generate", "-f", "no-such-file"), "No such file"),
        (("generate", "x", "-f", "y"), "one is needed"),
        (("chat",), "--session"),
        (("session", "truncate", "a"), "--turns"),
        (("session", "truncate", "a", "--turns", "1", "--tokens", "1"), "exclude"),
        (("session", "fork", "a", "b", "--turn", "1", "--token", "1"), "exclude"),
        (("session", "fork", "a"), "NEW_NAME"),
        (("session", "export", "a", "--json"), "--output"),
        (("session", "import", "a", "no-such-file"), "No such file"),
        (("session", "rename", "a"), "NEW_NAME"),
        (("model", "load"), "NAME"),
        (("status", "now"), "now"),
        (("up", "--nope"), "--nope"),
        (("down", "--timeout", "soon"), "soon"),
        (("doctor", "--fix"), "--fix"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_usage_is_said_and_exits_with_2(root: Path, arguments: tuple[str, ...], said: str) -> None:
    ended = atlasctl(*arguments, socket=root / "s")
    assert ended.returncode == 2, ended
    assert said in (ended.stderr + ended.stdout).decode()
    assert b"Traceback" not in ended.stderr


def test_text_that_is_not_utf8_is_refused(root: Path) -> None:
    (root / "bad").write_bytes(b"ok\xff")
    for arguments, stdin in ((("generate", "-"), b"a\xffb"), (("generate", "-f", str(root / "bad")), b"")):
        ended = atlasctl(*arguments, socket=root / "s", stdin=stdin)
        assert ended.returncode == 2
        assert b"not UTF-8" in ended.stderr
        assert b"0xff" in ended.stderr


def test_a_terminal_without_a_prompt_is_a_usage_error(root: Path) -> None:
    terminal = Terminal("generate", socket=root / "s")
    terminal.wait("no prompt")
    assert terminal.end() == 2


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_access_denied_exits_with_4(root: Path) -> None:
    root.chmod(0o755)
    code = (
        "import os, sys; import atlas_client.client, atlas_client.cli.status, atlas_client.cli.output\n"
        "from atlas_client.cli.main import main\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "main(['--socket', sys.argv[1], 'status', '--json'])\n"
    )
    with ScriptedBroker(root / "s", lambda rid, body, send: send(done([], ""))):
        (root / "s").chmod(0o660)
        ended = subprocess.run([sys.executable, "-c", code, str(root / "s")], capture_output=True)
    assert ended.returncode == 4, ended
    assert json.loads(ended.stdout)["error"]["code"] == "UNAUTHORIZED"


def test_up_shows_why_the_daemon_ended(root: Path) -> None:
    ended = atlasctl("up", "--state-dir", str(root / "state"), "--", "--no-such-flag", socket=root / "s")
    assert ended.returncode == 3
    assert b"--no-such-flag" in ended.stderr
    assert str(root / "state" / "atlasd.log").encode() in ended.stderr


def test_down_without_a_daemon_is_no_error(root: Path) -> None:
    ended = atlasctl("down", socket=root / "s")
    assert ended.returncode == 0
    assert b"no daemon is running" in ended.stdout


def test_doctor_names_what_is_broken(root: Path) -> None:
    ended = atlasctl("doctor", "--json", socket=root / "s", home=root)
    found = json.loads(ended.stdout)
    states = {check["name"]: check for check in found["checks"]}
    assert ended.returncode == 1
    assert not found["ok"]
    assert states["daemon"]["state"] == "broken"
    assert "atlasctl up" in states["daemon"]["mend"]
    for name in ("python", "packages", "disk", "state", "cpu"):
        assert states[name]["state"] == "ok", states[name]
    assert states["kernels"]["state"] in ("ok", "warning")  # there may be no compiler
    assert all(check["mend"] for check in found["checks"] if check["state"] != "ok")
