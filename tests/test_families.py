"""Every served family through a real daemon against stock transformers in float32.

Per family: three ragged sessions at once with prompts of several chunks, greedy tokens and all log-probabilities
compared; then daemon and engine are killed, started again, and a session goes on from its pages.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from atlas_client import Client
from atlas_client.protocol import Done, TokenLogprob, Tokens
from conftest import Daemon
from families import FAMILIES, VOCAB, make

LENGTHS = (150, 7, 90)  # prompt tokens of the three sessions; chunks are 64
NEW = 12
RELATIVE = 1e-4  # of the largest log-probability's magnitude, as the bar for logits


class Reference:
    """Stock transformers: no pages, no chunks, the whole context at once."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """[len(tokens), vocab]"""
        return self.model(torch.tensor([list(tokens)])).logits[0].float()  # type: ignore[no-any-return]


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(7, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def _run(socket: Path, session: str, tokens: list[int], out: dict[str, Any]) -> None:
    with Client(socket) as client:
        generation = client.generate(
            tokens=tokens, session=session, max_tokens=NEW, temperature=0, logprobs=VOCAB, ignore_eos=True
        )
        logprobs = [entry for event in generation if isinstance(event, Tokens) for entry in event.logprobs]
        out[session] = (generation.result, logprobs)


def _together(socket: Path, prompts: list[list[int]]) -> dict[str, tuple[Done, list[TokenLogprob]]]:
    out: dict[str, Any] = {}
    threads = [threading.Thread(target=_run, args=(socket, f"s{i}", p, out)) for i, p in enumerate(prompts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return out


def _compare(reference: Reference, context: list[int], done: Done, logprobs: list[TokenLogprob]) -> None:
    """Greedy tokens equal to stock's, log-probabilities over the whole vocabulary within RELATIVE."""
    assert len(done.tokens) == NEW == len(logprobs)
    logits = reference.logits(context + done.tokens)[len(context) - 1 : -1]
    assert done.tokens == logits.argmax(-1).tolist()
    expected = torch.log_softmax(logits, -1)
    for row, entry in zip(expected, logprobs, strict=True):
        ids, values = zip(*entry.top, strict=True)
        assert sorted(ids) == list(range(VOCAB))
        actual = torch.empty(VOCAB)
        actual[list(ids)] = torch.tensor(values)
        assert float((actual - row).abs().max()) <= RELATIVE * float(row.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_stock_transformers(family: str, root: Path) -> None:
    model = make(family, root / "model")
    reference = Reference(model)
    prompts = _prompts()
    daemon = Daemon(root, "--quant", "none", "--prefill-chunk", "64", model=str(model))
    try:
        daemon.start()
        first = _together(daemon.socket, prompts)
        for index, prompt in enumerate(prompts):
            _compare(reference, prompt, *first[f"s{index}"])
        daemon.kill()
        daemon.start()
        more = _prompts()[2][:30]
        again: dict[str, Any] = {}
        _run(daemon.socket, "s0", more, again)
        done, logprobs = again["s0"]
        past = prompts[0] + first["s0"][0].tokens
        _compare(reference, past + more, done, logprobs)
        # all but the last token, which never had K/V; of a model whose layers all have a window the last pages alone
        assert done.usage.restored + done.usage.reused == len(past) - 1
        assert done.usage.reused == (64 if family == "mistral" else 0)
        assert done.usage.prefilled == len(more) + 1
        assert done.reset_reason == ""
    finally:
        daemon.kill()
