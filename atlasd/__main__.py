"""`atlasd`: the daemon in the foreground. Flags are made from the configuration's keys."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from . import __version__
from .config import Config, ConfigError, Key, keys, load


def _option(key: Key) -> click.Option:
    name = key.name.replace("_", "-")
    declaration = f"--{name}/--no-{name}" if key.type is bool else f"--{name}"
    default = "" if key.default in (None, "") else f"  [default: {key.default}]"
    kind = click.Choice(key.choices) if key.choices else key.type
    return click.Option([declaration], type=kind, default=None, help=key.help + default)


def _serve(config: Path | None, engine_command: str | None, **flags: Any) -> None:
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        settings = load(config, given)
    except ConfigError as error:
        print(f"atlasd: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(_run(settings, shlex.split(engine_command) if engine_command else None))


def _run(config: Config, engine_command: list[str] | None) -> int:
    from .broker import server
    from .broker.log import LogError
    from .broker.place import PlaceError

    logging.basicConfig(
        stream=sys.stderr, level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    try:
        server.run(config, engine_command)
    except (PlaceError, LogError) as error:
        print(f"atlasd: {error}", file=sys.stderr)
        return 1
    return 0


def command() -> click.Command:
    """The command with one flag per key; `--kv_ram_gb` is the same as `--kv-ram-gb`."""
    options: list[click.Parameter] = [
        click.Option(
            ["--config"], type=click.Path(dir_okay=False, path_type=Path), help="TOML file; flags override it"
        ),
        click.Option(["--engine-command"], hidden=True),
        *map(_option, keys()),
    ]
    made = click.Command(
        "atlasd", callback=_serve, params=options, help="A local LLM daemon that keeps long conversations.",
        context_settings={"token_normalize_func": lambda token: token.replace("_", "-"), "max_content_width": 120},
    )  # fmt: skip
    return click.version_option(__version__, prog_name="atlasd")(made)


def main() -> None:
    """Entry point."""
    command()(prog_name="atlasd")


if __name__ == "__main__":
    main()
