"""Sampling against independent statements of each parameter's definition."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from atlas_client.errors import ErrorCode, ErrorReply
from atlas_client.protocol import Sampling

from atlasd.engine.sampling import Sampler

VOCAB = 50


def _logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def _sampler(defaults: dict[str, Any] | None = None, base: int = 0, **options: Any) -> Sampler:
    return Sampler(Sampling(**options), defaults or {}, base, VOCAB)


def _draws(sampler: Sampler, logits: torch.Tensor, count: int) -> Counter[int]:
    """Draws at `count` positions."""
    return Counter(sampler.pick(logits, [0] * position)[0] for position in range(1, count + 1))


def test_without_options_and_defaults_it_is_greedy() -> None:
    logits = _logits()
    assert _sampler().pick(logits, [1, 2])[0] == int(logits.argmax())


def test_the_models_generation_config_counts_and_options_win_over_it() -> None:
    logits = _logits()
    defaults = {"do_sample": True, "temperature": 5.0}
    assert len(_draws(_sampler(defaults, seed=1), logits, 200)) > 5
    assert set(_draws(_sampler(defaults, seed=1, temperature=0), logits, 50)) == {int(logits.argmax())}


def test_a_draw_depends_on_seed_and_position_only() -> None:
    logits = _logits()
    one = [_sampler(seed=7, temperature=1.0).pick(logits, [0] * n)[0] for n in range(1, 60)]
    backwards = _sampler(seed=7, temperature=1.0)
    again = [backwards.pick(logits, [9] * n)[0] for n in range(59, 0, -1)][::-1]
    other = [_sampler(seed=8, temperature=1.0).pick(logits, [0] * n)[0] for n in range(1, 60)]
    assert one == again
    assert one != other


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0] + [-30.0] * (VOCAB - 3))
    count = 6000
    drawn = _draws(_sampler(seed=3, temperature=2.0), logits, count)
    weights = [math.exp(x / 2) for x in (0.0, 1.0, 2.0)]
    for token, weight in enumerate(weights):
        expected = weight / sum(weights)
        sigma = math.sqrt(expected * (1 - expected) / count)
        assert abs(drawn[token] / count - expected) < 5 * sigma


def test_top_k_top_p_and_min_p_keep_what_they_define() -> None:
    logits = _logits(2)
    probabilities = torch.softmax(logits, -1)
    order = probabilities.argsort(descending=True).tolist()
    cumulative = probabilities[order].cumsum(0)
    nucleus = set(order[: int((cumulative < 0.7).sum()) + 1])
    floor = {t for t in range(VOCAB) if probabilities[t] >= 0.1 * probabilities.max()}
    hot = {"temperature": 1.0, "seed": 5}
    assert set(_draws(_sampler(top_k=3, **hot), logits, 400)) <= set(order[:3])
    assert set(_draws(_sampler(top_p=0.7, **hot), logits, 400)) <= nucleus
    assert set(_draws(_sampler(min_p=0.1, **hot), logits, 400)) <= floor
    assert len(_draws(_sampler(**hot), logits, 400)) > max(3, len(nucleus))


def test_penalties_and_bias() -> None:
    logits = torch.zeros(VOCAB)
    logits[3], logits[4] = 2.0, 1.5
    context = [3, 3, 3]
    assert _sampler().pick(logits, context)[0] == 3
    assert _sampler(repetition_penalty=2.0).pick(logits, context)[0] == 4
    assert _sampler(presence_penalty=0.6).pick(logits, context)[0] == 4
    assert _sampler(presence_penalty=0.6, base=3).pick(logits, context)[0] == 3  # the prompt does not count
    assert _sampler(frequency_penalty=0.1).pick(logits, context)[0] == 3
    assert _sampler(frequency_penalty=0.2).pick(logits, context)[0] == 4
    assert _sampler(logit_bias={9: 100.0}).pick(logits, context)[0] == 9
    assert _sampler(logit_bias={3: -100.0}).pick(logits, context)[0] == 4


def test_logprobs_are_the_models_own() -> None:
    logits = _logits(4)
    token, logprob = _sampler(logprobs=5, logit_bias={7: 100.0}).pick(logits, [1])
    expected = logits - torch.logsumexp(logits, -1)
    assert token == 7
    assert logprob is not None
    assert logprob.logprob == pytest.approx(float(expected[7]), abs=1e-5)
    assert [t for t, _ in logprob.top] == expected.argsort(descending=True)[:5].tolist()


def test_nan_logits_are_an_error_and_no_token() -> None:
    logits = _logits()
    logits[11] = float("nan")
    with pytest.raises(ErrorReply) as caught:
        _sampler().pick(logits, [1])
    assert caught.value.code is ErrorCode.INTERNAL


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ErrorReply) as caught:
        _sampler(logit_bias={VOCAB: 1.0})
    assert caught.value.code is ErrorCode.INVALID_PARAMETER
