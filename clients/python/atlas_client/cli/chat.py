"""`atlasctl chat`: turns in a session, with history and slash commands."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ErrorCode, ErrorReply
from ..paths import default_state_dir
from .context import app, common
from .options import sampling
from .output import Writer, clean, emit, plain
from .reply import follow, usage_line

if TYPE_CHECKING:
    from ..client import Client, Session
    from ..protocol import Done

PROMPT = "> "
HISTORY_LINES = 2000
HELP = {
    "/help": "show this",
    "/fork NAME": "go on in a copy of this session",
    "/truncate N": "keep the first N turns",
    "/undo": "take the last turn back",
    "/info": "show the session",
    "/quit": "leave; Ctrl-D does it too",
}


@click.command()
@click.option("-s", "--session", required=True, help="The session; it is made when it does not exist.")
@click.option("--system", help="Text that sets the model's role, for a new session.")
@click.option("--raw", is_flag=True, help="Send lines as plain text, without the model's chat template.")
@click.option("-v", "--verbose", is_flag=True, help="Print tokens and times after each turn.")
@sampling
@common
def chat(session: str, system: str | None, raw: bool, verbose: bool, **options: Any) -> None:
    """Talk with the model in a session that lasts. Ctrl-C stops the answer; Ctrl-D leaves."""
    with app().client() as client:
        talk = Chat(client, session, system, raw, options, verbose)
        talk.begin()
        with History():
            talk.run()


class Leave(Exception):
    """The person wants to leave."""


class Chat:
    """One conversation at the terminal, or line by line from a pipe."""

    def __init__(
        self, client: Client, name: str, system: str | None, raw: bool, options: dict[str, Any], verbose: bool
    ) -> None:
        self._client = client
        self._session: Session = client.session(name)
        self._system = system
        self._raw = raw
        self._options = options
        self._verbose = verbose
        self._out = Writer()
        self._fresh = True  # no answer yet: the first one says what was resumed
        self._interrupted = False  # at the prompt, by the last key

    def begin(self) -> None:
        """Opens the session. Raises ErrorReply, click.UsageError."""
        info = self._session.open()
        if info.turns and self._system is not None:
            raise click.UsageError(f"session {info.name!r} has turns already; --system is for a new one")
        if info.turns:
            self._note(f"session {info.name}: {info.tokens:,} tokens, {info.turns:,} turns; /help shows the commands")
        else:
            self._note(f"new session {info.name}; /help shows the commands")

    def run(self) -> None:
        """Reads lines until the person leaves."""
        while True:
            try:
                line = self._read()
                self._interrupted = False
                if line.startswith("/"):
                    self._command(line)
                elif line.strip():
                    self._turn(line)
            except Leave:
                return
            except EOFError:
                if self._terminal:
                    print()  # the shell's prompt begins a line of its own
                return
            except KeyboardInterrupt:
                if self._interrupted:
                    self._note("\nleft")
                    return
                self._interrupted = True
                self._note("\nCtrl-C again or Ctrl-D leaves")
            except ErrorReply as error:
                self._error(error)

    def _read(self) -> str:
        if self._terminal:
            return input(PROMPT)
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        try:
            return line.decode("utf-8").rstrip("\n")
        except UnicodeDecodeError as error:
            raise click.UsageError(f"standard input is not UTF-8: byte 0x{line[error.start]:02x}") from None

    @property
    def _terminal(self) -> bool:
        return sys.stdin.isatty() and sys.stdout.isatty()

    def _turn(self, line: str) -> None:
        if self._raw:
            generation = self._session.generate(line + "\n", **self._options)
        else:
            system = [{"role": "system", "content": self._system}] if self._system is not None else []
            messages = [*system, {"role": "user", "content": line}]
            generation = self._session.generate(messages=messages, **self._options)
        try:
            done = follow(generation, (lambda piece: None) if app().json else self._out.write)
        except KeyboardInterrupt:
            self._note("\nstopped; the turn was " + ("kept: it was complete" if generation.complete else "not kept"))
            return
        self._system = None
        self._after(done)

    def _after(self, done: Done) -> None:
        if app().json:
            emit(plain(done))
            return
        self._out.write("" if done.text.endswith("\n") else "\n")
        if self._fresh and done.usage.restored:
            self._note(f"resumed {done.usage.restored:,} tokens from disk in {done.timings.restore_ms:,.0f} ms")
        self._fresh = False
        if self._verbose:
            self._note(usage_line(done))
        if not done.durable:
            self._note("this turn is NOT durable")

    def _command(self, line: str) -> None:
        name, _, argument = line.strip().partition(" ")
        commands = {
            "/help": self._help,
            "/fork": self._fork,
            "/truncate": self._truncate,
            "/undo": self._undo,
            "/info": self._info,
            "/quit": self._quit,
        }
        if name not in commands:
            close = difflib.get_close_matches(name, commands, 1, 0.5)
            hint = f"; did you mean {close[0]}?" if close else "; /help shows the commands"
            self._note(f"there is no {name}{hint}")
        else:
            commands[name](argument.strip())

    def _help(self, argument: str) -> None:
        for name, what in HELP.items():
            self._note(f"{name:<12} {what}")

    def _fork(self, name: str) -> None:
        if not name:
            self._note("/fork needs the new session's name")
            return
        self._session = self._session.fork(name)
        self._note(f"now in {name}")

    def _truncate(self, argument: str) -> None:
        if not argument.isdecimal():
            self._note("/truncate needs the number of turns to keep")
            return
        self._keep(int(argument))

    def _undo(self, argument: str) -> None:
        turns = self._session.info().turns
        if turns:
            self._keep(turns - 1)
        else:
            self._note("there is no turn to take back")

    def _keep(self, turns: int) -> None:
        info = self._session.truncate(turns=turns)
        self._note(f"{info.turns:,} turns, {info.tokens:,} tokens left")

    def _info(self, argument: str) -> None:
        info = self._session.info()
        self._note(f"{info.name}: {info.tokens:,} tokens, {info.turns:,} turns, model {info.model or 'none'}")

    def _quit(self, argument: str) -> None:
        raise Leave

    def _error(self, error: ErrorReply) -> None:
        """Says what went wrong and goes on, at a terminal; ends the program when lines come from a pipe."""
        if error.code == ErrorCode.INVALID_PARAMETER and "chat template" in error.message:
            step = f"`atlasctl generate --session {self._session.name}` or `chat --raw`, for plain text"
            error = ErrorReply(error.code, error.message, step)
        if not self._terminal:
            raise error
        self._note(f"{error.code.value}: {error.message}\n  next: {error.next_step}")

    def _note(self, line: str) -> None:
        """What is not the model's, on standard error."""
        if not app().json:
            print(clean(line), file=sys.stderr, flush=True)


class History:
    """Line editing with a history file in the user's state directory, at a terminal only."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or default_state_dir() / "chat_history"
        self._readline: Any = None

    def __enter__(self) -> None:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return
        import readline

        self._readline = readline
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            readline.read_history_file(self._path)
        except OSError:
            return  # no history yet, or none to be had: chatting goes on without

    def __exit__(self, *reason: object) -> None:
        if self._readline is None:
            return
        self._readline.set_history_length(HISTORY_LINES)
        try:
            self._readline.write_history_file(self._path)
            self._path.chmod(0o600)
        except OSError as error:
            print(f"atlasctl: the history could not be kept: {error}", file=sys.stderr)
