"""`make demo`: a long conversation outlives its daemon.

Starts private daemons on the bundled model, streams a completion through `atlasctl`, and runs a session of about 6,000
tokens twice: once undisturbed, once with daemon and engine killed (SIGKILL) between its two turns. Then the KV cache is
deleted and the second turn computed from scratch. Prints what happened and writes build/demo.json. Exit status 1 when
the resumed continuation is not, token by token, that of the undisturbed run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from atlas_client import AtlasError, Client, DaemonUnavailable
from atlas_client.protocol import Done

REPOSITORY = Path(__file__).resolve().parents[1]
RESULT = REPOSITORY / "build" / "demo.json"
TOKENS = 6000
SESSION = "yesterday"
QUESTION = "\n\ndef main():\n    "
ANSWER_TOKENS = 48
START_LIMIT_S = 180.0


class DemoError(Exception):
    """The demo could not go on; the message says why."""


class Daemon:
    """A private `atlasd` on the bundled model. Its state outlives its process, until the folder is removed."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "s"
        self.state = folder / "state"
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Returns the seconds until the model was ready. Raises DemoError with the end of the log."""
        began = time.monotonic()
        command = [sys.executable, "-m", "atlasd", "--model", "demo", "--kv-disk-gb", "1"]
        command += ["--socket", str(self.socket), "--state-dir", str(self.state)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        while time.monotonic() - began < START_LIMIT_S and self._process.poll() is None:
            if (state := self._engine_state()) == "ready":
                return time.monotonic() - began
            if state == "failed":
                break
            time.sleep(0.05)
        raise DemoError(f"the daemon did not become ready; its log ends:\n{self._log.read_text()[-2000:]}")

    def _engine_state(self) -> str:
        try:
            with Client(self.socket) as client:
                return client.status().engine_state
        except DaemonUnavailable:
            return "no answer"

    def ask(self, prompt: str | None = None, *, tokens: list[int] | None = None) -> Done:
        """One greedy turn of the session, by text or token ids."""
        with Client(self.socket) as client:
            turn = client.generate(
                prompt, tokens=tokens, session=SESSION, max_tokens=ANSWER_TOKENS, temperature=0, ignore_eos=True
            )
            return turn.result

    def forget_last_turn(self) -> None:
        """Truncates the session to its first turn."""
        with Client(self.socket) as client:
            client.session(SESSION, create=False).truncate(turns=1)

    def kill(self) -> None:
        """SIGKILL to the broker and the engine, as a power switch would. Nothing gets a chance to tidy up."""
        if self._process is None or self._process.poll() is not None:
            return
        pids = [self._process.pid, *_children(self._process.pid)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        while any(_runs(pid) for pid in pids[1:]):
            time.sleep(0.01)


def _children(pid: int) -> list[int]:
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


def _runs(pid: int) -> bool:
    """False also for a process that has ended and that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def private_daemon() -> Iterator[Daemon]:
    """A daemon, not started, in a temporary folder that is removed afterwards. Socket paths hold 103 bytes at most."""
    place = "/tmp" if len(tempfile.gettempdir()) > 60 else None
    folder = Path(tempfile.mkdtemp(prefix="atlas-", dir=place))
    daemon = Daemon(folder)
    try:
        yield daemon
    finally:
        daemon.kill()
        shutil.rmtree(folder, ignore_errors=True)


def source_tokens(count: int) -> list[int]:
    """Token ids of Python source text: this machine's standard library, file by file in order of name."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(REPOSITORY / "packaging" / "demo-model" / "tokenizer.json"))
    ids: list[int] = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        ids += tokenizer.encode(file.read_text(encoding="utf-8")).ids
        if len(ids) >= count:
            break
    return ids[:count]


def say(text: str) -> None:
    print(text, flush=True)


def stream_completion(daemon: Daemon) -> None:
    """`atlasctl generate` on this terminal. Raises DemoError when it fails."""
    arguments = ["generate", "def fibonacci(n):", "--max-tokens", "40", "--temperature", "0"]
    say(f"\n$ atlasctl {arguments[0]} '{arguments[1]}' {' '.join(arguments[2:])}")
    program = Path(sys.executable).with_name("atlasctl")
    done = subprocess.run([program, "--socket", daemon.socket, *arguments], check=False)
    if done.returncode:
        raise DemoError(f"atlasctl ended with status {done.returncode}")


def undisturbed(prompt: list[int]) -> list[Done]:
    """The session's two turns in one life of a daemon."""
    with private_daemon() as daemon:
        say(f"Private daemon on the bundled model: ready after {daemon.start():.1f} s")
        stream_completion(daemon)
        say(f"\nA session of {len(prompt):,} tokens, undisturbed: two turns in one life of the daemon …")
        return [daemon.ask(tokens=prompt), daemon.ask(QUESTION)]


def killed_between(prompt: list[int]) -> tuple[list[Done], Done]:
    """The two turns with a kill between them, and the second one again without any KV cache."""
    with private_daemon() as daemon:
        daemon.start()
        say("The same session in another daemon: first turn …")
        first = daemon.ask(tokens=prompt)
        daemon.kill()
        say("kill -9: daemon and engine are gone")
        say(f"Started again: ready after {daemon.start():.1f} s; the session goes on …")
        second = daemon.ask(QUESTION)
        daemon.forget_last_turn()
        daemon.kill()
        shutil.rmtree(daemon.state / "kv")
        daemon.start()
        say("For comparison, its KV cache deleted: the second turn computed from scratch …")
        return [first, second], daemon.ask(QUESTION)


def compare(reference: list[Done], resumed: list[Done], recomputed: Done) -> dict[str, object]:
    """The figures of build/demo.json."""
    second = resumed[1]
    return {
        "prompt_tokens": second.usage.prompt,
        "restored_tokens": second.usage.restored,
        "prefilled_tokens": second.usage.prefilled,
        "recomputed_tokens": recomputed.usage.prefilled,
        "ttft_resumed_ms": round(second.timings.ttft_ms, 1),
        "ttft_recomputed_ms": round(recomputed.timings.ttft_ms, 1),
        "ratio": round(second.timings.ttft_ms / recomputed.timings.ttft_ms, 4),
        "compared_tokens": sum(len(turn.tokens) for turn in reference),
        "identical": [turn.tokens for turn in resumed] == [turn.tokens for turn in reference],
        "recomputed_identical": recomputed.tokens == reference[1].tokens,
    }


def report(result: dict[str, object]) -> None:
    """For a person; the last line is the verdict."""
    speed = 1 / float(str(result["ratio"]))
    say(f"\n  tokens restored from disk    {result['restored_tokens']:>8,} of {result['prompt_tokens']:,}")
    say(f"  time to first token, resumed {result['ttft_resumed_ms']:>8} ms")
    say(f"  the same, from scratch       {result['ttft_recomputed_ms']:>8} ms  ({speed:.0f} times as long)")
    verdict = "identical to" if result["identical"] else "NOT identical to"
    say(f"  the {result['compared_tokens']} generated tokens are {verdict} those of the undisturbed run\n")


def main() -> int:
    prompt = source_tokens(TOKENS)
    try:
        reference = undisturbed(prompt)
        resumed, recomputed = killed_between(prompt)
    except (DemoError, AtlasError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    result = compare(reference, resumed, recomputed)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    report(result)
    return 0 if result["identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
