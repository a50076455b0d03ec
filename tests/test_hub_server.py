"""huggingface_hub downloads from the local hub as it does from the real one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from huggingface_hub import errors, snapshot_download

WEIGHTS = bytes(range(256)) * 64_000  # 16 MB: the client writes, and resumes, in pieces of 10 MiB
FETCH = "import sys, huggingface_hub; print(huggingface_hub.snapshot_download(sys.argv[1], cache_dir=sys.argv[2]))"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "sub" / "notes.txt").write_text("notes")
    (directory / "model.safetensors").write_bytes(WEIGHTS)
    return directory


def content(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def fetch(hub: HubServer, cache: Path, repo: str = "acme/tiny", **arguments: Any) -> Path:
    return Path(snapshot_download(repo, cache_dir=cache, endpoint=hub.url, **arguments))


def test_a_snapshot_is_the_directory(hub: HubServer, model: Path, tmp_path: Path) -> None:
    commit = hub.add("acme/tiny", model)
    got = fetch(hub, tmp_path / "cache")
    assert got.name == commit
    assert content(got) == content(model)


def test_a_cut_connection_is_resumed_where_it_ended(hub: HubServer, model: Path, tmp_path: Path) -> None:
    hub.add("acme/tiny", model)
    hub.cut_once("model.safetensors", 12_000_000)
    assert content(fetch(hub, tmp_path / "cache")) == content(model)
    assert [seen.range for seen in hub.gets("model.safetensors")] == [None, f"bytes={10 * 2**20}-"]


def test_finished_files_are_not_fetched_again(hub: HubServer, model: Path, tmp_path: Path) -> None:
    hub.add("acme/tiny", model)
    fetch(hub, tmp_path / "cache")
    fetch(hub, tmp_path / "cache")
    assert len(hub.gets("model.safetensors")) == 1


def test_a_revision_names_another_directory(hub: HubServer, model: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text('{"old": true}')
    hub.add("acme/tiny", model)
    commit = hub.add("acme/tiny", old, revisions=("v1",))
    assert content(fetch(hub, tmp_path / "cache", revision="v1")) == content(old)
    assert content(fetch(hub, tmp_path / "cache2", revision=commit)) == content(old)
    with pytest.raises(errors.RevisionNotFoundError):
        fetch(hub, tmp_path / "cache", revision="v2")


def test_a_private_repository_wants_its_token(hub: HubServer, model: Path, tmp_path: Path) -> None:
    hub.add("acme/private", model, token="hf_secret")
    with pytest.raises(errors.RepositoryNotFoundError):
        fetch(hub, tmp_path / "cache", "acme/private", token="hf_wrong")
    assert content(fetch(hub, tmp_path / "cache", "acme/private", token="hf_secret")) == content(model)


def test_gated_and_unknown_repositories(hub: HubServer, model: Path, tmp_path: Path) -> None:
    hub.add("acme/gated", model, gated=True)
    with pytest.raises(errors.GatedRepoError):
        fetch(hub, tmp_path / "cache", "acme/gated")
    with pytest.raises(errors.RepositoryNotFoundError):
        fetch(hub, tmp_path / "cache", "acme/absent")


def test_endpoint_and_offline_mode_from_the_environment(hub: HubServer, model: Path, tmp_path: Path) -> None:
    hub.add("acme/tiny", model)

    def run(**extra: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")} | extra
        command = [sys.executable, "-c", FETCH, "acme/tiny", str(tmp_path / "cache")]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    refused = run(HF_HUB_OFFLINE="1")
    assert refused.returncode != 0
    assert "LocalEntryNotFoundError" in refused.stderr
    online = run()
    assert content(Path(online.stdout.strip())) == content(model), online.stderr
    hub.stop()
    asked = len(hub.requests)
    assert run(HF_HUB_OFFLINE="1").stdout == online.stdout
    assert len(hub.requests) == asked
