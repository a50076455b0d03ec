"""What every command shares: --socket, --json, the client, and help with mistyped names."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..paths import default_socket

if TYPE_CHECKING:
    from ..client import Client

F = TypeVar("F", bound=Callable[..., Any])
_SOCKET = click.Path(path_type=Path, readable=False)  # whether it may be opened is said by connecting


@dataclasses.dataclass
class App:
    """The options given before or after the command's name."""

    socket: Path | None = None
    json: bool = False

    @property
    def path(self) -> Path:
        return self.socket or default_socket()

    def client(self) -> Client:
        from ..client import Client

        return Client(self.path)


def app() -> App:
    """The running command's App."""
    return click.get_current_context().ensure_object(App)


def common(command: F) -> F:
    """Adds --socket and --json, which may stand before or after a command's name."""

    @click.option("--socket", "_socket", type=_SOCKET, help="The daemon's socket [ATLAS_SOCKET].")
    @click.option("--json", "_json", is_flag=True, help="Print one JSON object, errors too.")
    @functools.wraps(command)
    def wrapped(*args: Any, _socket: Path | None, _json: bool, **options: Any) -> Any:
        shared = app()
        shared.socket = _socket or shared.socket
        shared.json = _json or shared.json
        return command(*args, **options)

    return wrapped  # type: ignore[return-value]  # click reads the options from the wrapper


class Group(click.Group):
    """A group that names the nearest command when one is unknown."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            close = difflib.get_close_matches(name, self.list_commands(ctx), 1, 0.5)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise click.UsageError(f"No such command {name!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)
