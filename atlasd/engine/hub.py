"""Where a model's files are: the bundled one, a directory, or the Hugging Face hub. Nothing is ever unpickled."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from atlas_client.errors import ErrorCode, ErrorReply

DEMO = "demo"
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "tokenizer*"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HUB_HINT = "check the spelling, or give a directory with --model"

Report = Callable[[int, int], None]  # bytes done, bytes in all


def _missing(message: str, next_step: str = "") -> ErrorReply:
    return ErrorReply(ErrorCode.NO_SUCH_MODEL, message, next_step)


def resolve(model: str, *, revision: str | None, token: str | None, offline: bool, report: Report) -> Path:
    """The directory holding `model`: "demo", a path, or a hub id (fetched, resumed when it was cut, cached).

    Raises ErrorReply NO_SUCH_MODEL.
    """
    return local(model) or _fetch(model, revision, token, offline, report)


def local(model: str) -> Path | None:
    """The directory of a model that needs no fetching; None for a hub id. Raises ErrorReply NO_SUCH_MODEL."""
    if not model:
        raise _missing("the model's name is empty", "give a directory, a hub id, or `demo`")
    if model == DEMO:
        return Path(str(resources.files("atlas_demo_model")))
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise _missing(f"{path} is a file, not a model directory", "give the directory that holds config.json")
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise _missing(f"no directory {path}, and {model!r} is no hub id (ORGANISATION/NAME)", _HUB_HINT)
    return None


def _fetch(repo: str, revision: str | None, token: str | None, offline: bool, report: Report) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                token=token,
                allow_patterns=PATTERNS,
                local_files_only=offline,
                tqdm_class=_reporting(report),
            )
        )
    except errors.GatedRepoError:
        raise _missing(f"{repo} is gated", "accept its terms on the hub and give a token (--hub-token-file)") from None
    except errors.RevisionNotFoundError:
        raise _missing(f"{repo} has no revision {revision!r}", "check --revision") from None
    except errors.RepositoryNotFoundError:
        raise _missing(
            f"the hub has no model {repo}, or it is private", "check the id, or give --hub-token-file"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        where = "it is not in the local cache and --offline is set" if offline else f"the hub can't be reached: {error}"
        raise _missing(f"{repo}: {where}", "connect once, or give a directory with --model") from None
    except errors.HFValidationError as error:
        raise _missing(f"{repo!r} is no hub id: {error}", _HUB_HINT) from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise _missing(f"fetching {repo} failed: {error}", "try again; what was fetched is kept") from None


def _reporting(report: Report) -> type:
    """A tqdm that draws nothing and hands the bytes of all running bars to `report`."""
    from tqdm import tqdm

    bars: dict[int, tuple[int, int]] = {}

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self._bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": False, "file": _Null(), "mininterval": 0.2})

        def update(self, n: float | None = 1) -> bool | None:
            shown = bool(super().update(n))
            if self._bytes:
                bars[id(self)] = (int(self.n), int(self.total or 0))
                report(sum(n for n, _ in bars.values()), sum(t for _, t in bars.values()))
            return shown

    return Bar


class _Null:
    """A file that swallows what is written."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def check(directory: Path) -> dict[str, Any]:
    """Reads config.json and checks that the weights are whole safetensors files. Raises ErrorReply NO_SUCH_MODEL."""
    config = _json(directory / "config.json", "is this a Hugging Face model directory?")
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(_json(index, "fetch it again").get("weight_map", {}).values()))
    else:
        names = sorted(p.name for p in directory.glob("*.safetensors"))
    if not names:
        if any(next(directory.glob(pattern), None) for pattern in PICKLES):
            raise _missing(
                f"{directory} holds pickled weights only; they can run any code and are not read",
                "convert it to safetensors, or take a revision that has them",
            )
        raise _missing(f"{directory} holds no *.safetensors file", "fetch the model again")
    absent = [name for name in names if not (directory / name).exists()]
    if absent:
        raise _missing(
            f"{directory}: {len(absent)} of {len(names)} weight files are missing, {absent[0]} first", "fetch it again"
        )
    for name in names:
        _check_length(directory / name)
    return config


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checked directory, in a fixed order."""
    return sorted(directory.glob("*.safetensors"))


def _json(path: Path, next_step: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _missing(f"{path} is missing", next_step) from None
    except (OSError, ValueError) as error:
        raise _missing(f"{path} can't be read: {error}", "fetch the model again") from None
    if not isinstance(value, dict):
        raise _missing(f"{path} holds no JSON object", "fetch the model again")
    return value


def _check_length(path: Path) -> None:
    """A safetensors file is 8 bytes of header length, the header, then data up to the largest data_offsets end."""
    try:
        with path.open("rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            if size > path.stat().st_size:
                raise ValueError("header longer than the file")
            header = json.loads(file.read(size))
        end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise _missing(f"{path.name} is no safetensors file, or cut short ({error})", "fetch it again") from None
    if path.stat().st_size != 8 + size + end:
        raise _missing(
            f"{path.name} has {path.stat().st_size} bytes, its header says {8 + size + end}", "fetch it again"
        )
