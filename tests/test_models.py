"""Models that can't be served: each a typed error with a next step, and the daemon goes on with the next good one."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from atlas_client import Client, ErrorReply
from atlas_client.errors import ErrorCode
from conftest import Daemon
from families import DEMO


def _copy(into: Path) -> Path:
    shutil.copytree(DEMO, into, ignore=shutil.ignore_patterns("training", "__pycache__", "__init__.py"))
    return into


def _edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def _pickled(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _half_fetched(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda m: (m / "config.json").unlink(), "config.json is missing"),
    "config is no JSON": (lambda m: _cut(m / "config.json", 40), "config.json can't be read"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "no *.safetensors"),
    "cut weights": (lambda m: _cut(m / "model.safetensors", 9_000_000), "its header says"),
    "cut header": (lambda m: _cut(m / "model.safetensors", 100), "cut short"),
    "half fetched": (_half_fetched, "1 of 2 weight files are missing"),
    "pickled": (_pickled, "pickled weights only"),
    "unknown architecture": (
        lambda m: _edit(m / "config.json", model_type="tomorrow"),
        "unknown architecture 'tomorrow'",
    ),
    "code of its own": (
        lambda m: _edit(m / "config.json", model_type="own", auto_map={"AutoConfig": "x.Y"}),
        "never run",
    ),
    "other shapes": (lambda m: _edit(m / "config.json", intermediate_size=512), "of another model"),
    "no tokenizer": (lambda m: _cut(m / "tokenizer.json", 1000), "tokenizer"),
}
# Found when the running model is gone already; the rest leaves it alone.
FOUND_BY_THE_ENGINE = {"unknown architecture", "code of its own", "other shapes", "no tokenizer"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    import tempfile

    root = Path(tempfile.mkdtemp(prefix="atlas-"))
    daemon = Daemon(root)
    daemon.start(ready=False)
    daemon.wait_state("ready", "starting", "loading")
    with Client(daemon.socket) as client:
        yield client
    daemon.kill()
    shutil.rmtree(root, ignore_errors=True)


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_model_is_a_typed_error(client: Client, root: Path, damage: str) -> None:
    breaks, said = BROKEN[damage]
    failed = client.status().engine_state == "failed"
    model = _copy(root / "model")
    breaks(model)
    with pytest.raises(ErrorReply) as caught:
        client.load_model(str(model))
    assert caught.value.code is ErrorCode.NO_SUCH_MODEL
    assert said in caught.value.message
    assert caught.value.next_step
    assert (client.status().engine_state == "failed") == (failed or damage in FOUND_BY_THE_ENGINE)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "no-such-thing", "../x", "a/b/c", ""])
def test_a_name_that_is_no_model(client: Client, name: str) -> None:
    with pytest.raises(ErrorReply) as caught:
        client.load_model(name)
    assert caught.value.code in (ErrorCode.NO_SUCH_MODEL, ErrorCode.INVALID_PARAMETER)


def test_requests_without_a_model_say_what_to_do_and_a_good_model_mends_it(client: Client) -> None:
    while (state := client.status().engine_state) not in ("ready", "failed", "stopped"):
        time.sleep(0.1)
    if state == "ready":  # no other test came before, and a wrong name keeps the model that runs
        client.unload_model()
    with pytest.raises(ErrorReply):
        client.load_model("/nowhere/at/all")
    with pytest.raises(ErrorReply) as caught:
        client.generate("x", max_tokens=1).result  # noqa: B018
    assert caught.value.code in (ErrorCode.NO_SUCH_MODEL, ErrorCode.MODEL_NOT_LOADED)
    assert caught.value.next_step
    phases: list[str] = []
    info = client.load_model("demo", on_progress=lambda p: phases.append(p.phase))
    assert info.state == "ready"
    assert info.layers_quantized == 42
    assert "quantize" in phases
    assert client.generate("x", max_tokens=3, ignore_eos=True).result.usage.generated == 3
    client.unload_model()
    with pytest.raises(ErrorReply) as caught:
        client.generate("x", max_tokens=1).result  # noqa: B018
    assert caught.value.code is ErrorCode.MODEL_NOT_LOADED
    assert "model load" in caught.value.next_step


def test_a_gpu_that_was_asked_for_and_is_missing_is_an_error(root: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    daemon = Daemon(root, "--device", "cuda")
    daemon.start(ready=False)
    try:
        daemon.wait_state("failed")
        with Client(daemon.socket) as client:
            assert "CUDA" in client.status().engine_error
            with pytest.raises(ErrorReply) as caught:
                client.generate("x").result  # noqa: B018
            assert caught.value.code is ErrorCode.INVALID_PARAMETER
    finally:
        daemon.kill()
