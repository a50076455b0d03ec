"""The golden vectors of protocol version 1, and clients/PROTOCOL.md against the code."""

from __future__ import annotations

import importlib.util
import json
import re
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from atlas_client import framing, protocol
from atlas_client.errors import NEXT_STEP, RETRYABLE, ErrorCode

CLIENTS = Path(__file__).parent.parent / "clients"
VECTORS: dict[str, Any] = json.loads((CLIENTS / "vectors" / "v1.json").read_text(encoding="utf-8"))
DOCUMENT = (CLIENTS / "PROTOCOL.md").read_text(encoding="utf-8")
MESSAGES = [
    *typing.get_args(protocol.Request),
    *typing.get_args(protocol.ControlRequest),
    *typing.get_args(protocol.Reply),
]
VALUES = [
    protocol.Sampling, protocol.ChatMessage, protocol.Usage, protocol.Timings, protocol.TokenLogprob, protocol.TurnInfo,
    protocol.SessionInfo, protocol.ModelInfo, protocol.TierUsage, protocol.Header,
]  # fmt: skip
DECODERS = {
    ("work", "request"): framing.decode_request,
    ("control", "request"): framing.decode_control,
    ("work", "reply"): framing.decode_reply,
    ("control", "reply"): framing.decode_reply,
}


def _frames(vector: dict[str, Any]) -> list[bytes]:
    return [bytes.fromhex(frame) for frame in vector["frames"]]


def _named(vector: dict[str, Any]) -> str:
    return str(vector["name"])


@pytest.mark.parametrize("vector", VECTORS["messages"], ids=_named)
def test_a_vector_decodes_to_its_json_and_is_encoded_to_its_bytes(vector: dict[str, Any]) -> None:
    header, body, raw = DECODERS[vector["socket"], vector["direction"]](_frames(vector))
    assert json.loads(msgspec.json.encode(header)) == vector["header"]
    assert json.loads(msgspec.json.encode(body)) == vector["body"]
    assert [frame.hex() for frame in raw] == vector["raw"]
    assert framing.encode(header, body, raw) == _frames(vector)


def test_every_message_type_has_a_vector() -> None:
    covered = {vector["body"]["type"] for vector in VECTORS["messages"]}
    assert covered == {message.__struct_config__.tag for message in MESSAGES}


@pytest.mark.parametrize("vector", VECTORS["accept"], ids=_named)
def test_what_another_client_may_send_is_read(vector: dict[str, Any]) -> None:
    _, body, _ = framing.decode_request(_frames(vector))
    read = {"type": type(body).__struct_config__.tag} | msgspec.structs.asdict(body)
    sent = vector["body"]
    assert {name: read[name] for name in sent if name in read} == {
        name: sent[name] for name in sent if name != "colour"
    }


@pytest.mark.parametrize("vector", VECTORS["reject"], ids=_named)
def test_a_wrong_message_is_refused_with_its_code(vector: dict[str, Any]) -> None:
    with pytest.raises(framing.BadFrame) as caught:
        framing.decode_request(_frames(vector))
    error = caught.value
    code = "UNSUPPORTED_VERSION" if error.version else "INVALID_PARAMETER" if error.parameter else "BAD_FRAME"
    assert code == vector["code"]


def test_the_file_is_what_the_script_writes() -> None:
    assert _script().text() == (CLIENTS / "vectors" / "v1.json").read_text(encoding="utf-8")


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_vectors", CLIENTS / "vectors" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _section(title: str) -> str:
    found = re.search(rf"^#+ `{re.escape(title)}`.*?$(.*?)(?=^#|\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert found, f"PROTOCOL.md has no section `{title}`"
    return found.group(1)


def _rows(section: str) -> dict[str, list[str]]:
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("` "): row[1:] for row in cells}


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if isinstance(value, msgspec.Struct):
        return "`{}`"
    return f"`{json.dumps(value)}`"


@pytest.mark.parametrize("struct", [*MESSAGES, *VALUES], ids=lambda struct: struct.__name__)
def test_the_document_names_every_field_with_its_default(struct: type[msgspec.Struct]) -> None:
    tag = struct.__struct_config__.tag
    rows = _rows(_section(str(tag) if tag else struct.__name__))
    fields = msgspec.structs.fields(struct)
    assert {name: row[1] for name, row in rows.items()} == {field.name: _default(field) for field in fields}


def test_the_document_has_the_error_table() -> None:
    rows = _rows(DOCUMENT.split("## Errors")[1].split("\n## ")[0])
    assert set(rows) == {code.value for code in ErrorCode}
    for code in ErrorCode:
        retryable, _, step = rows[code.value]
        assert retryable == ("yes" if code in RETRYABLE else "no")
        assert step == NEXT_STEP[code]
