"""The daemon's configuration: one frozen struct, from defaults, then a TOML file, then flags.

An unknown key is an error that names the nearest one. Field metadata holds the help text and the choices;
`atlasd --help`, the README's table and the TOML reader are made from it.
"""

from __future__ import annotations

import difflib
import tomllib
import types
import typing
from pathlib import Path
from typing import Annotated, Any

import msgspec
from atlas_client.paths import default_socket, default_state_dir
from msgspec import Meta

MOST_GIB = 1e6  # infinity is no size


class ConfigError(Exception):
    """A configuration that can't be used. The message names the key and what would do."""


def _key(help: str, **extra: Any) -> Meta:
    constraints = {name: extra.pop(name) for name in ("ge", "gt", "le", "lt", "pattern") if name in extra}
    return Meta(description=help, extra=extra, **constraints)


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Under thirty keys. A key `a_b` is `a-b` in TOML or `--a-b` as a flag (underscores work too)."""

    model: Annotated[str, _key("model directory, hub id, or 'demo' for the bundled one")] = "demo"
    revision: Annotated[str | None, _key("branch, tag or commit of a hub model")] = None
    hub_token_file: Annotated[str | None, _key("file holding the hub token")] = None
    offline: Annotated[bool, _key("never contact the hub")] = False
    device: Annotated[str, _key("where the model runs", choices=("auto", "cuda", "cpu"))] = "auto"
    dtype: Annotated[
        str,
        _key(
            "compute and KV type; auto: float32 on a CPU, the model's own on a GPU",
            choices=("auto", "float32", "bfloat16", "float16"),
        ),
    ] = "auto"
    threads: Annotated[int, _key("CPU threads of the engine; 0: one per core", ge=0)] = 0
    quant: Annotated[
        str,
        _key(
            "weights on load; auto: the 8-bit float with the least error per tensor",
            choices=("auto", "e4m3", "e3m4", "e2m5", "none"),
        ),
    ] = "auto"
    quant_block_size: Annotated[int, _key("weights that share a scale", ge=16, le=4096)] = 128
    quant_z_threshold: Annotated[
        float, _key("weights further than this many standard deviations stay FP16; 0: none", ge=0)
    ] = 3.0
    max_context: Annotated[int, _key("longest context in tokens; 0: the model's own", ge=0)] = 0
    max_batch: Annotated[int, _key("requests computed together", ge=1, le=1024)] = 16
    prefill_chunk: Annotated[int, _key("prompt tokens per forward pass; a cancel waits for one at most", ge=16)] = 512
    max_queue: Annotated[int, _key("requests waiting before QUEUE_FULL", ge=1)] = 256
    kv_vram_gb: Annotated[
        float, _key("KV pages in device memory, GiB; 0: a share of what is free", ge=0, le=MOST_GIB)
    ] = 0.0
    kv_ram_gb: Annotated[
        float, _key("KV pages in the RAM tier, GiB; on a CPU the device tier is RAM already", ge=0, le=MOST_GIB)
    ] = 4.0
    kv_disk_path: Annotated[
        str | None, _key("directory of KV pages; 'none': keep none on disk; default: in the state directory")
    ] = None
    kv_disk_gb: Annotated[
        float, _key("cap on all KV bytes on disk, GiB; 1 GiB of the disk stays free", gt=0, le=MOST_GIB)
    ] = 20.0
    kv_policy: Annotated[
        str,
        _key("what the tiers evict first: the longest unused, or least recompute time by use", choices=("lru", "gdsf")),
    ] = "lru"
    kv_dtype: Annotated[
        str,
        _key(
            "type of K and V in pages; auto: what is computed in; int8: a byte each, a scale for each head's vector",
            choices=("auto", "int8"),
        ),
    ] = "auto"
    kv_vram_only: Annotated[bool, _key("KV pages in device memory only: no RAM tier, no disk")] = False
    socket: Annotated[str, _key("path of the public socket")] = msgspec.field(
        default_factory=lambda: str(default_socket())
    )
    state_dir: Annotated[str, _key("directory of sessions and KV pages")] = msgspec.field(
        default_factory=lambda: str(default_state_dir())
    )
    max_message_mb: Annotated[int, _key("largest message accepted, MiB", ge=1, le=1024)] = 32
    heartbeat_s: Annotated[float, _key("seconds without a sign of life before the engine is restarted", gt=0)] = 30.0
    log_level: Annotated[str, _key("least severe message logged", choices=("debug", "info", "warning", "error"))] = (
        "info"
    )

    @property
    def disk_dir(self) -> Path | None:
        """Where KV pages lie on disk; None: nowhere."""
        if self.kv_vram_only or self.kv_disk_path == "none":
            return None
        return Path(self.kv_disk_path) if self.kv_disk_path else Path(self.state_dir) / "kv"


class Key(msgspec.Struct, frozen=True):
    """One configuration key as flags and documentation see it."""

    name: str
    type: type
    help: str
    choices: tuple[str, ...]
    default: Any


def keys() -> list[Key]:
    """Every key in order of declaration."""
    hints = typing.get_type_hints(Config, include_extras=True)
    return [_describe(field, hints[field.name]) for field in msgspec.structs.fields(Config)]


def _describe(field: Any, hint: Any) -> Key:
    bare, meta = typing.get_args(hint)[:2]
    options = typing.get_args(bare) if isinstance(bare, types.UnionType) else (bare,)
    default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    return Key(field.name, options[0], meta.description, tuple(meta.extra.get("choices", ())), default)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """' Did you mean X?' or nothing."""
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def load(file: Path | None, flags: dict[str, Any]) -> Config:
    """Defaults, then `file`, then `flags`. Raises ConfigError."""
    values = _read(file) if file else {}
    values.update(flags)
    for key in keys():
        if key.choices and key.name in values and values[key.name] not in key.choices:
            allowed = ", ".join(key.choices)
            raise ConfigError(f"{key.name}: {values[key.name]!r} is not one of {allowed}")
    try:
        return msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(_plain(str(error))) from None


def _plain(problem: str) -> str:
    """'Expected `int` >= 0 - at `$.max_context`' as 'max_context: expected int >= 0'."""
    what, _, key = problem.replace("`", "").rpartition(" - at $.")
    return f"{key}: {what[0].lower()}{what[1:]}" if what else problem


def _read(file: Path) -> dict[str, Any]:
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from None
    names = {key.name for key in keys()}
    values = {name.replace("-", "_"): value for name, value in raw.items()}
    for name in values:
        if name not in names:
            raise ConfigError(f"{file}: unknown key {name!r}.{nearest(name, names)}")
    return values
