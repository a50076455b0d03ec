"""From logits to a token: penalties and filters are transformers' logits processors.

A draw depends only on (seed, position): it is the same after preemption, in another batch and when a request runs
again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from atlas_client.errors import ErrorCode, ErrorReply
from atlas_client.protocol import Sampling, TokenLogprob
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

_MIX = 0x9E3779B97F4A7C15  # odd constant of splitmix64 (Steele et al. 2014): spreads consecutive positions


class _Bias(LogitsProcessor):
    """Adds a constant to chosen tokens' logits."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._ids = torch.tensor(list(bias), dtype=torch.int64)
        self._values = torch.tensor(list(bias.values()), dtype=torch.float32)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_add(1, self._ids, self._values[None])


class _PresenceFrequency(LogitsProcessor):
    """score -= presence + frequency * count for tokens generated in this turn (OpenAI's definition)."""

    def __init__(self, presence: float, frequency: float, since: int) -> None:
        self._presence, self._frequency, self._since = presence, frequency, since

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ids, counts = input_ids[0, self._since :].unique(return_counts=True)
        penalty = self._presence + self._frequency * counts.to(scores.dtype)
        return scores.index_add(1, ids, -penalty[None])


class Sampler:
    """Draws one request's tokens. `defaults` is the model's generation_config.json."""

    def __init__(self, sampling: Sampling, defaults: Mapping[str, Any], base: int, vocab: int) -> None:
        self._seed = sampling.seed or 0
        self._want = sampling.logprobs
        self._temperature = _temperature(sampling, defaults)
        _check(sampling, vocab)
        self._adjust = _penalties(sampling, defaults, base)
        self._filter = _filters(sampling, defaults, self._temperature)

    def pick(self, logits: torch.Tensor, tokens: list[int]) -> tuple[int, TokenLogprob | None]:
        """logits [vocab] float32 on the CPU for the token after `tokens`. Raises ErrorReply: INTERNAL on NaN logits,
        INVALID_PARAMETER when penalties leave nothing to choose from."""
        if not bool(torch.isfinite(logits.max())):
            raise ErrorReply(ErrorCode.INTERNAL, "the model produced logits that are not numbers; no token was drawn")
        scores = logits[None]
        if self._adjust:
            scores = self._adjust(_ids(tokens), scores)
            if not bool(torch.isfinite(scores.max())):
                raise ErrorReply(ErrorCode.INVALID_PARAMETER, "the penalties and biases are too large to draw a token")
        if self._temperature == 0:
            token = int(scores.argmax())
        else:
            scores = scores - scores.max()  # the same distribution; a tiny temperature then gives -inf, never +inf
            token = self._draw(self._filter(_ids(tokens[-1:]), scores), len(tokens))
        return token, self._logprob(logits, token)

    def _draw(self, scores: torch.Tensor, position: int) -> int:
        generator = torch.Generator()
        generator.manual_seed((self._seed + position * _MIX) % 2**63)
        return int(torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=generator))

    def _logprob(self, logits: torch.Tensor, token: int) -> TokenLogprob | None:
        if self._want is None:
            return None
        logprobs = torch.log_softmax(logits, dim=-1)
        values, ids = logprobs.topk(min(self._want, logprobs.numel()))
        top = list(zip(ids.tolist(), values.tolist(), strict=True))
        return TokenLogprob(token, float(logprobs[token]), top)


def _check(sampling: Sampling, vocab: int) -> None:
    """Raises INVALID_PARAMETER for what the message types do not rule out."""
    for token, bias in sampling.logit_bias.items():
        if not 0 <= token < vocab:
            raise ErrorReply(ErrorCode.INVALID_PARAMETER, f"logit_bias names token {token}; the vocabulary has {vocab}")
        if not math.isfinite(bias):
            raise ErrorReply(ErrorCode.INVALID_PARAMETER, f"logit_bias of token {token} is {bias}, not a finite number")
    if sampling.repetition_penalty is not None and not math.isfinite(sampling.repetition_penalty):
        raise ErrorReply(ErrorCode.INVALID_PARAMETER, "repetition_penalty is not a finite number")


def _ids(tokens: list[int]) -> Any:
    """[1, len(tokens)]; a LongTensor to transformers' annotations."""
    return torch.tensor([tokens], dtype=torch.int64)


def _temperature(sampling: Sampling, defaults: Mapping[str, Any]) -> float:
    if sampling.temperature is not None:
        return sampling.temperature
    return float(defaults.get("temperature") or 1.0) if defaults.get("do_sample") else 0.0


def _penalties(sampling: Sampling, defaults: Mapping[str, Any], base: int) -> LogitsProcessorList:
    chain = LogitsProcessorList()
    if sampling.logit_bias:
        chain.append(_Bias(sampling.logit_bias))
    repetition = sampling.repetition_penalty or float(defaults.get("repetition_penalty") or 1.0)
    if repetition != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(repetition))
    if sampling.presence_penalty or sampling.frequency_penalty:
        chain.append(_PresenceFrequency(sampling.presence_penalty, sampling.frequency_penalty, base))
    return chain


def _filters(sampling: Sampling, defaults: Mapping[str, Any], temperature: float) -> LogitsProcessorList:
    """Temperature first, then the filters, as transformers' generate orders them."""
    chain = LogitsProcessorList()
    if temperature not in (0.0, 1.0):
        chain.append(TemperatureLogitsWarper(temperature))
    sampled = bool(defaults.get("do_sample"))
    top_k = sampling.top_k if sampling.top_k is not None else (defaults.get("top_k") or 0) * sampled
    top_p = sampling.top_p if sampling.top_p is not None else (sampled and defaults.get("top_p")) or 1.0
    min_p = sampling.min_p if sampling.min_p is not None else (sampled and defaults.get("min_p")) or 0.0
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        chain.append(TopPLogitsWarper(top_p))
    if min_p > 0.0:
        chain.append(MinPLogitsWarper(min_p))
    return chain
