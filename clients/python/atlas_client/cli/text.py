"""Where a prompt comes from: the argument, standard input, or a file that was named as one."""

from __future__ import annotations

import sys
from pathlib import Path

import click


def prompt(argument: str | None, file: Path | None, *, what: str = "prompt") -> str:
    """The text to send, exactly as it is. Raises click.UsageError when there is none, two, or it is not UTF-8.

    `-` is standard input, `@FILE` a file, `@@x` the text `@x`; an argument that happens to name a file is a text.
    """
    if file is not None:
        if argument is not None:
            raise click.UsageError(f"a {what} and --file were given; one is needed")
        return _file(file)
    if argument is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise click.UsageError(f"no {what}: give it as an argument, with --file, or on standard input")
        return _stdin()
    if argument == "-":
        return _stdin()
    if argument.startswith("@@"):
        return _argument(argument[1:])
    if argument.startswith("@"):
        return _file(Path(argument[1:]), f"; to send text that begins with @, write @{argument}")
    return _argument(argument)


def _stdin() -> str:
    return _decode(sys.stdin.buffer.read(), "standard input")


def _file(path: Path, hint: str = "") -> str:
    try:
        return _decode(path.read_bytes(), str(path))
    except OSError as error:
        raise click.UsageError(f"{path}: {error.strerror}{hint}") from None


def _argument(text: str) -> str:
    return _decode(text.encode("utf-8", "surrogateescape"), "the argument")


def _decode(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{name} is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}") from None
