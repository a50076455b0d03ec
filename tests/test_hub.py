"""Hub ids through a real daemon and a local hub: fetched with progress, resumed, cached, offline; typed refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from atlas_client import Client, ErrorReply
from atlas_client.errors import ErrorCode
from conftest import Daemon
from families import DEMO, make
from hub_server import HubServer

TOKEN = "hf_secret"


@pytest.fixture
def hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(root / "hf"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def _refused(client: Client, model: str, revision: str | None = None) -> ErrorReply:
    with pytest.raises(ErrorReply) as caught:
        client.load_model(model, revision)
    assert caught.value.code is ErrorCode.NO_SUCH_MODEL
    assert caught.value.next_step
    return caught.value


def test_models_come_from_the_hub_and_stay(hub: HubServer, root: Path, daemon: Daemon) -> None:
    other = make("qwen2", root / "other")
    secret = root / "token"
    secret.write_text(TOKEN + "\n")
    hub.add("acme/demo", DEMO)
    hub.add("acme/private", other, token=TOKEN)
    hub.add("acme/gated", other, gated=True)
    hub.cut_once("model.safetensors", 15_000_000)
    daemon.flags[daemon.flags.index("--model") + 1] = "acme/demo"
    daemon.start()
    with Client(daemon.socket) as client:
        assert client.generate("def f(", max_tokens=5, ignore_eos=True, model="acme/demo").result.usage.generated == 5
        assert "acme/demo" in {model.name for model in client.models()}
        assert any(seen.range for seen in hub.gets("model.safetensors")), "the cut download was not resumed"
        assert "revision" in _refused(client, "acme/demo", "no-such-branch").message
        assert "no model" in _refused(client, "acme/absent").message
        assert "gated" in _refused(client, "acme/gated").message
        _refused(client, "acme/private")
    daemon.stop()
    daemon.start(extra=("--hub-token-file", str(secret)))
    with Client(daemon.socket) as client:
        phases: set[str] = set()
        assert (
            client.load_model("acme/private", on_progress=lambda p: phases.add(p.phase)).architecture
            == "Qwen2ForCausalLM"
        )
        assert "download" in phases
    daemon.stop()
    hub.stop()
    daemon.start(extra=("--offline",))
    with Client(daemon.socket) as client:
        assert client.generate("def f(", max_tokens=5, ignore_eos=True).result.usage.generated == 5
        assert "--offline" in _refused(client, "acme/absent").message
