"""Time to first token of a 6,000-token session: resumed from disk after SIGKILL, against computed from scratch.

Both are taken in one daemon life, in turn, medians of ROUNDS; the page cache is warm, as after a crash of the daemon.
"""

from __future__ import annotations

import statistics
import sys
import sysconfig
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from atlas_client import Client
from atlas_client.protocol import Done
from conftest import Daemon
from report import row

TOKENS = 6000
ROUNDS = 5
BAR = 1 / 15


def source(count: int) -> list[int]:
    """Token ids of Python source: the standard library's own, in alphabetical order."""
    from families import DEMO
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids: list[int] = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if len(ids) >= count:
            break
        ids += tokenizer.encode(file.read_text(encoding="utf-8")).ids
    return ids[:count]


def question(socket: Path, session: str) -> Done:
    """The next turn of a session."""
    with Client(socket) as client:
        return client.generate("\ndef answer(", session=session, max_tokens=8, temperature=0).result


def main() -> None:
    ids = source(TOKENS)
    with tempfile.TemporaryDirectory(prefix="atlas-") as path:
        daemon = Daemon(Path(path))
        daemon.start()
        with Client(daemon.socket) as client:
            for n in range(ROUNDS):
                # another first token: otherwise all sessions would share their pages
                client.session(f"s{n}").append(tokens=[7 + n, *ids[1:]])
        daemon.kill()
        daemon.start()
        with Client(daemon.socket) as client:
            print(client.generate("warm up", max_tokens=4).result.finish_reason)
        resumed, computed = [], []
        for n in range(ROUNDS):
            done = question(daemon.socket, f"s{n}")
            if done.usage.restored < TOKENS - 64:
                raise SystemExit(f"only {done.usage.restored} tokens were restored: {done.reset_reason}")
            resumed.append(done.timings.ttft_ms)
            with Client(daemon.socket) as client:
                fresh = client.generate(tokens=[107 + n, *ids[1:]], max_tokens=1, temperature=0).result
            if fresh.usage.prefilled != TOKENS:
                raise SystemExit(f"{fresh.usage.prefilled} tokens were computed, not {TOKENS}")
            computed.append(fresh.timings.ttft_ms)
        daemon.kill()
    ttft, peer = statistics.median(resumed), statistics.median(computed)
    command = "make bench ONLY=resume"
    row("resume", "time to first token computed from scratch", peer, "ms", command=command)
    against = f"computed from scratch: {peer:.0f} ms"
    row(
        "resume",
        "time to first token resumed",
        ttft,
        "ms",
        against=against,
        ratio=ttft / peer,
        bar=BAR,
        command=command,
    )


if __name__ == "__main__":
    main()
