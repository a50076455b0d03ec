"""The bundled model: its training runs from the repository, and its recorded figures are those of its weights."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[1] / "packaging" / "demo-model"
TRAINING = MODEL / "training"
SUBSET = (
    "argparse.py",
    "bisect.py",
    "copyreg.py",
    "heapq.py",
    "queue.py",
    "sched.py",
)  # copyreg and sched are held out

QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(script: str, *arguments: str | Path) -> str:
    command = [sys.executable, str(TRAINING / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | QUIET)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files of a library of six files."""
    library, out = tmp_path_factory.mktemp("library"), tmp_path_factory.mktemp("out")
    for name in SUBSET:
        shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / name, library / name)
    run("prepare.py", out, "--root", library, "--vocabulary", "512")
    return out


def test_prepare_holds_out_the_recorded_files(prepared: Path) -> None:
    from tokenizers import Tokenizer

    recorded = (TRAINING / "held_out_files.txt").read_text().split()
    assert (prepared / "held_out_files.txt").read_text().split() == [name for name in SUBSET if name in recorded]
    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer.json"))
    ids = memoryview((prepared / "held_out.u16").read_bytes()).cast("H").tolist()
    first = ids[: ids.index(0)]  # up to <|endoftext|>
    assert tokenizer.decode(first) == (Path(sysconfig.get_paths()["stdlib"]) / "copyreg.py").read_text()
    assert {"<|pad|>": 1, "<|fim_prefix|>": 2, "<|im_end|>": 6}.items() <= tokenizer.get_vocab().items()


@pytest.mark.slow
def test_three_steps_make_a_model_that_loads(prepared: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run("train.py", prepared, "--steps", "3", "--hidden", "192", "--layers", "2", "--window", "64", "--rows", "2")
    run("finalize.py", prepared, tmp_path / "model", "--no-samples")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "def f(x):\n    return 'ü€🙂' * 17\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "# user: hi\n"
    assert torch.isfinite(model(input_ids=ids).logits).all()
    assert model.dtype == torch.bfloat16
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["steps"] == 3
    assert record["parameters"] == model.num_parameters()
    assert record["held_out_loss"] < math.log(512) + 0.5


def test_recorded_perplexity_is_that_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TRAINING))
    import perplexity
    import torch
    from transformers import AutoModelForCausalLM

    record = json.loads((MODEL / "training.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokens = perplexity.read_tokens(perplexity.HELD_OUT)
    loss = perplexity.mean_loss(model, tokens, 512, perplexity.CONTEXTS[512], every=8)
    assert math.exp(loss) == pytest.approx(record["ppl_512_every_8th"], rel=1e-3)
    assert model.num_parameters() == record["parameters"]
    assert math.exp(record["held_out_loss"]) == pytest.approx(record["ppl_512"], rel=1e-3)


def test_mean_loss_agrees_with_transformers_own_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TRAINING))
    import perplexity
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokens = perplexity.read_tokens(perplexity.HELD_OUT)[:257]
    with torch.inference_mode():
        theirs = [model(input_ids=ids[None], labels=ids[None]).loss.item() for ids in (tokens[:129], tokens[128:])]
    assert perplexity.mean_loss(model, tokens, 128, 2) == pytest.approx(sum(theirs) / 2, rel=1e-5)
    with pytest.raises(ValueError, match="do not fill"):
        perplexity.mean_loss(model, tokens, 512, 2)


def test_a_fill_in_the_middle_window_holds_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TRAINING))
    import numpy as np
    import windows
    from prepare import END_OF_TEXT, FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX

    rng = np.random.default_rng(1)
    for _ in range(200):
        text = np.arange(100, 100 + int(rng.integers(64, 513)))
        ids = windows.fill_in_the_middle(text, rng).tolist()
        suffix, middle = ids.index(FIM_SUFFIX), ids.index(FIM_MIDDLE)
        assert (ids[0], ids[-1], len(ids)) == (FIM_PREFIX, END_OF_TEXT, len(text))
        assert ids[1:suffix] + ids[middle + 1 : -1] + ids[suffix + 1 : middle] == text[:-4].tolist()


def test_card_names_the_weights_it_describes() -> None:
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest() in card
    record = json.loads((MODEL / "training.json").read_text())
    for figure in (f"{record['parameters']:,}", f"{record['ppl_512']:.2f}", f"{record['ppl_8192']:.2f}"):
        assert figure in card
