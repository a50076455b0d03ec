"""Records the picture of the README: a real chat in a real terminal, its daemon killed in between.

python packaging/pictures/record.py      (needs tmux; a daemon is started on a directory of its own)
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

OUTPUT = Path(__file__).with_name("resumed-chat.svg")
WIDTH, HEIGHT = 100, 30
CHAT = "atlasctl chat --raw --session notes -n 28 --temperature 0"
KILL = "kill -9 $(atlasctl status --json | grep -oE 'pid\": [0-9]+' | tr -dc '0-9\\n')"
LIMIT_S = 90.0


class Terminal:
    """A shell in a tmux window."""

    def __init__(self, home: Path) -> None:
        rc = home / "rc"
        rc.write_text("PS1='$ '\n")
        self._server = f"record-{os.getpid()}"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        shell = f"env PATH={path} ATLAS_SOCKET={home}/s ATLAS_HOME={home}/state bash --rcfile {rc} -i"
        self._tmux("new-session", "-d", "-x", str(WIDTH), "-y", str(HEIGHT), shell)
        self.wait("$ ")

    def _tmux(self, *command: str) -> str:
        return subprocess.run(["tmux", "-L", self._server, *command], check=True, capture_output=True, text=True).stdout

    def screen(self, *, color: bool = False) -> str:
        return self._tmux("capture-pane", "-p", *(["-e"] if color else []))

    def wait(self, prompt: str) -> None:
        """Until the last line is `prompt`, twice in a row."""
        end, seen = time.monotonic() + LIMIT_S, 0
        while seen < 3:
            if time.monotonic() > end:
                raise SystemExit(f"no {prompt!r} at the end of:\n{self.screen()}")
            seen = seen + 1 if self.screen().rstrip("\n").split("\n")[-1].rstrip() == prompt.rstrip() else 0
            time.sleep(0.2)

    def type(self, line: str, prompt: str) -> None:
        """Types a line and waits for the next prompt."""
        self._tmux("send-keys", "-l", line)
        self._tmux("send-keys", "Enter")
        time.sleep(0.5)
        self.wait(prompt)

    def key(self, key: str, prompt: str) -> None:
        self._tmux("send-keys", key)
        time.sleep(0.5)
        self.wait(prompt)

    def close(self) -> None:
        self._tmux("kill-server")


def record(terminal: Terminal, source: Path) -> str:
    """Plays the scene and returns the screen with its colours."""
    terminal.type("atlasctl up -- --kv-ram-gb 1", "$ ")
    terminal.type(f"head -c 16000 {shlex.quote(str(source))} > module.py; "
                  "atlasctl session append notes --file module.py", "$ ")  # fmt: skip
    terminal.type("clear", "$ ")
    terminal.type(CHAT, ">")
    terminal.type("class Reader(", ">")
    terminal.key("C-d", "$ ")
    terminal.type(f"{KILL}; atlasctl up -- --kv-ram-gb 1", "$ ")
    terminal.type(CHAT, ">")
    terminal.type("    def close(self):", ">")
    terminal.key("C-d", "$ ")
    screen = terminal.screen(color=True)
    terminal.type("atlasctl down", "$ ")
    return screen


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="atlas-") as path:
        os.chdir(path)
        terminal = Terminal(Path(path))
        try:
            screen = record(terminal, Path(sysconfig.get_path("stdlib")) / "argparse.py")
        finally:
            terminal.close()
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    console.print(
        Text.from_ansi(screen.rstrip("\n").removesuffix("$").rstrip("\n").replace(path, "/run/user/1000/atlasd"))
    )
    picture = console.export_svg(title="atlasctl chat")
    OUTPUT.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL), encoding="utf-8")  # no web fonts


if __name__ == "__main__":
    main()
