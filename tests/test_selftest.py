"""Architectures that no other test covers: served when the paged way agrees with the stock model, refused otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from atlas_client.errors import ErrorCode, ErrorReply

from atlasd.config import Config
from atlasd.engine import model, selftest

OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "stablelm": ("StableLmConfig", families._LLAMA_LIKE),  # does not pass the step on: served through a Cache
    "olmo2": ("Olmo2Config", families._LLAMA_LIKE),
    "gpt_oss": ("GptOssConfig", {**families._LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2,
                                 "head_dim": 32, "sliding_window": 48}),
    "mamba": ("MambaConfig", {"vocab_size": families.VOCAB, "hidden_size": 128, "num_hidden_layers": 2}),
}  # fmt: skip


def _load(name: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> model.LoadedModel:
    monkeypatch.setitem(families.FAMILIES, name, OTHERS[name])
    families.make(name, directory)
    config = Config(state_dir=str(directory), quant="none", device="cpu")
    with torch.no_grad():
        return model.load(name, directory, config, lambda *_: None)


@pytest.mark.parametrize(("name", "way"), [("stablelm", "cache"), ("olmo2", "interface"), ("gpt_oss", "interface")])
def test_an_architecture_that_agrees_is_served(
    name: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = _load(name, tmp_path, monkeypatch)
    assert loaded.attention == way
    selftest.check(loaded)


def test_a_recurrent_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ErrorReply, match="0 of 2 layers use paged attention") as caught:
        _load("mamba", tmp_path, monkeypatch)
    assert caught.value.code is ErrorCode.NO_SUCH_MODEL


def test_an_architecture_that_counts_positions_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = _load("olmo2", tmp_path, monkeypatch)

    def late(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "step" in kwargs and int(kwargs["position_ids"][0, 0]) > 0:
            kwargs["position_ids"] = kwargs["position_ids"] + 1
        return args, kwargs

    loaded.model.register_forward_pre_hook(late, with_kwargs=True)
    with pytest.raises(ErrorReply, match="differ from the stock model's") as caught:
        selftest.check(loaded)
    assert caught.value.code is ErrorCode.NO_SUCH_MODEL
