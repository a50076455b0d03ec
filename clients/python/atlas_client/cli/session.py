"""`atlasctl session`: everything that is done to sessions but generating in them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .context import Group, app, common
from .figures import LABELS, missing_places
from .output import clean, emit, moment, plain, table
from .text import prompt as read_prompt

if TYPE_CHECKING:
    from ..protocol import SessionDetail, SessionInfo


@click.group(cls=Group)
@common
def session() -> None:
    """Open, list, fork, cut, move and delete sessions."""


@session.command("open")
@click.argument("name")
@click.option("--must-exist", is_flag=True, help="Fail when there is no such session.")
@common
def open_(name: str, must_exist: bool) -> None:
    """Make session NAME when it does not exist, and show it."""
    with app().client() as client:
        _tell(client.session(name, create=not must_exist).open())


@session.command()
@click.argument("name")
@click.argument("text", required=False)
@click.option("-f", "--file", type=click.Path(path_type=Path), help="Read the text from a file.")
@common
def append(name: str, text: str | None, file: Path | None) -> None:
    """Add TEXT (`-`: standard input, @FILE: a file) to session NAME and compute it, generating nothing."""
    from .progress import Bars

    added = read_prompt(text, file, what="text")
    bars = Bars()
    with app().client() as client:
        try:
            done = client.session(name).append(added, on_progress=bars.show)
        finally:
            bars.clear()
    state = "durable" if done.durable else "NOT durable"
    _done(done, f"{name}: {done.usage.prompt:,} tokens, {done.usage.prefilled:,} computed now, {state}")


@session.command()
@click.argument("name")
@click.argument("new_name")
@click.option("--turn", type=click.IntRange(min=0), help="Keep this many turns.")
@click.option("--token", type=click.IntRange(min=0), help="Keep this many tokens.")
@common
def fork(name: str, new_name: str, turn: int | None, token: int | None) -> None:
    """Copy session NAME, or its beginning, to NEW_NAME; the shared part costs no memory."""
    _one_at_most("--turn", turn, "--token", token)
    with app().client() as client:
        _tell(client.session(name).fork(new_name, at_turn=turn, at_token=token).info())


@session.command()
@click.argument("name")
@click.option("--turns", type=click.IntRange(min=0), help="Keep this many turns.")
@click.option("--tokens", type=click.IntRange(min=0), help="Keep this many tokens.")
@common
def truncate(name: str, turns: int | None, tokens: int | None) -> None:
    """Cut session NAME to its first turns or tokens."""
    _one_at_most("--turns", turns, "--tokens", tokens)
    if turns is None and tokens is None:
        raise click.UsageError("one of --turns and --tokens is needed")
    with app().client() as client:
        _tell(client.session(name).truncate(turns=turns, tokens=tokens))


@session.command("list")
@common
def list_() -> None:
    """List the sessions, the last used first."""
    with app().client() as client:
        found = sorted(client.sessions(), key=lambda info: -info.updated)
    if app().json:
        emit({"sessions": found})
        return
    rows = [(i.name, i.tokens, i.turns, moment(i.updated), "busy" if i.busy else "", i.model) for i in found]
    table(("NAME", "TOKENS", "TURNS", "USED", "", "MODEL"), rows)


@session.command()
@click.argument("name")
@click.option("--text", is_flag=True, help="With what was said.")
@click.option("--tokens", is_flag=True, help="With the token ids (--json only).")
@common
def show(name: str, text: bool, tokens: bool) -> None:
    """Show session NAME, where its tokens are, and its turns.

    The line KV says how many tokens have their keys and values in which tier: the fastest counts when a page is in
    several. What is nowhere is computed when the session goes on; the last token always is. The counts add up to the
    session's tokens. Without a loaded model they are not known.
    """
    with app().client() as client:
        handle = client.session(name)
        detail = handle.show(text=text, where=True)
        ids = handle.token_ids() if tokens else None
    if app().json:
        emit({**plain(detail), **({"tokens": ids} if tokens else {})})
    else:
        _show(detail, text)


@session.command()
@click.argument("name")
@click.argument("new_name")
@common
def rename(name: str, new_name: str) -> None:
    """Rename session NAME to NEW_NAME."""
    with app().client() as client:
        _tell(client.session(name).rename(new_name))


@session.command()
@click.argument("name")
@common
def checkpoint(name: str) -> None:
    """Return when session NAME's pages are on disk."""
    with app().client() as client:
        detail = client.session(name).checkpoint()
    _done({"session": name, "detail": detail}, f"{name}: on disk" + (f" ({detail})" if detail else ""))


