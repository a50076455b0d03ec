"""`atlasctl`: the list of commands, their lazy import, and the exit codes.

Exit codes: 0 done, 1 error reply, 2 usage, 3 no daemon, 4 refused, 130 cancelled. With --json a command prints one JSON
object on standard output: its result, or {"error": {code, message, retryable, next_step}}.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Any

import click

from .. import __version__
from ..errors import AtlasError, DaemonUnavailable, ErrorCode, ErrorReply
from .context import Group, common

OK, ERROR, USAGE, NO_DAEMON, REFUSED, CANCELLED = 0, 1, 2, 3, 4, 130
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # what writing to standard output may end with

COMMANDS = {
    "generate": "Complete a prompt, in a session or without one.",
    "chat": "Talk with the model in a session that lasts.",
    "session": "Open, list, fork, cut, move and delete sessions.",
    "model": "List, load and unload models.",
    "status": "Show the daemon, its engine, model and memory.",
    "top": "Watch the engine, the memory tiers and the sessions live.",
    "doctor": "Check this machine and say how to mend what is broken.",
    "up": "Start a daemon in the background.",
    "down": "Stop the daemon.",
}
_FILES = {"up": "daemon", "down": "daemon"}


class Commands(Group):
    """Imports a command's file when the command is run, so that --help stays quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f".{_FILES.get(cmd_name, cmd_name)}", __package__)
        command: click.Command = getattr(module, cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # click itself would exit with 1
            return _mute()

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="atlasctl")
@common
def cli() -> None:
    """Works with atlasd, the local LLM daemon that keeps long conversations."""


def main(argv: list[str] | None = None) -> None:
    """Runs a command and ends the process with its exit code."""
    args = sys.argv[1:] if argv is None else argv
    code = run(args)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _mute() or code
    except OSError as error:
        code = _lost(error)
    sys.exit(code)


def run(args: list[str]) -> int:
    """Runs a command; every error becomes a message and an exit code."""
    as_json = "--json" in args[: args.index("--")] if "--" in args else "--json" in args
    try:
        return cli.main(args, prog_name="atlasctl", standalone_mode=False) or OK
    except click.UsageError as error:
        return _usage(error, as_json)
    except click.ClickException as error:
        return _report(USAGE, "USAGE", error.format_message(), "", False, as_json)
    except (click.Abort, KeyboardInterrupt):
        return _report(CANCELLED, "CANCELLED", "cancelled", "", False, as_json)
    except AtlasError as error:
        return _failed(error, as_json)
    except OSError as error:
        if error.errno not in FULL:
            raise
        return _lost(error)


def _lost(error: OSError) -> int:
    """Standard output can't be written to: an error in JSON would be lost too, so it goes to standard error as text."""
    _mute()
    return _report(
        ERROR, "OUTPUT", f"standard output: {error.strerror}", "free space, or write elsewhere", False, False
    )


def _mute() -> int:
    """Nobody reads standard output any more: say nothing further, not even at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return CANCELLED


def _usage(error: click.UsageError, as_json: bool) -> int:
    path = error.ctx.command_path if error.ctx else "atlasctl"
    return _report(USAGE, "USAGE", error.format_message(), f"`{path} --help` shows the usage", False, as_json)


def _failed(error: AtlasError, as_json: bool) -> int:
    if isinstance(error, ErrorReply):
        codes = {ErrorCode.UNAUTHORIZED: REFUSED, ErrorCode.CANCELLED: CANCELLED}
        code = codes.get(error.code, ERROR)
        return _report(code, error.code.value, error.message, error.next_step, error.retryable, as_json)
    if isinstance(error, DaemonUnavailable):
        code, name = (REFUSED, "UNAUTHORIZED") if error.refused else (NO_DAEMON, "NO_DAEMON")
        return _report(code, name, error.message, error.next_step, not error.refused, as_json)
    return _report(ERROR, "INTERNAL", str(error), "", False, as_json)


def _report(code: int, name: str, message: str, next_step: str, retryable: bool, as_json: bool) -> int:
    from .output import clean, emit

    error: dict[str, Any] = {"code": name, "message": message, "retryable": retryable, "next_step": next_step}
    if as_json:
        emit({"error": error})
    elif code == CANCELLED:
        print("cancelled", file=sys.stderr)
    else:
        label = "" if name in ("USAGE", "NO_DAEMON") else f"{name}: "
        print(f"atlasctl: {clean(label + message)}", file=sys.stderr)
        if next_step:
            print(f"  next: {clean(next_step)}", file=sys.stderr)
    return code