@session.command()
@click.argument("name")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write; standard output without it.")
@common
def export(name: str, output: Path | None) -> None:
    """Write session NAME as an archive that `session import` reads."""
    if output is None and (sys.stdout.isatty() or app().json):
        raise click.UsageError("an archive is not for a terminal: name a file with --output")
    with app().client() as client:
        archive = client.session(name).export()
    if output is None:
        sys.stdout.buffer.write(archive)
        return
    _write(output, archive)
    _done({"session": name, "file": str(output), "bytes": len(archive)}, f"{output}: {len(archive):,} bytes")


@session.command("import")
@click.argument("name")
@click.argument("archive", type=click.Path(path_type=Path))
@common
def import_(name: str, archive: Path) -> None:
    """Make session NAME from ARCHIVE (`-`: standard input)."""
    try:
        raw = sys.stdin.buffer.read() if str(archive) == "-" else archive.read_bytes()
    except OSError as error:
        raise click.UsageError(f"{archive}: {error.strerror}") from None
    with app().client() as client:
        _tell(client.import_session(name, raw))


@session.command()
@click.argument("name")
@click.option("--purge", is_flag=True, help="Also erase its pages on every tier.")
@common
def delete(name: str, purge: bool) -> None:
    """Delete session NAME.

    With --purge its pages are overwritten in memory and on disk first, but for those that other sessions share.
    """
    with app().client() as client:
        client.session(name).delete(purge=purge)
    _done({"session": name, "deleted": True, "purged": purge}, f"{name}: deleted")


def _tell(info: SessionInfo) -> None:
    _done(info, f"{info.name}: {info.tokens:,} tokens, {info.turns:,} turns")


def _done(value: Any, line: str) -> None:
    if app().json:
        emit(value)
    else:
        print(clean(line))


def _show(detail: SessionDetail, text: bool) -> None:
    info = detail.info
    _tell(info)
    origin = f", forked from {info.parent} at {info.forked_at:,} tokens" if info.parent else ""
    print(clean(f"made {moment(info.created)}, used {moment(info.updated)}, model {info.model or 'none'}{origin}"))
    print(f"KV {_places(info)}")
    for turn in detail.turns:
        end = turn.start + turn.prompt_tokens + turn.generated_tokens
        counts = f"{turn.prompt_tokens:,} + {turn.generated_tokens:,} tokens"
        print(f"turn {turn.index}: tokens {turn.start:,} to {end:,}, {counts} ({turn.finish_reason})")
        if text:
            print(clean(f"{turn.prompt}{turn.text}"))


def _places(info: SessionInfo) -> str:
    """Where a session's tokens are, in one line."""
    if missing_places(info):
        return "not known: no engine is ready, or it is busy"
    parts = [(LABELS.get(place, place), count) for place, count in info.where.items()]
    return ", ".join(f"{name} {count:,}" for name, count in parts) + (" tokens" if parts else "nowhere yet")


def _one_at_most(name: str, value: object, other: str, other_value: object) -> None:
    if value is not None and other_value is not None:
        raise click.UsageError(f"{name} and {other} exclude each other")


def _write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; a device or pipe is written to, never replaced, and a link is followed.
    Raises click.UsageError when it can't be written."""
    path = path.resolve()
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise click.UsageError(f"{path}: {error.strerror}") from None
